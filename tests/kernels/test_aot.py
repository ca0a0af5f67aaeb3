"""The ahead-of-time check refuses bad kernels and accepts good ones."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton")

from rich.console import Console

from bench.kernels import aot, prediction, toolchains
from bench.kernels.aot import Selection
from bench.kernels.cases import cases
from bench.kernels.machine_code import Loop, bulk_loop, parse
from bench.kernels.prediction import Launch, blocks_per_sm, predicted_share
from bench.kernels.shapes import LORA_R8, ShapeSet

WIDE = Counter({128: 1})
# A loop over tiles within a loop over chunks, as the disassembler prints it: whole blocks from 0x30, tails
# from 0x80.
NESTED = """
        /*0000*/                   LDG.E.64 R2, desc[UR4][R2.64] ;
        /*0010*/                   ISETP.GT.AND P0, PT, R4, R5, PT ;
        /*0020*/              @!P0 BRA 0x80 ;
        /*0030*/                   LDG.E.128 R8, desc[UR4][R2.64] ;
        /*0040*/                   FADD R8, R8, R8 ;
        /*0050*/                   STG.E.128 desc[UR4][R2.64], R8 ;
        /*0060*/               @P1 LDG.E.U16 R12, desc[UR4][R2.64] ;
        /*0070*/                   BRA 0xc0 ;
        /*0080*/              @!P2 LDG.E R8, desc[UR4][R2.64] ;
        /*0090*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00a0*/                   REDG.E.ADD.64.STRONG.GPU desc[UR4][R6.64], R10 ;
        /*00b0*/              @!P2 STG.E desc[UR4][R2.64], R8 ;
        /*00c0*/                   NOP ;
        /*00d0*/               @P3 BRA 0x10 ;
        /*00e0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00f0*/               @P4 BRA 0x0 ;
        /*0100*/                   EXIT ;
        /*0110*/                   BRA 0x110 ;
