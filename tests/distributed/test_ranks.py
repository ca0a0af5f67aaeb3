"""Several processes give the masks and bits of one process; a failure on one fails all."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path

import pytest
import ranks_program
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torchrun import start_program

import rkif

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


def start(ranks: int, scenario: str, folder: Path, **how: bool) -> subprocess.CompletedProcess[str]:
    return start_program(ranks_program.__file__, ranks, scenario, folder, **how)


def run(ranks: int, scenario: str, folder: Path, **how: bool) -> None:
    done = start(ranks, scenario, folder, **how)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Folders with the results of one, two, three and four processes."""
    folders = {ranks: tmp_path_factory.mktemp(f"ranks{ranks}") for ranks in (1, 2, 3, 4)}
    for ranks, folder in folders.items():
        run(ranks, "same_bits", folder, torchrun=ranks == 3)
    return folders


def assert_same(one: Path, other: Path) -> None:
    expected, found = load_file(one), load_file(other)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("sample", [1 << 18, 8], ids=["all-sent", "counted"])
@pytest.mark.parametrize(
    ("ranks", "kind", "name"),
    [
        (ranks, kind, name)
        for ranks, kinds in ((2, ("ddp", "fsdp")), (3, ("ddp", "fsdp", "columns")), (4, ("hsdp",)))
        for kind in kinds
        for name in ranks_program.names(kind)
    ],
)
def test_masks_and_bits_are_those_of_one_process(
    results: dict[int, Path], ranks: int, kind: str, name: str, sample: int
) -> None:
    stem = f"{name}-{sample}"
    one, other = results[1] / f"alone-{stem}.safetensors", results[ranks] / f"{kind}-{stem}.safetensors"
    assert_same(one, other)
    reports, expected = (json.loads(path.with_suffix(".json").read_text()) for path in (other, one))
    for report, wanted in zip(reports, expected, strict=True):
        for which, norm in wanted.pop("norms").items():
            assert math.isclose(report["norms"][which], norm, rel_tol=1e-6)
        del report["norms"]
        assert report == wanted


def test_the_compared_runs_contain_every_case(results: dict[int, Path]) -> None:
    """The runs compared above contain every case, and empty shards."""
    for name in ("paper", "release", "tensor", "packed"):
        reports = json.loads((results[1] / f"alone-{name}-8.json").read_text())
        assert len(reports) == 3
        assert all(sum(report["counts"][case] for report in reports) for case in reports[0]["counts"])
        assert all(report["norms"]["update"] > 0 for report in reports)
    for name in ("missing", "missing_tensor"):
        reports = json.loads((results[1] / f"alone-{name}-8.json").read_text())
        assert [report.get("missing") for report in reports] == [None, ["0.bias", "2.weight"], None]
    rows = [parameter.shape[0] for parameter in ranks_program.make_model().parameters()]
    assert 1 in rows  # a tensor that is on one rank only
    assert any(count % 2 and count % 3 for count in rows)  # two or three ranks have unequal shards


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_with_their_own_batches_end_with_the_same_model(tmp_path: Path, ranks: int) -> None:
    """Outer steps synchronise gradients as inner steps do."""
    run(ranks, "training", tmp_path)
    for kind in ("ddp", "fsdp"):
        every = list(load_file(tmp_path / f"training-{kind}.safetensors").values())
        assert len(every) == ranks
        assert all(torch.equal(every[0], other) for other in every[1:])
        assert [report["applied"] for report in json.loads((tmp_path / f"training-{kind}.json").read_text())]
    replicas, shards = (load_file(tmp_path / f"training-{kind}.safetensors")["a"] for kind in ("ddp", "fsdp"))
    torch.testing.assert_close(
        replicas, shards, rtol=1e-4, atol=1e-5
    )  # sums of gradients differ in their last bits


def test_a_state_is_resumed_on_any_number_of_ranks(tmp_path: Path) -> None:
    """Saved on one, two replicas and two shards, in the middle of an outer phase; resumed on 1, 2 and 3."""
    for ranks in (1, 2):
        run(ranks, "save", tmp_path)
    middles = sorted(path.name for path in tmp_path.glob("*-middle"))
    assert len(middles) == 9
    straight = {}
    for name in ("release", "packed", "bf16"):
        dtype = torch.bfloat16 if name == "bf16" else torch.float32
        loop = ranks_program.Loop(ranks_program.make_model(dtype), ranks_program.CONFIGS[name])
        loop.run(range(21))
        straight[name] = loop.result()
    for ranks, kinds in ((1, ["alone"]), (2, ["ddp", "fsdp"]), (3, ["ddp", "fsdp"])):
        run(ranks, "resume", tmp_path)
        for middle in middles:
            for kind in kinds:
                found = load_file(tmp_path / f"{middle}-{kind}.safetensors")
                expected = straight[middle.split("-")[1]]
                assert set(found) == set(expected)
                assert all(torch.equal(found[name], expected[name]) for name in expected), (
                    ranks,
                    middle,
                    kind,
                )


