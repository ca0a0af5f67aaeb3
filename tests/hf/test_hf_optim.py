"""`RKIFTrainer` with `rkif.optim.AdamW`: the same bits as with observing apart, resumed ones too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import assert_same_bits, trainer, weights

import rkif

FUSED: dict[str, Any] = {"optimizer_cls_and_kwargs": (rkif.optim.AdamW, {"lr": 1e-2})}


def end(run: Any) -> dict[str, torch.Tensor]:
    return weights(run.model) | {f"fuser.{name}": value for name, value in run.fuser.state_dict().items()}


def test_the_same_bits_as_observing_apart_and_when_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tmp_path / "fused", save_strategy="steps", save_steps=1, **FUSED)
    run.train()
    assert run.optimizer.optimizer.fuser is run.fuser
    assert run._rkif.optimizer.fuser is run.fuser
    assert run.fuser.round == 3  # of 7 steps by 3
    fused = end(run)

    resumed = trainer(tmp_path / "resumed", **FUSED)
    resumed.train(resume_from_checkpoint=str(tmp_path / "fused" / "checkpoint-5"))
    assert_same_bits(end(resumed), fused)

    monkeypatch.setattr("rkif.hf.rounds._observing", lambda _: None)
    apart = trainer(tmp_path / "apart", **FUSED)
    apart.train()
    assert apart.optimizer.optimizer.fuser is None
    assert_same_bits(end(apart), fused)