"""


def loop(text: str, loads: Counter[int] = WIDE, stores: Counter[int] = WIDE) -> Loop:
    found = bulk_loop(parse(text), loads, stores)
    assert found is not None
    return found


def test_the_bulk_loop_is_the_path_of_whole_blocks() -> None:
    operations = [instruction.operation for instruction in loop(NESTED).bulk]
    assert operations == ["ISETP.GT.AND", "BRA", "LDG.E.128", "FADD", "STG.E.128", "LDG.E.U16", "BRA", "BRA"]
    assert loop(NESTED).loads_after_store == 1
    assert loop(NESTED).bits("STG", {128}) == 128
    assert loop(NESTED).bits("LDG", {16, 128}) == 144


def test_a_barrier_of_a_tail_is_counted_and_one_of_the_outer_loop_is_not() -> None:
    assert (loop(NESTED).count("BAR"), loop(NESTED).count("REDG")) == (1, 1)


def test_conditional_instructions_are_counted() -> None:
    guarded = loop(NESTED.replace("    FADD R8, R8, R8 ;", "@P5 BRA 0x60 ;"), stores=Counter())
    assert "STG.E.128" in [instruction.operation for instruction in guarded.bulk]


def test_wide_accesses_identify_the_loop() -> None:
    tail = bulk_loop(parse(NESTED), Counter({32: 1}), Counter({32: 1}))
    assert tail is not None
    assert "REDG.E.ADD.64.STRONG.GPU" in [instruction.operation for instruction in tail.bulk]
    assert bulk_loop(parse(NESTED), Counter({128: 2}), WIDE) is None
    assert bulk_loop(parse(NESTED), Counter(), Counter()) is None


def test_code_without_a_backward_branch_has_no_loop() -> None:
    straight = NESTED.replace("@P3 BRA 0x10", "@P3 BRA 0x100").replace("@P4 BRA 0x0", "@P4 BRA 0x100")
    assert bulk_loop(parse(straight), WIDE, WIDE) is None


def test_a_branch_may_have_its_predicate_among_the_operands() -> None:
    text = NESTED.replace("@P3 BRA 0x10", "    BRA P3, 0x10").replace("@P4 BRA 0x0", "BRA.U !UP0, 0x0")
    assert len(loop(text).bulk) == 8
    with pytest.raises(RuntimeError, match="leads to no instruction"):
        parse(NESTED.replace("BRA 0x10 ", "BRA 0x990 "))


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "blocks"),
    [
        ("sm_90", 56, 0, 4, 9),
        ("sm_90", 66, 0, 4, 7),
        ("sm_90", 123, 0, 4, 4),
        ("sm_90", 16, 0, 1, 32),  # the limit of programs
        ("sm_90", 16, 0, 4, 16),  # the limit of warps
        ("sm_90", 32, 50 * 1024, 4, 4),  # 51 KiB each of 228
        ("sm_80", 32, 50 * 1024, 4, 3),  # of 164
    ],
)
def test_occupancy_is_limited_by_registers_warps_and_shared_memory(
    target: str, registers: int, shared: int, warps: int, blocks: int
) -> None:
    assert blocks_per_sm(target, registers, shared, warps) == blocks


def test_a_launch_takes_the_longer_of_its_bytes_and_its_instructions() -> None:
    """By hand: 0.9 of 3.35 TB/s, 132 multiprocessors, 4 warps per cycle at 1.98 GHz, 4 us."""
    assert Launch("", 3.015e9, 0).seconds() == pytest.approx(1.004e-3)
    assert Launch("", 3.015e9, 6.69e10).seconds() == pytest.approx(2.004e-3, rel=1e-3)
    # 2^26 elements: 712.3 us of bytes and 153.5 of instructions; then 802.4 of instructions.
    assert predicted_share(32, 76.5) == pytest.approx(712.3 / 716.3, abs=1e-3)
    assert predicted_share(32, 400) == pytest.approx(712.3 / 806.4, abs=1e-3)


def test_a_fusion_of_the_adapter_is_counted_launch_by_launch() -> None:
    """By hand, for 6,553,600 elements: one run of eight per 128 scores, and 1.58 % undecided."""
    launches = {launch.kernel: launch for launch in prediction.fuse(LORA_R8, {"bracketed fuse": 80})}
    bins = 2 * 2048 * 8  # of both sides; a launch reads them and sets them to zero
    assert launches["count sample"].moved == 51_200 * 4 * 32 + 2 * bins
    assert launches["bracketed fuse"].moved == 6_553_600 * (32 + 1 / 8)
    assert launches["bracketed fuse"].instructions == 6_553_600 * 80
    listed = launches["finish"].moved / 60
    assert listed / 6_553_600 == pytest.approx(0.0158, abs=1e-4)
    assert launches["list"].moved == pytest.approx(6_553_600 / 8 + listed * 260 + 2 * bins)
    assert prediction._iterations(1.28, 1) == pytest.approx(1.28, rel=1e-4)  # of one lane: its mean


def test_predictions_are_compared_with_the_goals() -> None:
    rates = {"observe": 20.0, "bracketed scores": 26.0, "bracketed fuse": 77.0, "adamw": 60.0}
    columns = {str(column.header): list(column.cells) for column in prediction.table(rates).columns}
    assert columns["call"] == [
        *("observe", "threshold", "tensor_thresholds", "fuse", "adamw"),
        *("observe", "threshold", "fuse", "adamw"),
    ]
    limits = ["at most 1.25x the floor", "-", "-", "at most 150 us", "-"]
    assert columns["goal"] == [*limits, "at most 1.25x the floor", "-", "at most 1.15x the floor", "-"]
    assert set(columns["prediction"]) == {"reached", "-"}
    slow = prediction.table(dict.fromkeys(rates, 1e4)).columns[5]
    assert list(slow.cells) == ["NOT REACHED", "-", "-", "NOT REACHED", "-", *["NOT REACHED", "-"] * 2]


def test_a_threshold_of_each_tensor_is_counted_launch_by_launch() -> None:
    """By hand: of 3 tensors, one is read by one program, and 2 * 2^14 scores are bracketed one by one."""
    shapes = ShapeSet("three", ((1 << 14,), (100, 10), (1 << 7, 1 << 7)))
    launches = {
        launch.kernel: launch for launch in prediction.tensor_thresholds(shapes, {"bracketed scores": 26})
    }
    assert launches["whole"].moved == 8 * 1000
    bins = 2 * 2048 * 8
    assert launches["sample"].moved == 2 * 256 * 2 * 32 + 2 * 2048 * 8 + bins
    assert launches["count sample"].moved == 2 * 128 * 2 * 32 + 2 * bins
    assert launches["bracketed scores"].moved == 2 * (1 << 14) * (8 + 1 / 8)


def test_selected_dtypes_leave_out_only_variants_with_others() -> None:
    every = list(cases("sm_90"))
    chosen = Selection((), ("fp32",)).cases("sm_90")
    left = [case for case in every if case not in chosen]
    assert left
    assert all("bf16" in case.variant or "fp16" in case.variant for case in left)
    assert not any("bf16" in case.variant or "fp16" in case.variant for case in chosen)
    assert {case.kernel for case in chosen} == {case.kernel for case in every}
    assert Selection().cases("sm_90") == every
    bracketed = Selection(("bracketed fuse",), ("fp32", "bf16")).cases("sm_90")
    assert {case.kernel for case in bracketed} == {"bracketed fuse"}
    assert any("bf16" in case.variant for case in bracketed)


@pytest.mark.parametrize(
    ("target", "kernel", "dtype", "message"),
    [
        ("sm_70", "fuse", "fp32", "--target must be one of sm_80, sm_90, sm_100, gfx942; got sm_70"),
        ("sm_90", "sort", "fp32", "--kernel must be one of observe, fuse, .*; got sort"),
        ("sm_90", "fuse", "fp8", "--dtype must be one of fp32, bf16, fp16; got fp8"),
    ],
)
def test_an_unknown_selection_is_refused(target: str, kernel: str, dtype: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        aot.check(Console(), [target], Selection([kernel], [dtype]))


def test_another_triton_version_replaces_the_installed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version is installed once, in the user's cache; the installed version is used directly."""
    installations = []

    def pip(command: list[str], check: bool) -> None:
        installations.append(command[-1])
        Path(command[command.index("--target") + 1]).mkdir()

    monkeypatch.setattr(toolchains.subprocess, "run", pip)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", "mine")
    for _ in range(2):
        first, rest = toolchains.environment("3.6.0")["PYTHONPATH"].split(os.pathsep)
        assert (Path(first).parent, rest) == (tmp_path / "rkif", "mine")
        assert Path(first).is_dir()
    assert installations == ["triton==3.6.0"]
    assert toolchains.environment(toolchains.installed_version("triton"))["PYTHONPATH"] == "mine"
    assert installations == ["triton==3.6.0"]


