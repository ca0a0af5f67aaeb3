"""`RKIFTrainer` behaves as transformers' Trainer does: both are compared.

The tests of transformers and trl are not part of their wheels. So each case here trains the installed
version's Trainer and `RKIFTrainer` on the same data. Without a memory everything is equal: weights, logs,
state, events and files of checkpoints. With a memory everything is equal that the new data alone determines:
events, counters, learning rates, evaluations by step, files of checkpoints, and the logs up to the first
fusion.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_helpers import FUSION, MEMORY, NEW, assert_same_bits, lora_llama, rows, trainer, weights
from torch.utils.data import IterableDataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from rkif.hf import RKIFTrainer

EVERY_STEP = {"logging_strategy": "steps", "logging_steps": 1}
TIMED = ("_runtime", "_per_second")


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(NEW)


class Events(TrainerCallback):
    """Every event with the step, the flags of `control` and the logged names, without the logs of rounds."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_") or name == "on_fusion":
            return super().__getattribute__(name)

        def record(args: Any, state: Any, control: Any, **given: Any) -> None:
            logged = sorted(given.get("logs") or ())
            if not any(key.startswith("rkif/") for key in logged):
                flags = [flag for flag, value in sorted(vars(control).items()) if value is True]
                self.seen.append((name, state.global_step, state.epoch, flags, logged))

        return record


def accuracy(prediction: Any) -> dict[str, float]:
    chosen, labels = prediction.predictions.argmax(-1), prediction.label_ids
    return {"accuracy": float((chosen == labels)[labels != -100].mean())}


def squared(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    return outputs.logits.square().mean()


def fresh_model() -> Any:
    return lora_llama(dropout=0.1)


EVALUATED = {"eval_dataset": rows(5, seed=5), "eval_strategy": "steps", "eval_steps": 2}
SAVED = {"save_strategy": "steps", "save_steps": 2}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 3, "max_grad_norm": 0.05, "weight_decay": 0.1},
    "epochs": {"num_train_epochs": 2, "max_steps": -1, "per_device_train_batch_size": 5},
    "last batch dropped": {
        "num_train_epochs": 2,
        "max_steps": -1,
        "per_device_train_batch_size": 5,
        "dataloader_drop_last": True,
    },
    "label smoothing": {"label_smoothing_factor": 0.1},
    "noisy embeddings": {"neftune_noise_alpha": 5.0},
    "stream": {"train_dataset": Stream()},
    "counters": {"include_num_input_tokens_seen": "all", "logging_first_step": True, "logging_steps": 3},
    "own loss": {"compute_loss_func": squared},
    "own data seed": {"data_seed": 11},
    "own optimizer": {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9})},
    "bfloat16": {"bf16": True},
    "evaluated": {**EVALUATED, "compute_metrics": accuracy, "eval_on_start": True},
    "two sets": {**EVALUATED, "eval_dataset": {"a": rows(3, seed=5), "b": rows(3, seed=6)}},
    "plateau": {**EVALUATED, "lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": "loss"},
    "best model": {**EVALUATED, **SAVED, "load_best_model_at_end": True, "save_total_limit": 2},
    "early stopping": {
        **EVALUATED,
        **SAVED,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "callbacks": (EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=9.0),),
    },
    "saved by epoch": {
        "num_train_epochs": 2,
        "max_steps": -1,
        "save_strategy": "epoch",
        "per_device_train_batch_size": 8,
    },
    "model_init": {"model_init": fresh_model},
}


def without_times(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if not name.endswith(TIMED)}


def train(folder: Path, kind: Any, case: str, **changes: Any) -> Any:
    """A finished training, with its events; it has evaluated and predicted after training, too."""
    given = {**EVERY_STEP, **CASES[case], **changes}
    events = Events()
    given["callbacks"] = [*copy.deepcopy(given.get("callbacks", ())), events]
    if "model_init" not in given:
        given["model"] = fresh_model()
    run = trainer(folder, kind=kind, **given)
    run.output = run.train()
    run.predicted = run.predict(rows(3, seed=7))
    run.events = events.seen
    return run


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def stored_state(folder: Path) -> dict[str, Any]:
    """The state of the last checkpoint, without times, the folder's name and the callbacks' own states."""
    path = max(folder.glob("checkpoint-*"), key=lambda found: int(found.name.partition("-")[2]))
    text = (path / "trainer_state.json").read_text().replace(str(folder), "FOLDER")
    state = json.loads(text)
    state["log_history"] = [without_times(log) for log in state["log_history"]]
    return dict(state)


@pytest.mark.parametrize("case", CASES)
def test_without_a_memory_everything_is_equal(tmp_path: Path, case: str) -> None:
    plain = train(tmp_path / "plain", Trainer, case)
    run = train(tmp_path / "run", RKIFTrainer, case, memory_dataset=None)
    assert_same_bits(weights(run.model), weights(plain.model))
    assert [without_times(log) for log in run.state.log_history] == [
        without_times(log) for log in plain.state.log_history
    ]
    assert run.events == plain.events
    assert without_times(run.output.metrics) == without_times(plain.output.metrics)
    assert np.array_equal(run.predicted.predictions, plain.predicted.predictions)
    assert files(tmp_path / "run") == files(tmp_path / "plain")
    if list((tmp_path / "run").glob("checkpoint-*")):
        assert stored_state(tmp_path / "run") == stored_state(tmp_path / "plain")


def rates(run: Any) -> list[Any]:
    return [(log["step"], log["learning_rate"]) for log in run.state.log_history if "loss" in log]


def evaluations(run: Any) -> list[Any]:
    logs = (log for log in run.state.log_history if any(name.startswith("eval_") for name in log))
    return [(log["step"], sorted(log)) for log in logs]


def early(run: Any) -> list[Any]:
    """The logs of steps up to the first fusion."""
    logs = (log for log in run.state.log_history if "loss" in log)
    return [without_times(log) for log in logs if log["step"] <= FUSION.inner_steps]


# Where the loss decides on the rate or on the end, a fusion may change them.
BY_LOSS = ("plateau",)


@pytest.mark.parametrize("case", CASES)
def test_with_a_memory_the_trainer_sees_the_same_training(tmp_path: Path, case: str) -> None:
    plain = train(tmp_path / "plain", Trainer, case)
    run = train(tmp_path / "run", RKIFTrainer, case, memory_dataset=MEMORY, fusion=FUSION)
    assert run.state.global_step == {"early stopping": 4}.get(case, plain.state.max_steps)
    assert run.fuser.round == -(-run.state.global_step // FUSION.inner_steps)
    assert run.events == plain.events
    for name in ("global_step", "max_steps", "epoch", "num_input_tokens_seen", "total_flos"):
        assert getattr(run.state, name) == getattr(plain.state, name), name
    assert evaluations(run) == evaluations(plain)
    if case not in BY_LOSS:
        assert rates(run) == rates(plain)
    assert early(run) == early(plain)
    added = {name for name in files(tmp_path / "run") if "/rkif_" in name}
    assert set(files(tmp_path / "run")) - added == set(files(tmp_path / "plain"))
