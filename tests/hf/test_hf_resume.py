"""Checkpoints of `rkif.hf`: a resumed run has the same bits as an uninterrupted run."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import (
    FUSION,
    OverflowingTrainer,
    assert_same_bits,
    lora_llama,
    rows,
    scale_losses,
    trainer,
    weights,
)
from safetensors.torch import load_file
from tiny import tiny_t5
from transformers import Trainer, TrainerCallback

from rkif.continual.rundir.verify import verify
from rkif.hf import RKIFTrainer
from rkif.hf.memory import memory_digest
from rkif.ledger.chain import LedgerError, read_ledger

# 24 samples in batches of 2: 12 steps per epoch. Rounds of 3 end at steps 3, 6, 9, 12 and, with the tail, 14.
STEPS = {"max_steps": 14, "save_strategy": "steps", "save_steps": 1}


def state(run: Any) -> dict[str, torch.Tensor]:
    """Everything that determines the rest of a run, as one flat dict."""
    tensors = dict(run.fuser.state_dict())
    for learner, optimizer in (("inner", run.optimizer), ("outer", run._rkif.optimizer)):
        for number, slots in optimizer.state_dict()["state"].items():
            tensors |= {f"{learner}.{number}.{name}": value for name, value in slots.items()}
    tensors["position"] = torch.tensor(run._rkif.memory_position)
    tensors["random"] = torch.get_rng_state()
    return weights(run.model) | {f"state.{name}": value for name, value in tensors.items()}


def dropout_run(folder: Path, **changes: Any) -> Any:
    return trainer(folder, kind=RKIFTrainer, model=lora_llama(dropout=0.1), **{**STEPS, **changes})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """The checkpoints and the final state of an uninterrupted run with dropout."""
    folder = tmp_path_factory.mktemp("whole")
    run = dropout_run(folder)
    run.train()
    return folder, state(run)


@pytest.mark.parametrize("step", [1, 3, 5, 12, 13], ids=["first", "border", "mid-round", "epoch", "tail"])
def test_resumes_to_the_same_bits(tmp_path: Path, whole: Any, step: int) -> None:
    folder, end = whole
    run = dropout_run(tmp_path)
    run.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert run.fuser.round == 5
    assert_same_bits(state(run), end)


def test_every_checkpoint_holds_the_round(whole: Any) -> None:
    folder, _ = whole
    for step in range(1, 15):
        fuser = load_file(folder / f"checkpoint-{step}" / "rkif_fuser.safetensors")
        assert fuser["inner_observed"] == (0 if step == 14 else step % 3)
        assert fuser["round"] == (5 if step == 14 else step // 3)
        assert not list((folder / f"checkpoint-{step}").glob("*.tmp"))


def test_files_of_a_killed_save_are_removed(tmp_path: Path) -> None:
    left = tmp_path / "checkpoint-1" / ".tmpAbCdEf"  # a name that safetensors gives
    left.parent.mkdir()
    left.write_bytes(b"half a state")
    dropout_run(tmp_path, max_steps=1).train()
    assert (left.parent / "rkif_fuser.safetensors").exists()
    assert not left.exists()


@pytest.mark.parametrize("step", [2, 5])
def test_resumes_a_full_model_with_accumulation(tmp_path: Path, step: int) -> None:
    """T5 with dropout, two micro-batches per step, and evaluations during training."""
    ends = []
    for checkpoint in (None, str(tmp_path / f"checkpoint-{step}")):
        run = trainer(
            tmp_path,
            kind=RKIFTrainer,
            model=tiny_t5(40, 0),
            eval_dataset=rows(4, 5),
            eval_strategy="steps",
            eval_steps=2,
            gradient_accumulation_steps=2,
            **{**STEPS, "max_steps": 7},
        )
        run.train(resume_from_checkpoint=checkpoint)
        ends.append(state(run))
    assert_same_bits(ends[1], ends[0])


def test_resumes_under_a_gradient_scaler(tmp_path: Path) -> None:
    """The last step overflows, so the outer learner uses the learning rate from before the checkpoint."""
    ends = []
    for checkpoint, overflow in ((None, 6), (tmp_path / "checkpoint-4", 0)):
        run = trainer(tmp_path, kind=OverflowingTrainer, **{**STEPS, "max_steps": 5})
        scale_losses(run, autocast=False)
        run.overflows = frozenset({overflow})
        run.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        assert run.fuser.round == 2
        assert run.accelerator.scaler.get_scale() == 2.0**15
        ends.append(state(run))
    assert_same_bits(ends[1], ends[0])


def test_evaluation_changes_nothing(tmp_path: Path) -> None:
    ends = []
    for evaluation in ({}, {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": rows(4, 5)}):
        run = trainer(tmp_path, kind=RKIFTrainer, **evaluation)
        run.train()
        end = state(run)
        del end["state.random"]  # the Trainer's evaluation itself draws global random numbers
        ends.append(end)
    assert_same_bits(ends[1], ends[0])


class SaveAndStop(TrainerCallback):
    """Saves during a step's callbacks and stops, as enable_jit_checkpoint does on a signal."""

    trainer: Any

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            control.should_training_stop = True
            self.trainer._save_checkpoint(self.trainer.model, trial=None)