def test_two_processes_may_install_a_triton_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of the process that is ready first is kept."""
    folder = tmp_path / "rkif" / f"triton-3.6.0-py{sys.version_info.major}{sys.version_info.minor}"

    def pip(command: list[str], check: bool) -> None:
        for target in (Path(command[command.index("--target") + 1]), folder):
            target.mkdir()
            (target / "triton.py").write_text(str(target))

    monkeypatch.setattr(toolchains.subprocess, "run", pip)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert toolchains.environment("3.6.0")["PYTHONPATH"].split(os.pathsep)[0] == str(folder)
    assert (folder / "triton.py").read_text() == str(folder)
    assert list(folder.parent.iterdir()) == [folder]


@pytest.fixture(scope="module")
def problems() -> dict[tuple[str, str], str]:
    """(kernel, target) -> problems, from another process, because Triton interprets in this one."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, root / "tests" / "helpers" / "bad_kernels.py"],
        env=environment | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = (line.split(" | ", 2) for line in done.stdout.splitlines())
    return {(name, target): "".join(found) for name, target, *found in lines}


@pytest.mark.parametrize(
    ("kernel", "target", "complaint"),
    [
        ("narrow", "sm_90", "0 loads of 128 bits where a block needs 2 | 0 stores of 128 bits"),
        ("narrow", "gfx942", "0 loads of 128 bits where a block needs 1 | 0 stores of 128 bits"),
        ("spills", "sm_90", "registers spill"),
        ("narrow", "sm_90", "is recompiled for special values of numel"),
        ("contracted", "sm_90", "FFMA in the machine code: not the arithmetic that was written"),
        ("contracted, divides", "sm_90", "fma.rn.f32 in the PTX: not the arithmetic that was written"),
        ("meets", "sm_90", "barriers in loop; the limit is 0"),
        ("meets", "sm_90", "1 atomics in loop; the limit is 0"),
        ("meets", "sm_90", "loads after store; the limit is 0"),
        ("no loop", "sm_90", "no loop with the bulk accesses is found"),
        ("contracted", "gfx942", "fma_f32 in the machine code: not the arithmetic that was written"),
    ],
)
def test_a_bad_kernel_is_refused(
    problems: dict[tuple[str, str], str], kernel: str, target: str, complaint: str
) -> None:
    assert complaint in problems[kernel, target]


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_good_kernel_is_accepted(problems: dict[tuple[str, str], str], target: str) -> None:
    assert problems["good", target] == ""
