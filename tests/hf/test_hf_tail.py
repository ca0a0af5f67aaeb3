"""The tail of `rkif.hf`: the unfinished round when training stops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_helpers import NEW, Stop, assert_at_base, assert_same_bits, lora_llama, rows, trainer, weights
from torch import Tensor
from transformers import TrainerCallback

EVALUATED = {"eval_strategy": "steps", "save_strategy": "steps", "eval_dataset": rows(4, seed=5)}


@pytest.mark.parametrize(("steps", "rounds"), [(6, 2), (7, 3), (2, 1)])
def test_the_last_steps_are_fused_and_in_the_last_checkpoint(tmp_path: Any, steps: int, rounds: int) -> None:
    run = trainer(tmp_path, max_steps=steps, save_strategy="steps", save_steps=100)
    run.train()
    assert run.fuser.round == rounds
    assert run.fuser.inner_observed == 0
    assert_at_base(run)
    assert_same_bits(weights(lora_llama(adapter=tmp_path / f"checkpoint-{steps}")), weights(run.model))


def test_the_tail_is_fused_when_a_callback_stops(tmp_path: Any) -> None:
    """For any callback the tail is fused as at the last step, also with a partly accumulated gradient."""
    ends = []
    for event in ("on_step_end", "on_substep_end", "on_epoch_end"):  # four steps of three are an epoch
        folder = tmp_path / event
        steps = {"max_steps": 14, "gradient_accumulation_steps": 3, "save_strategy": "epoch"}
        run = trainer(folder, **steps, lr_scheduler_type="constant")
        run.add_callback(Stop(event, 4))  # runs after the trainer's own callbacks
        run.train()
        assert run.state.global_step == 4
        assert run.fuser.round == 2
        assert_at_base(run)
        assert_same_bits(weights(lora_llama(adapter=folder / "checkpoint-4")), weights(run.model))
        ends.append(weights(run.model))
    assert_same_bits(ends[1], ends[0])
    assert_same_bits(ends[2], ends[0])


@pytest.mark.parametrize("event", ["on_log", "on_save"])
@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_the_tail_is_fused_when_the_last_callback_stops(tmp_path: Any, event: str, strategy: str) -> None:
    kinds = {"logging_strategy": strategy, "save_strategy": strategy, "logging_steps": 4, "save_steps": 4}
    stop = Stop(event, 4)
    run = trainer(tmp_path, callbacks=[stop], max_steps=14, gradient_accumulation_steps=3, **kinds)
    run.train()
    assert run.state.global_step == 4
    assert run.fuser.round == 2
    assert_at_base(run)


@pytest.mark.parametrize("best", [False, True], ids=["last model", "best model"])
def test_the_tail_is_in_the_checkpoint_when_an_evaluation_stops(tmp_path: Any, best: bool) -> None:
    """The tail is in the checkpoint, unless the measured checkpoint may be the best."""
    measured: dict[int, dict[str, Tensor]] = {}

    class Measure(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            measured[state.global_step] = weights(kwargs["model"])

    callbacks = [Stop("on_evaluate", 4), Measure()]
    run = trainer(
        tmp_path, **EVALUATED, eval_steps=4, save_steps=4, callbacks=callbacks, load_best_model_at_end=best
    )
    run.train()
    assert run.state.global_step == 4
    saved = weights(lora_llama(adapter=tmp_path / "checkpoint-4"))
    assert_same_bits(weights(run.model), saved)
    assert all(torch.equal(p, measured[4][name]) for name, p in saved.items()) == best
    if best:
        assert run.state.best_model_checkpoint.endswith("checkpoint-4")
    else:
        assert run.fuser.round == 2
        assert_at_base(run)


RISING = {"learning_rate": 0.3, "warmup_steps": 0}  # every step makes it worse


def test_nothing_is_fused_into_the_best_model(tmp_path: Any) -> None:
    run = trainer(tmp_path, **EVALUATED, eval_steps=2, save_steps=2, load_best_model_at_end=True, **RISING)
    run.train()
    best = run.state.best_model_checkpoint
    assert best.endswith("checkpoint-2")
    assert_same_bits(weights(run.model), weights(lora_llama(adapter=best)))


def test_nothing_is_fused_into_the_best_model_with_a_round_open(tmp_path: Any) -> None:
    """An epoch of four steps stops training after the last event that would close the round."""
    kinds = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    run = trainer(tmp_path, **EVALUATED | kinds, train_dataset=NEW[:8], callbacks=[Stop("on_save", 4)])
    run.train()
    best = run.state.best_model_checkpoint
    assert best.endswith("checkpoint-4")
    assert run.fuser.inner_observed == 1
    assert_same_bits(weights(run.model), weights(lora_llama(adapter=best)))