def test_a_failure_in_the_outer_phase_fails_all_ranks(tmp_path: Path) -> None:
    done = start(3, "drops_out", tmp_path, fails=True)
    assert done.returncode != 0
    assert "OSError: the disk with the memory is gone" in done.stderr
    assert "RankFailedError: rank 1 failed: OSError: the disk with the memory is gone" in done.stderr


def test_a_nan_in_one_shard_stops_all_ranks_with_their_state_intact(tmp_path: Path) -> None:
    done = start(2, "gets_nan", tmp_path, fails=True)
    assert done.returncode != 0
    assert done.stdout.count("untouched") == 2
    for rank in (0, 1):
        assert f"[rank{rank}]: RuntimeError: 1 elements had a non-finite importance" in done.stderr


def test_all_ranks_abandon_a_fusion_that_one_refuses_and_continue(tmp_path: Path) -> None:
    done = start(3, "fails_in_fuse", tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    cause = "RuntimeError: observe() was never called for the outer learner in this round"
    for rank in (0, 2):
        assert f"rank {rank} was told: rank 1 failed: {cause}" in done.stdout
    assert done.stdout.count("goes on in round 2") == 3


@pytest.mark.parametrize("scenario", ["other_config", "other_gate"])
def test_ranks_with_other_settings_are_refused(tmp_path: Path, scenario: str) -> None:
    done = start(2, scenario, tmp_path, fails=True)
    assert done.returncode != 0
    refusal = "rank 1 has another config, another gate or other parameters than rank 0"
    assert done.stderr.count(refusal) >= 2


def test_all_ranks_refuse_a_nan_in_one_replica_and_continue(tmp_path: Path) -> None:
    done = start(2, "replica_gets_nan", tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in (0, 1):
        assert f"rank {rank} was told: 1 elements had a non-finite importance" in done.stdout
        assert done.stdout.count(f"rank {rank} goes on") == 2


def test_all_ranks_abandon_a_fusion_that_one_cannot_compute_and_continue(tmp_path: Path) -> None:
    done = start(2, "no_memory_to_fuse", tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "rank 0 was told: rank 1 failed: OutOfMemoryError: no memory to fuse" in done.stdout
    assert "rank 1 was told: no memory to fuse" in done.stdout
    assert done.stdout.count("goes on in round 2") == 2


def test_evaluations_use_the_current_parameters(tmp_path: Path) -> None:
    """Evaluations under FSDP2, by a gate and others, after a rollback and kept, damped and undone fusions."""
    run(1, "evaluates", tmp_path)
    run(2, "evaluates", tmp_path)
    for how in ("module", "pairs"):
        one, two = (
            load_file(tmp_path / f"evaluates-{kind}-{how}.safetensors")["losses"]
            for kind in ("alone", "fsdp")
        )
        torch.testing.assert_close(two, one, rtol=1e-5, atol=0)
        assert {0.0, 1.0} <= set(one.tolist()), one  # a fusion was undone, and one was kept


def test_a_state_can_be_loaded_on_another_mesh(tmp_path: Path) -> None:
    run(4, "other_mesh", tmp_path)


def test_deepspeed_and_fsdp1_are_refused_with_the_reason() -> None:
    model = nn.Linear(2, 2)
    model.weight.ds_id = 0  # the mark of parameters under ZeRO stage 3
    with pytest.raises(TypeError, match=r"'weight' is DeepSpeed's.*\.grad is not the gradient.*FSDP2"):
        rkif.Fuser(model)

    class FullyShardedDataParallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = nn.Linear(2, 2)

    with pytest.raises(TypeError, match=r"flattens many parameters into one.*fully_shard"):
        rkif.Fuser(nn.Sequential(FullyShardedDataParallel()))


def test_a_wrapped_model_has_the_parameter_names_of_the_model() -> None:
    model = ranks_program.make_model()
    compiled = torch.compile(model)
    parallel = nn.DataParallel(model)
    for wrapped in (compiled, parallel):
        assert list(rkif.Fuser(wrapped).base()) == [name for name, _ in model.named_parameters()]
