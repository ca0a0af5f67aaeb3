"""`RKIFTrainer` with `rkif.optim.AdamW`: the bits of a separate observe(), also when resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import assert_same_bits, trainer, weights

import rkif

FUSED: dict[str, Any] = {"optimizer": "rkif_adamw"}


def end(run: Any) -> dict[str, torch.Tensor]:
    return weights(run.model) | {f"fuser.{name}": value for name, value in run.fuser.state_dict().items()}


def test_the_bits_are_those_of_a_separate_observe_also_when_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tmp_path / "fused", save_strategy="steps", save_steps=1, **FUSED)
    run.train()
    assert isinstance(run.optimizer.optimizer, rkif.optim.AdamW)
    assert run.optimizer.optimizer.fuser is run.fuser
    assert run._rkif.optimizer.fuser is run.fuser
    assert run.fuser.round == 3  # of 7 steps by 3
    fused = end(run)

    resumed = trainer(tmp_path / "resumed", **FUSED)
    resumed.train(resume_from_checkpoint=str(tmp_path / "fused" / "checkpoint-5"))
    assert_same_bits(end(resumed), fused)

    monkeypatch.setattr("rkif.hf.rounds._observing", lambda _: None)
    separate = trainer(tmp_path / "separate", **FUSED)
    separate.train()
    assert separate.optimizer.optimizer.fuser is None
    assert_same_bits(end(separate), fused)


def test_settings_are_those_of_the_arguments(tmp_path: Path) -> None:
    settings = {"learning_rate": 3e-4, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6}
    run = trainer(tmp_path, weight_decay=0.1, memory_dataset=None, **settings, **FUSED)
    group = run.create_optimizer().param_groups[0]
    assert (group["lr"], group["betas"], group["eps"]) == (3e-4, (0.8, 0.95), 1e-6)
    assert group["weight_decay"] == 0.1
    run.args.learning_rate, run.optimizer = 1e-3, None  # as between the trials of a hyperparameter search
    assert run.create_optimizer().param_groups[0]["lr"] == 1e-3


def test_conflicting_and_unknown_optimizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="optimizer must be 'rkif_adamw' or None"):
        trainer(tmp_path, optimizer="adamw")
    with pytest.raises(ValueError, match="and optimizer_cls_and_kwargs both choose an optimizer"):
        trainer(tmp_path, optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 1e-2}), **FUSED)
    made = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match="and optimizers both choose an optimizer"):
        trainer(tmp_path, optimizers=(made, None), **FUSED)