@pytest.mark.parametrize("step", [3, 5], ids=["full round", "mid-round"])
def test_resumes_from_a_save_within_a_step(tmp_path: Path, whole: Any, step: int) -> None:
    _, end = whole
    stop = SaveAndStop(step)
    stop.trainer = dropout_run(tmp_path, callbacks=[stop], save_steps=100)
    stop.trainer.train()
    resumed = dropout_run(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert_same_bits(state(resumed), end)


def test_resuming_a_finished_run_begins_a_new_round(tmp_path: Path, whole: Any) -> None:
    folder, _ = whole
    run = dropout_run(tmp_path, max_steps=16)
    run.train(resume_from_checkpoint=str(folder / "checkpoint-14"))
    assert run.fuser.round == 6
    assert run.state.global_step == 16


@pytest.mark.parametrize("saved_by", ["plain trainer", "save_only_model"])
def test_refuses_a_checkpoint_without_the_round(tmp_path: Path, saved_by: str) -> None:
    kind = Trainer if saved_by == "plain trainer" else RKIFTrainer
    trainer(tmp_path, kind=kind, **STEPS, save_only_model=saved_by == "save_only_model").train()
    checkpoint = tmp_path / "checkpoint-5"
    assert not list(checkpoint.glob("rkif*"))
    with pytest.raises(
        ValueError, match=r"checkpoint-5 with a memory: it lacks rkif_fuser\.safetensors and rkif_outer\.pt"
    ):
        trainer(tmp_path, kind=RKIFTrainer, **STEPS).train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("rkif_settings.json", lambda content: content[:-9]),
        ("rkif_settings.json", lambda content: b"[]"),
        ("rkif_settings.json", lambda content: b"[" * 100_000),
        ("rkif_outer.pt", lambda content: b""),
        ("rkif_outer.pt", lambda content: content[:300]),
        ("rkif_outer.pt", lambda content: b"plain text"),
    ],
    ids=["cut", "list", "nested", "empty", "cut", "text"],
)
def test_a_damaged_file_is_named(tmp_path: Path, whole: Any, name: str, harm: Any) -> None:
    checkpoint = tmp_path / "checkpoint-5"
    shutil.copytree(whole[0] / "checkpoint-5", checkpoint)
    (checkpoint / name).write_bytes(harm((checkpoint / name).read_bytes()))
    run = dropout_run(tmp_path)
    with pytest.raises(ValueError, match=rf"checkpoint-5/{name} is damaged: "):
        run.train(resume_from_checkpoint=str(checkpoint))


OTHER: dict[str, tuple[dict[str, Any], str, str]] = {
    "density": ({"fusion": replace(FUSION, density=0.5)}, "density=0.2", "density=0.5"),
    "rule": ({"fusion": replace(FUSION, rule="release")}, "rule='paper'", "rule='release'"),
    "Q and M": (
        {"fusion": replace(FUSION, inner_steps=2, outer_steps=1)},
        "inner_steps=3, outer_steps=2",
        "inner_steps=2, outer_steps=1",
    ),
    "outer rate": ({"outer_learning_rate": 1e-2}, "outer_learning_rate=0.003", "outer_learning_rate=0.01"),
    "memory": ({"memory_dataset": rows(4, seed=2)}, "memory samples=5", "memory samples=4"),
}


