"""`rkif.hf` under autocast and a gradient scaler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_helpers import (
    OverflowingTrainer,
    assert_same_bits,
    lora_llama,
    plain_loop,
    scale_losses,
    trainable,
    trainer,
    weights,
)

from rkif import FusionConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("precision", DTYPES)
def test_outer_learning_rate_sets_the_outer_task_vector(tmp_path: Any, precision: str) -> None:
    norms = []
    for rate in (1e-4, 1e-3):
        run = trainer(
            tmp_path,
            outer_learning_rate=rate,
            fusion=FusionConfig.paper(inner_steps=8, outer_steps=4),
            lr_scheduler_type="constant",
            max_steps=8,
            bf16=precision == "bf16",
        )
        if precision == "fp16":
            scale_losses(run, autocast=True)
        logits = set()
        head = run.model.get_base_model().lm_head
        head.register_forward_hook(lambda _module, _inputs, output, seen=logits: seen.add(output.dtype))
        run.train()
        assert logits == {DTYPES[precision]}
        for optimizer, steps in ((run.optimizer.optimizer, 8), (run._rkif.optimizer, 4)):
            assert all(optimizer.state[p]["step"] == steps for p in trainable(run.model))
        norms.append(run.fuser.last_report.norms)
    assert norms[0]["inner"] == norms[1]["inner"] > 0.1
    assert 9 < norms[1]["outer"] / norms[0]["outer"] < 11


class EarlierTrainer(OverflowingTrainer):
    """Leaves unclipped gradients scaled, as the Trainer of transformers 5.0 did."""

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        return grad_norm


# With 3 inner and 2 outer steps per round: an inner step, and the first outer step of the second round.
OVERFLOWS = frozenset({1, 9})


@pytest.mark.parametrize("kind", [OverflowingTrainer, EarlierTrainer])
@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused"])
@pytest.mark.parametrize("overflows", [frozenset(), OVERFLOWS], ids=["no overflow", "overflows"])
def test_the_loss_scale_changes_no_bit(
    tmp_path: Any, kind: Any, clip: float, optimizer: str, overflows: frozenset[int]
) -> None:
    """A loss scale of a power of two changes no bit of weights and importance; overflows are skipped."""
    run = trainer(tmp_path, kind=kind, max_grad_norm=clip, optim=optimizer)
    scale_losses(run, autocast=False)
    run.overflows = overflows
    run.train()
    model = lora_llama()
    fuser = plain_loop(model, run.args, overflows=overflows)
    assert_same_bits(weights(run.model), weights(model))
    for learner in ("inner", "outer"):
        assert_same_bits(run.fuser.scores(learner), fuser.scores(learner))
    assert run.fuser.last_report == fuser.last_report
    assert run.calls == 7 + 2 * fuser.round + len(overflows & {9})  # an overflowed outer step is repeated
    assert run.accelerator.scaler.get_scale() == 2.0 ** (16 - len(overflows))


def test_endless_overflows_are_an_error(tmp_path: Any) -> None:
    run = scale_losses(trainer(tmp_path, kind=OverflowingTrainer), autocast=False)
    run.overflows = frozenset(range(3, 100))
    with pytest.raises(RuntimeError, match="17 outer steps of a round had gradients that are not finite"):
        run.train()


def test_a_huge_finite_gradient_is_no_overflow(tmp_path: Any) -> None:
    """Only the square of the gradient overflows, and nothing needs the square."""
    run = scale_losses(trainer(tmp_path, kind=EarlierTrainer, max_grad_norm=0.0), autocast=False)
    run.overflows, run.gradient = OVERFLOWS, 1e30
    run.train()
    assert run.calls == 7 + 2 * 3
    assert run.accelerator.scaler.get_scale() == 2.0**16
