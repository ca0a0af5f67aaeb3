"""The counts, comparisons and rows of the benchmarks; a wrong result is never timed."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import rkif
from bench.__main__ import app
from bench.common import rows
from bench.common.timing import plan
from bench.kernels import baselines, busy, goals
from bench.kernels import equality as gate
from bench.kernels import tables as kernels
from bench.kernels.implementations import Implementation, implementations
from bench.kernels.measure import QUICK, measure
from bench.kernels.operations import DTYPES, OPERATIONS, Fuse, Operation, Threshold, bytes_per_element
from bench.kernels.shapes import LLAMA_2_13B, LLAMA_32_1B, LORA_R8, LORA_R64, SHAPES, ShapeSet, Stack, fitted
from bench.training import overhead

CPU = torch.device("cpu")
SMALL = ShapeSet("small", ((3, 5), (200,), (1,), (40, 9)), adapter=True)


def test_totals_are_those_of_the_models() -> None:
    assert LLAMA_2_13B.whole().numel == 13_015_864_320
    assert LLAMA_32_1B.whole().numel == 1_235_814_400
    assert LORA_R8.numel == 6_553_600
    assert len(LORA_R8.shapes) == 160
    # q, k, v, o; gate, up, down: rank * (in + out)
    assert LORA_R64.numel == 40 * 64 * (4 * 2 * 5120 + 3 * (5120 + 13824))
    assert fitted("one-2Gi", 2**40).numel > 2**31


def test_models_are_cut_to_the_layers_that_fit() -> None:
    layer = LLAMA_2_13B.first(1).numel
    cut = fitted("llama-2-13b", 2 * layer + 1)
    assert cut.name == "llama-2-13b, 2 of 40 layers"
    assert cut.numel == 2 * layer
    assert fitted("llama-2-13b", 13_015_864_320) == LLAMA_2_13B.whole()
    assert fitted("llama-2-13b", 13_015_864_319).numel == 40 * layer
    with pytest.raises(ValueError, match="not one layer of llama-2-13b fits"):
        fitted("llama-2-13b", layer - 1)
    with pytest.raises(ValueError, match="one-16Mi does not fit"):
        fitted("one-16Mi", 2**24 - 1)


def test_every_default_shape_exists() -> None:
    from bench.kernels.shapes import by_default

    for device in ("cpu", "cuda"):
        assert set(by_default(device, quick=True)) <= set(by_default(device, quick=False)) <= set(SHAPES)
    assert all(isinstance(shapes, ShapeSet | Stack) for shapes in SHAPES.values())


def test_bytes_count_every_input_and_output_once() -> None:
    expected = {
        "float32": {"observe": 24, "threshold": 8, "fuse": 32},
        "bfloat16+float32": {"observe": 20, "threshold": 8, "fuse": 24},
        "bfloat16": {"observe": 12, "threshold": 4, "fuse": 16},
    }
    for name, dtypes in DTYPES.items():
        assert {op: bytes_per_element(op, dtypes) for op in OPERATIONS} == expected[name]


def test_a_row_has_the_hand_computed_bandwidth() -> None:
    """1000 elements of 8 bytes in 2 us are 4 GB/s, half of 8."""
    row = make_row(seconds=[1e-6, 2e-6, 3e-6], bytes_min=8000, copy_gbps=8.0)
    assert (row["ms_median"], row["gbps"], row["share"], row["rounds"]) == (0.002, 4.0, 0.5, 3)
    assert row["ms_p20"] == pytest.approx(0.0014)
    assert row["ms_p80"] == pytest.approx(0.0026)


def make_row(**changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "op": "fuse",
        "shape": "small",
        "dtype": "float32",
        "implementation": "rkif.torch",
        "numel": 1000,
        "tensors": 1,
        "seconds": [1e-3],
        "bytes_min": 32_000,
        "copy_gbps": 10.0,
        "device": CPU,
    }
    named = changes.pop("device_name", None)
    row = rows.row(**{**settings, **changes})
    return row | ({"device": named} if named else {})


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("op", OPERATIONS.values(), ids=OPERATIONS.keys())
def test_implementations_agree_with_the_reference(op: type[Operation], dtypes: Any) -> None:
    operation = op(SMALL, dtypes, CPU)
    checked = 0
    for implementation in implementations(op.name, CPU):
        if implementation.name != "compiled" and not implementation.obstacle and implementation.same:
            operation.check(implementation.make(), implementation.exact)
            checked += 1
    assert checked >= 3


def test_compiled_baselines_agree_with_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions given to torch.compile run uncompiled, to save the compiler's time."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    for op in ("observe", "fuse"):
        operation = OPERATIONS[op](SMALL, DTYPES["bfloat16"], CPU)
        (compiled,) = [one for one in implementations(op, CPU) if one.name == "compiled"]
        operation.check(compiled.make(), exact=False)


def test_another_algorithm_is_labelled_and_runs() -> None:
    pytest.importorskip("peft")
    operation = Fuse(SMALL, DTYPES["float32"], CPU)
    others = [one for one in implementations("fuse", CPU) if not one.same]
    assert len(others) == 2
    for implementation in others:
        assert "another algorithm" in implementation.name
        operation.call(implementation.make())
        assert not any(tensor.isnan().any() for tensor in operation.out)
        assert implementation.obstacle_to(replace(SMALL, adapter=False)).endswith("adapters only")


def test_a_quantile_is_refused_beyond_its_limit() -> None:
    (quantile,) = [one for one in implementations("threshold", CPU) if one.name == "torch.quantile"]
    assert not quantile.obstacle_to(fitted("one-16Mi", 2**30))
    assert "at most 16,777,216 elements" in quantile.obstacle_to(fitted("one-64Mi", 2**30))


def test_large_thresholds_are_checked_by_counting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "SORTED", 100)
    monkeypatch.setattr(gate, "CHUNK", 64)
    monkeypatch.setattr(baselines, "QUANTILE_LIMIT", 100)
    monkeypatch.setattr("bench.kernels.operations.QUANTILE_LIMIT", 100)
    threshold, fuse = Threshold(SMALL, DTYPES["bfloat16"], CPU), Fuse(SMALL, DTYPES["float32"], CPU)
    threshold.check(baselines.sort, exact=True)
    with pytest.raises(AssertionError, match="is the k-th for k from"):
        threshold.check(lambda scores, density: baselines.sort(scores, density + 0.05), exact=True)
    fuse.check(baselines.fuse, exact=False)
    for implementation in implementations("fuse", CPU):
        if implementation.exact:
            fuse.check(implementation.make(), exact=True)


class Never:
    """A benchmark that must not start."""

    def pedantic(self, *_: Any, **__: Any) -> None:
        raise RuntimeError("timed")


@pytest.mark.parametrize("op", OPERATIONS)
def test_a_wrong_result_is_not_timed(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An implementation with an error of 1e-3 in one element fails its benchmark."""
    right = implementations(op, CPU)[0]

    def wrong(*lists: Any, **settings: Any) -> Any:
        found = right.make()(*lists, **settings)
        target = {"observe": lambda: lists[2][1], "threshold": lambda: found, "fuse": lambda: lists[0][1]}[
            op
        ]()
        target.reshape(-1)[0] += 1e-3
        return found

    operation = OPERATIONS[op](SMALL, DTYPES["float32"], CPU)
    with pytest.raises(AssertionError, match="1 elements differ"):
        measure(Never(), operation, replace(right, make=lambda: wrong), QUICK, copy_gbps=1.0)
    with pytest.raises(RuntimeError, match="timed"):
        measure(Never(), operation, right, QUICK, copy_gbps=1.0)
    if op != "threshold":
        with pytest.raises(AssertionError, match="not close"):
            measure(Never(), operation, Implementation("eager", lambda: wrong), QUICK, copy_gbps=1.0)


