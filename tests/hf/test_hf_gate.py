"""A gate in a Trainer: an undone round restores the whole state, and training continues or stops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import MEMORY, assert_same_bits, lora_llama, trainable, trainer, weights
from transformers import EarlyStoppingCallback

from rkif import Criterion, Gate
from rkif.hf import RKIFTrainer


def state(run: Any) -> dict[str, torch.Tensor]:
    tensors = dict(run.fuser.state_dict())
    for learner, optimizer in (("inner", run.optimizer), ("outer", run._rkif.optimizer)):
        for number, slots in optimizer.state_dict()["state"].items():
            tensors |= {f"{learner}.{number}.{name}": value for name, value in slots.items()}
    return weights(run.model) | {f"state.{name}": value for name, value in tensors.items()}


def size(model: Any) -> float:
    return float(sum(parameter.detach().abs().sum() for parameter in trainable(model)))


def gated(folder: Path, *, dropout: float = 0.0, gate: dict[str, Any], **changes: Any) -> Any:
    """A trainer whose gate measures the size of the weights."""
    model = lora_llama(dropout=dropout)
    criterion = {key: gate.pop(key) for key in ("higher_is_better", "floor", "tolerance") if key in gate}
    guard = Gate([Criterion("size", lambda: size(model), **criterion)], **gate)
    return trainer(folder, kind=RKIFTrainer, model=model, gate=guard, **changes)


def test_an_undone_round_restores_the_whole_state(tmp_path: Path) -> None:
    start = weights(lora_llama())
    run = gated(tmp_path, gate={"floor": 1e9, "tolerance": None})
    run.train()
    assert run.state.global_step == 7
    assert run.fuser.round == 3
    assert run.fuser.last_report.gate.verdict == "undo"
    assert_same_bits(weights(run.model), start)
    for optimizer in (run.optimizer, run._rkif.optimizer):
        assert not optimizer.state_dict()["state"]
    for learner in ("inner", "outer"):
        assert not any(score.any() for score in run.fuser.scores(learner).values())


def test_an_undone_round_equals_the_state_before_it(tmp_path: Path) -> None:
    """The second of three rounds ends with the state of the first, including moments and importance."""
    ends: list[dict[str, torch.Tensor]] = []
    refused = [False]

    class Watched(RKIFTrainer):
        def _close_round(self, *, tail: bool) -> None:
            rounds = self.fuser.round
            refused[0] = rounds == 1
            super()._close_round(tail=tail)
            if self.fuser.round > rounds:
                ends.append({name: tensor.clone() for name, tensor in state(self).items()})

    model = lora_llama(dropout=0.1)
    gate = Gate([Criterion("mood", lambda: 0.0 if refused[0] else 1.0, floor=0.5, tolerance=None)])
    run = trainer(tmp_path, kind=Watched, model=model, gate=gate, max_steps=9)
    run.train()
    first, second, third = ends
    changing = ("state.round", "state.gate.counters")
    assert_same_bits(
        {name: t for name, t in second.items() if name not in changing},
        {name: t for name, t in first.items() if name not in changing},
    )
    assert any(not torch.equal(third[name], second[name]) for name in weights(model))


def test_a_gate_may_stop_training(tmp_path: Path) -> None:
    start = weights(lora_llama())
    run = gated(tmp_path, gate={"floor": 1e9, "tolerance": None, "otherwise": "stop"})
    run.train()
    assert run.state.global_step == 3
    assert run.fuser.last_report.gate.verdict == "stop"
    assert_same_bits(weights(run.model), start)


def test_a_gate_that_always_keeps_changes_no_bit(tmp_path: Path) -> None:
    run = gated(tmp_path / "gated", gate={"floor": 0.0, "tolerance": None})
    free = trainer(tmp_path / "free", kind=RKIFTrainer, model=lora_llama())
    run.train()
    free.train()
    assert run.fuser.last_report.gate.verdict == "keep"
    assert_same_bits(weights(run.model), weights(free.model))


@pytest.mark.parametrize("step", [3, 5, 8, 9])
def test_resumes_to_the_same_bits(tmp_path: Path, step: int) -> None:
    steps = {"max_steps": 10, "save_strategy": "steps", "save_steps": 1, "dropout": 0.1}
    # The weights grow, which the gate accepts only in every second round.
    gate: dict[str, Any] = {"higher_is_better": False, "every": 2, "ladder": ()}
    whole = gated(tmp_path / "whole", gate=dict(gate), **steps)
    whole.train()
    assert (whole.fuser.last_report.gate.verdict, whole.fuser.round) == ("undo", 4)
    run = gated(tmp_path / "resumed", gate=dict(gate), **steps)
    run.train(resume_from_checkpoint=str(tmp_path / f"whole/checkpoint-{step}"))
    assert_same_bits(state(run), state(whole))


def test_a_gate_of_another_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="gate must be a Gate, got function"):
        trainer(tmp_path, kind=RKIFTrainer, model=lora_llama(), gate=lambda: True)


def test_a_gate_that_evaluates_changes_nothing_else_in_the_trainer(tmp_path: Path) -> None:
    """Logs, evaluations, early stopping and the best model are those of a gate that measures by itself."""
    measured: list[float] = []

    def train(folder: Path, *, by_trainer: bool) -> Any:
        def loss() -> float:
            if by_trainer:
                measured.append(run.evaluate()["eval_loss"])
            return 0.0

        run = trainer(
            folder,
            kind=RKIFTrainer,
            gate=Gate([Criterion("loss", loss, higher_is_better=False, tolerance=0.0)]),
            eval_dataset=MEMORY,
            callbacks=[EarlyStoppingCallback(early_stopping_patience=2, early_stopping_threshold=10.0)],
            max_steps=20,
            eval_strategy="steps",
            eval_steps=3,  # when a round ends
            logging_strategy="steps",
            logging_steps=1,
            save_strategy="steps",
            save_steps=3,
            load_best_model_at_end=True,
            metric_for_best_model="loss",
            greater_is_better=False,
        )
        run.train()
        return run

    expected, run = (train(tmp_path / name, by_trainer=name == "trainer") for name in ("alone", "trainer"))
    assert len(measured) == 4  # the start, and the fusions of three rounds
    assert run.state.global_step == expected.state.global_step == 9  # the first evaluation was the best
    timed = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
    timed |= {"train_runtime", "train_samples_per_second", "train_steps_per_second"}
    logs = [
        [{key: value for key, value in entry.items() if key not in timed} for entry in one.state.log_history]
        for one in (run, expected)
    ]
    assert logs[0] == logs[1]
    assert sum("eval_loss" in entry for entry in logs[0]) == 3
    assert Path(run.state.best_model_checkpoint).name == Path(expected.state.best_model_checkpoint).name
    assert_same_bits(weights(run.model), weights(expected.model))