@pytest.mark.parametrize("changed", OTHER)
def test_refuses_other_settings_by_name(tmp_path: Path, whole: Any, changed: str) -> None:
    folder, _ = whole
    changes, saved, now = OTHER[changed]
    run = dropout_run(tmp_path, **changes)
    message = rf"checkpoint-5: it was saved with {saved}; this trainer has {now}"
    with pytest.raises(ValueError, match=message):
        run.train(resume_from_checkpoint=str(folder / "checkpoint-5"))


def test_warns_of_another_memory(tmp_path: Path, whole: Any) -> None:
    folder, _ = whole
    run = dropout_run(tmp_path, memory_dataset=rows(5, seed=3))
    with pytest.warns(UserWarning, match=r"memory_dataset has other samples than .*checkpoint-13 was saved"):
        run.train(resume_from_checkpoint=str(folder / "checkpoint-13"))


def test_settings_that_change_no_result_may_differ(tmp_path: Path, whole: Any) -> None:
    folder, end = whole
    run = dropout_run(tmp_path, fusion=replace(FUSION, nonfinite="skip", offload=True, missing="raise"))
    run.train(resume_from_checkpoint=str(folder / "checkpoint-13"))
    assert_same_bits(state(run), end)


def test_resumes_a_checkpoint_without_settings(tmp_path: Path, whole: Any) -> None:
    """As checkpoints of earlier versions are."""
    folder, end = whole
    shutil.copytree(folder / "checkpoint-13", tmp_path / "checkpoint-13")
    (tmp_path / "checkpoint-13" / "rkif_settings.json").unlink()
    run = dropout_run(tmp_path)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-13"))
    assert_same_bits(state(run), end)


def test_a_digest_ignores_addresses_of_objects() -> None:
    assert memory_digest([object()]) == memory_digest([object(), object()][:1])
    assert memory_digest([1, 2]) != memory_digest([1, 3])


def test_without_memory_resumes_as_the_plain_trainer(tmp_path: Path, whole: Any) -> None:
    """Without a memory the round in the checkpoint is not read."""
    folder, _ = whole
    run = dropout_run(tmp_path, memory_dataset=None)
    run.train(resume_from_checkpoint=str(folder / "checkpoint-13"))
    assert run.fuser is None
    assert run.state.global_step == 14


def test_a_new_run_does_not_resume(tmp_path: Path, whole: Any) -> None:
    """A second `train` of the same trainer starts new rounds, whatever checkpoint the first one loaded."""
    folder, _ = whole
    run = dropout_run(tmp_path)
    run.train(resume_from_checkpoint=str(folder / "checkpoint-13"))
    run.train()
    assert run._rkif.memory_position == 5 * 2 * 2


def test_a_ledger_is_continued(tmp_path: Path) -> None:
    """Resumed before the last round that the ledger has: the round is recorded again, after a return."""
    steps = {"save_strategy": "steps", "save_steps": 1}
    run = trainer(tmp_path / "run", ledger=tmp_path / "ledger", **steps)
    run.train()
    resumed = trainer(tmp_path / "resumed", ledger=tmp_path / "ledger", **steps)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-5"))
    found = list(read_ledger(tmp_path / "ledger" / "ledger.jsonl"))
    assert [r["event"] for r in found] == ["begin", *["round"] * 3, "rollback", *["round"] * 2]
    assert [r["steps"] for r in found if r["event"] == "round"] == [[0, 3], [3, 6], [6, 7], [3, 6], [6, 7]]
    assert found[-1]["parameters"] == found[3]["parameters"]
    verify(tmp_path / "ledger")
    again = trainer(tmp_path / "again", ledger=tmp_path / "ledger")
    with pytest.raises(LedgerError, match="has 3 rounds, and this fuser has ended 0"):
        again.train()