@pytest.mark.parametrize("op", ["observe", "threshold"])
def test_a_row_is_the_time_of_one_operation(op: str, benchmark: Any) -> None:
    """The row has the time of one operation, not of the iterations of a round or of two updates in a call."""
    if benchmark.disabled:
        pytest.skip("pytest-xdist disables benchmarks")

    def sleep(*_: Any, **__: Any) -> None:
        time.sleep(4e-4)

    operation = OPERATIONS[op](SMALL, DTYPES["float32"], CPU)
    sleeper = Implementation("sleeper", lambda: sleep, same=False)
    row = measure(benchmark, operation, sleeper, QUICK, copy_gbps=1.0)
    assert 0.4 <= row["ms_p20"] <= row["ms_median"] < 2
    assert row["bytes_min"] == {"observe": 24, "threshold": 8}[op] * SMALL.numel
    assert row["rounds"] >= 3
    assert not row["graph"]


def test_the_plan_fits_rounds_and_iterations_into_the_time() -> None:
    assert plan(2.0, round_s=0.01, total_s=1.0, rounds=(5, 100)) == (5, 1)
    assert plan(0.01, round_s=0.01, total_s=1.0, rounds=(5, 100)) == (100, 1)
    assert plan(0.0001, round_s=0.01, total_s=0.5, rounds=(5, 100)) == (50, 100)


