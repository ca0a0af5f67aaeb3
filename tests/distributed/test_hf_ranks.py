"""The trainer on several processes equals one process with all batches; a failure on one fails all."""

from __future__ import annotations

from pathlib import Path

import hf_ranks_program
import pytest
import torch
from safetensors.torch import load_file
from torchrun import start_program


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Final parameters on one and on several processes: of adapters, all parameters, and shards."""
    folder = tmp_path_factory.mktemp("ends")
    for ranks, kind in ((1, "ddp"), (2, "ddp"), (1, "full"), (3, "full"), (3, "fsdp")):
        done = start_program(hf_ranks_program.__file__, ranks, kind, folder, torchrun=kind == "fsdp")
        assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize(("one", "other"), [("ddp-1", "ddp-2"), ("full-1", "full-3"), ("full-1", "fsdp-3")])
def test_processes_share_the_batches_of_one(ends: Path, one: str, other: str) -> None:
    """For training data and replay memory; only the order of the gradient sums differs."""
    expected, found = (load_file(ends / f"{name}.safetensors") for name in (one, other))
    assert expected["rounds"] == len(expected["outer losses"]) == 3
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scenario", ["resumes", "keeps_shards"])
def test_a_checkpoint_holds_the_whole_state(tmp_path: Path, scenario: str) -> None:
    done = start_program(hf_ranks_program.__file__, 2, scenario, tmp_path / "it")
    assert done.returncode == 0, done.stderr[-4000:]
    assert list((tmp_path / "it").glob("*.safetensors"))


def test_a_failure_in_an_outer_step_fails_all_ranks(tmp_path: Path) -> None:
    done = start_program(hf_ranks_program.__file__, 2, "fails", tmp_path, fails=True)
    assert done.returncode != 0
    assert "RankFailedError: rank 1 failed: OSError: the disk with the memory is gone" in done.stderr