def test_rows_are_replaced_not_repeated(tmp_path: Path) -> None:
    file = tmp_path / "new" / "rows.jsonl"
    for milliseconds in (1, 2):
        for name in ("rkif.torch", "eager"):
            rows.write(file, make_row(implementation=name, seconds=[milliseconds / 1e3]))
    rows.write(file, make_row(implementation="eager", device_name="another"))
    found = [(row["implementation"], row["ms_median"]) for row in rows.read(file)]
    assert found == [("rkif.torch", 2.0), ("eager", 2.0), ("eager", 1.0)]
    file.write_text("{not json\n")
    with pytest.raises(ValueError, match=r"rows.jsonl:1 is not a row"):
        rows.read(file)


def some_rows(device: str = "A100") -> list[dict[str, Any]]:
    made = [
        ("observe", "rkif.torch", 1e-3),
        ("observe", "eager", 5e-3),
        ("threshold", "rkif.torch", 2e-3),
        ("threshold", "torch.kthvalue", 3e-3),
        ("fuse", "rkif.torch", 4e-3),
        ("fuse", "rkif.native", 3e-3),
        ("fuse", "eager", 30e-3),
        ("fuse", "peft.ties (another algorithm)", 9e-3),
    ]
    return [
        make_row(op=op, implementation=name, seconds=[taken], device_name=device) for op, name, taken in made
    ]


def test_rows_are_shown_as_table_and_figure(tmp_path: Path) -> None:
    console = Console(width=200, record=True)
    console.print(kernels.rich_table(some_rows()))
    text = console.export_text()
    assert "10.00x eager" in text
    assert "1.50x torch.kthvalue" in text
    out = tmp_path / "docs" / "kernels.png"
    kernels.plot(some_rows(), out)
    assert out.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no float32 rows"):
        kernels.plot([make_row(dtype="bfloat16")], out)
    with pytest.raises(ValueError, match="several devices"):
        kernels.plot(some_rows() + some_rows("H100"), out)


def test_the_readme_table_compares_the_best_implementation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    assert kernels.markdown() == ""
    for row in [*some_rows(), make_row(dtype="bfloat16")]:
        rows.write(tmp_path / "gpu.jsonl", row)
    text = kernels.markdown()
    assert "A100: copies 10.0 GB/s; commit " in text
    (line,) = [line for line in text.splitlines() if line.startswith("| fuse")]
    assert line == "| fuse | small | native | 3.00 | 0.0 | 0% | 10.0x eager |"
    assert "bfloat16" not in text
    assert "peft" not in text


def goal_cells(found: list[dict[str, Any]]) -> list[list[str]]:
    """The cells of the table of goals, without the names of the rows."""
    console = Console(width=200, record=True)
    console.print(goals.table(found))
    lines = [line for line in console.export_text().splitlines() if "│" in line]
    return [[cell.strip() for cell in line.split("│")[1:-2]] for line in lines]


def test_goals_without_rows() -> None:
    others = [make_row(op="observe", implementation="eager", numel=goals.LARGE), make_row(op="fuse")]
    assert goal_cells(others) == [
        ["observe, 64 Mi and more", "at most 1.25x the floor", "-", "not measured", "-"],
        ["fuse, 64 Mi and more", "at most 1.15x the floor", "-", "not measured", "-"],
        ["observe, 13B adapter", "at most 1.25x the floor", "-", "not measured", "-"],
        ["fuse, 13B adapter", "at most 150 us", "-", "not measured", "-"],
    ]


def test_times_are_compared_with_the_goals() -> None:
    """Copies move 10 GB/s, so the floor of 10,000 bytes is 1 us. The row furthest from a goal decides."""
    large = {"numel": goals.LARGE, "implementation": goals.OURS}
    adapter = {"shape": LORA_R8.name, "implementation": goals.OURS}
    found = [
        make_row(op="observe", **large, seconds=[1.24e-3], bytes_min=10_000_000),
        make_row(op="fuse", **large, seconds=[1.1e-3], bytes_min=10_000_000),
        make_row(op="fuse", **large, dtype="bfloat16", seconds=[0.6e-3], bytes_min=5_000_000),
        make_row(op="fuse", **large | {"numel": goals.LARGE - 1}, seconds=[9.0]),
        make_row(op="observe", **adapter, seconds=[126e-6], bytes_min=1_000_000),
        make_row(op="fuse", **adapter, seconds=[150e-6], bytes_min=1_000_000),
        make_row(op="fuse", **adapter, dtype="bfloat16", seconds=[9.0]),
    ]
    assert [cells[2:] for cells in goal_cells(found)] == [
        ["1000.0", "1240.0", "reached"],
        ["500.0", "600.0", "NOT REACHED"],
        ["100.0", "126.0", "NOT REACHED"],
        ["100.0", "150.0", "reached"],
    ]


def test_the_overhead_of_a_small_model_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {"hidden_size": 72, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
    monkeypatch.setattr(overhead, "SHAPES", overhead.SHAPES | tiny)
    monkeypatch.setattr(overhead, "RESULTS", tmp_path / "overhead.jsonl")
    fusions, fuse = [], rkif.Fuser.fuse
    monkeypatch.setattr(rkif.Fuser, "fuse", lambda self: fusions.append(self) or fuse(self))
    for _ in range(2):  # the second rows replace the first
        overhead.measure(CPU, overhead.Batches(2, 4), 1, Console(quiet=True))
    # A warm-up and a timed run, for the adapter and all parameters; two methods fuse; measured twice.
    assert len(fusions) == 2 * 2 * 2 * 2
    found = overhead.rows()
    methods = ("adamw", "fused", "observe", "rkif_adamw")
    kinds = [(trained, method) for trained in ("adapter", "all") for method in methods]
    assert [(row["trained"], row["method"]) for row in found] == kinds
    assert all(row["round_ms"] > 0 for row in found)
    found[0]["round_ms"], found[1]["round_ms"], found[2]["round_ms"] = 8.0, 10.0, 12.0
    rows.write_all(overhead.RESULTS, found)
    table = overhead.markdown()
    assert "| torch.optim.AdamW | 0.7 | - | -20.0% | - |" in table
    assert "| torch.optim.AdamW, fused | 0.8 | +25.0% | - | - |" in table
    assert "| Fuser.observe, torch.optim.AdamW | 1.0 | +50.0% | +20.0% | - |" in table
    rows.write_all(overhead.RESULTS, [found[0], found[2]])  # rows of an earlier version, with fewer methods
    assert "| Fuser.observe, torch.optim.AdamW | 1.0 | +50.0% | - | - |" in overhead.markdown()


def test_the_profile_of_a_small_model_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.kernels import profile

    monkeypatch.setattr(profile, "LLAMA_2_13B", Stack("toy", ((8, 16), (16,)), layers=3, rest=((50, 16),)))
    monkeypatch.setattr(profile, "LORA_R8", SMALL)
    monkeypatch.setattr(profile, "WHOLE", 3 * 144 + 800)
    monkeypatch.setattr(profile, "copy_gbps", lambda _: 10.0)
    found = profile.profile_13b(CPU, 2, "float32")
    assert [(row["shape"], row["numel"]) for row in found] == [
        ("small: observe", SMALL.numel),
        ("small: fuse", SMALL.numel),
        ("toy, 2 of 3 layers, thresholds by layer: observe", 288),
        ("toy, 2 of 3 layers, thresholds by layer: fuse", 288),
    ]
    assert found[1]["bytes_min"] == 32 * SMALL.numel
    text = "\n".join(profile.report(found))
    assert text.count("extrapolated, not measured") == 2
    assert "thresholds" in text
    whole = profile.profile_13b(CPU, 3, "bfloat16")
    assert whole[-1]["numel"] == 1232
    assert "extrapolated" not in "\n".join(profile.report(whole))
    with pytest.raises(ValueError, match="--layers must be from 1 to 3"):
        profile.profile_13b(CPU, 4, "float32")


def test_the_suite_runs_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The options are applied, and the result is checked, timed and recorded."""
    out = tmp_path / "rows.jsonl"
    chosen = ["--device", "cpu", "--only", "threshold", "--shape", "smoke", "--dtype", "float32", "--quick"]
    chosen += ["--implementation", "rkif.torch", "--threads", "1", "--out", str(out)]
    result = CliRunner().invoke(app, ["run", *chosen], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert (row["op"], row["shape"], row["threads"]) == ("threshold", "smoke", 1)
    assert row["rounds"] >= 3
    assert 0 < row["ms_p20"] <= row["ms_median"] <= row["ms_p80"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--only", "sort"], "--only must be one of observe, threshold, fuse; got 'sort'"),
        (["run", "--shape", "x"], "--shape must be one of"),
        (["run", "--device", "tpu"], "--device must be auto, cpu or cuda"),
        (["compare", "no-such-commit"], "not a commit: 'no-such-commit'"),
        (["profile-13b", "--device", "cpu", "--layers", "41"], "--layers must be from 1 to 40"),
        (["sweep", "--device", "cpu", "--backend", "mkl"], "backend must be one of"),
        (["sweep", "--device", "cpu", "--graphs"], "--graphs needs --device cuda; got 'cpu'"),
        (["launches", "--device", "cpu", "--write"], "--write needs --device cuda; got 'cpu'"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_errors_name_their_cause(arguments: list[str], message: str) -> None:
    """The test reads the exceptions; exit_in_one_line prints them."""
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, ValueError | RuntimeError)
    assert message in str(result.exception)


def test_scores_between_a_quantile_and_its_order_statistic_may_differ() -> None:
    """Only these scores may: an eager fusion with another density is wrong."""
    operation = Fuse(SMALL, DTYPES["float32"], CPU)
    operation.check(baselines.fuse, exact=False)

    def off(*lists: Any, density: float, weights: Any) -> None:
        baselines.fuse(*lists, density=density + 0.1, weights=weights)

    with pytest.raises(AssertionError, match="not close"):
        operation.check(off, exact=False)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core is kept busy")
def test_calls_next_to_a_busy_core_are_measured() -> None:
    rows = busy.measure(rounds=1, shapes=fitted("smoke", 10_000))
    assert [row.op for row in rows] == ["observe", "threshold", "fuse"]
    assert all(row.quiet_ms > 0 and row.busy_ms > 0 for row in rows)
    assert busy.Row("fuse", 2.0, 3.0).ratio == 1.5
