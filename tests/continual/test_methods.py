"""Training on one task: learners, batches, learning rates and rounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_inputs import TASKS, one_task
from transformers import (
    AutoTokenizer,
)

import rkif
from rkif.continual.config import RunConfig
from rkif.continual.methods import METHODS


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_outer_learner_moves_by_its_own_learning_rate(
    config: Callable[..., RunConfig], inputs: Path, precision: str
) -> None:
    """In the released code the outer optimizer is never stepped, or has learning rate zero."""
    norms = {}
    for rate in (1e-3, 1e-2):
        method = one_task(config(precision=precision, outer={"learning_rate": rate}), inputs)
        for step in range(3):
            method.train_step(step)
        assert method.fuser is not None
        report = method.fuser.last_report
        assert report is not None
        norms[rate] = report.norms
    assert norms[1e-3]["inner"] == norms[1e-2]["inner"]
    # Adam's first steps have the length of the learning rate.
    assert norms[1e-2]["outer"] / norms[1e-3]["outer"] == pytest.approx(10, rel=0.2)


def test_the_last_round_of_a_task_is_fused_too(config: Callable[..., RunConfig], inputs: Path) -> None:
    method = one_task(config(), inputs)
    rounds = []
    assert method.fuser is not None
    for step in range(7):  # Q = 3: rounds end after steps 3, 6 and, with one step, 7
        method.train_step(step)
        rounds.append(method.fuser.round)
    assert rounds == [0, 0, 1, 1, 1, 2, 3]


@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_micro_batches_give_the_gradient_of_the_batch(
    config: Callable[..., RunConfig], inputs: Path, architecture: str
) -> None:
    """Answers differ in length, so the mean over all tokens is not the mean of the micro-batch means."""
    gradients = []
    for size in (None, 3, 1):
        settings = config(
            model=str(inputs / ("model" if architecture == "llama" else "t5")),
            architecture="causal" if architecture == "llama" else "seq2seq",
            adapter=None,
            training={"steps": 1, "micro_batch_size": size, "max_grad_norm": 1e9},
        )
        method = one_task(settings, inputs)
        items = method.batch(0)
        items = [
            (text, type(r)(r.task, r.id, r.input, f"{r.output} " * (i + 1)))
            for i, (text, r) in enumerate(items)
        ]
        parameters = list(method.context.model.parameters())
        method.context.model.eval()
        kept: list[torch.Tensor] = []
        method.inner.step(
            items,
            lr_fraction=1.0,
            seed=0,
            before_step=lambda kept=kept, ps=parameters: kept.extend(p.grad.clone() for p in ps),
        )
        gradients.append(torch.cat([g.flatten() for g in kept]))
    assert gradients[0].norm() > 0
    tolerance = 1e-5 * gradients[0].abs().max().item()
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=0, atol=tolerance)


def test_gradient_checkpointing_gives_the_same_bits(config: Callable[..., RunConfig], inputs: Path) -> None:
    weights = []
    for checkpointing in (False, True):
        training = {"steps": 7, "gradient_checkpointing": checkpointing}
        method = one_task(config(training=training), inputs)
        for step in range(4):
            method.train_step(step)
        weights.append([p.detach().clone() for p in method.context.model.parameters()])
    assert all(map(torch.equal, *weights))


def test_the_schedule_warms_up_and_never_reaches_zero(config: Callable[..., RunConfig], inputs: Path) -> None:
    method = one_task(config(training={"steps": 10, "warmup_steps": 4}), inputs)
    fractions = [method.lr_fraction(step) for step in range(10)]
    assert fractions == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


def test_epochs_are_rounded_up_to_steps(config: Callable[..., RunConfig], inputs: Path) -> None:
    for epochs, steps in ((1, 14), (0.1, 2), (2.5, 34)):  # 40 records in batches of 3
        method = one_task(config(training={"epochs": epochs, "batch_size": 3}), inputs)
        assert method.context.steps == steps == math.ceil(epochs * 40 / 3)


def test_every_record_is_used_once_per_epoch(config: Callable[..., RunConfig], inputs: Path) -> None:
    method = one_task(config(training={"steps": 9, "batch_size": 10}), inputs)
    epochs = [[r.id for step in range(4 * e, 4 * e + 4) for _, r in method.batch(step)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(r.id for r in method.context.task.train)
    assert epochs[0] != epochs[1]


def test_training_reduces_the_loss(config: Callable[..., RunConfig], inputs: Path, tmp_path: Path) -> None:
    """The training loss falls to nearly zero."""
    settings = config(adapter=None, training={"steps": 60, "batch_size": 8, "learning_rate": 3e-3})
    method = one_task(settings, inputs)
    losses = [method.inner.step(method.batch(0), lr_fraction=1.0, seed=step) for step in range(60)]
    assert losses[0] > 1
    assert losses[-1] < 0.05


def test_tokenizer_of_the_inputs_knows_the_answers(inputs: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(inputs / "model")
    assert (
        tokenizer.unk_token_id not in tokenizer("good bad past present future kitchen Answer:")["input_ids"]
    )


def test_recurrent_kif_equals_a_plain_loop_with_a_fuser(
    config: Callable[..., RunConfig], inputs: Path
) -> None:
    """Seven steps, compared with explicit batches, learning rates, clipping, optimizers and rounds."""
    settings = config(
        training={"steps": 7, "batch_size": 4, "learning_rate": 1e-2, "warmup_steps": 2, "weight_decay": 0.1,
                  "max_grad_norm": 0.5},
        outer={"batch_size": 3, "learning_rate": 3e-2},
        fusion={"preset": "paper", "density": 0.3, "inner_steps": 3, "outer_steps": 2, "scope": "tensor"},
    )  # fmt: skip
    method = one_task(settings, inputs)
    plain = one_task(settings, inputs).context
    model, parameters = plain.model, [p for p in plain.model.parameters() if p.requires_grad]
    inner = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    outer = torch.optim.AdamW(parameters, lr=3e-2, weight_decay=0.1)
    fuser = rkif.Fuser(model, rkif.FusionConfig.paper(density=0.3, scope="tensor"))
    norms = []

    def step(optimizer: torch.optim.Optimizer, items: Any, rate: float, seed: int) -> None:
        torch.manual_seed(seed)
        model.train()
        model(**plain.objective.collate(items)).loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, 0.5).item())
        fuser.observe()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()

    fractions = [1 / 3, 2 / 3, 1.0, 0.8, 0.6, 0.4, 0.2]
    walk = 0
    for index, fraction in enumerate(fractions):
        step(inner, method.batch(index), 1e-2 * fraction, method.seed("inner", index))
        if index in (2, 5, 6):
            with fuser.outer():
                for _ in range(2):
                    items = plain.memory.batch(walk, 3, seed=method.seed("memory"))
                    step(outer, items, 3e-2 * fraction, method.seed("outer", walk))
                    walk += 1
        method.train_step(index)
    assert max(norms) > 0.5 > 0  # gradients were clipped
    trained = [p for p in method.context.model.parameters() if p.requires_grad]
    assert all(map(torch.equal, trained, parameters))
    assert method.samples == 7 * 4 + 6 * 3
    scores = fuser.scores("outer")
    assert all(torch.equal(method.importance()[name], scores[name]) for name in scores)


def test_replay_adds_memory_records_to_every_batch(config: Callable[..., RunConfig], inputs: Path) -> None:
    settings = config(training={"steps": 6, "batch_size": 4}, outer={"batch_size": 4})
    context = one_task(settings, inputs).context
    replay = METHODS["replay"](context)
    batches = [replay.batch(step) for step in range(6)]
    remembered = [item for items in batches for item in items[4:]]
    assert [len(items) for items in batches] == [6, 7, 7] * 2  # 8 memory records in 3 steps
    assert {record.task for _, record in remembered} == {TASKS[0]}
    assert sorted(record.id for _, record in remembered[:4]) == sorted(context.memory.ids[TASKS[0]])
    assert all(record.task == TASKS[1] for items in batches for _, record in items[:4])


def test_dropout_differs_from_step_to_step(config: Callable[..., RunConfig], inputs: Path) -> None:
    method = one_task(config(adapter={"r": 4, "dropout": 0.5}), inputs)
    items = method.batch(0)
    seeds = [method.seed("inner", 0), method.seed("inner", 1), method.seed("outer", 0)]
    assert len(set(seeds)) == 3
    for _ in range(2):  # B starts at zero, so dropout has no effect before the first step
        method.inner.step(items, lr_fraction=1.0, seed=0)
    losses = [method.inner.step(items, lr_fraction=0.0, seed=seed) for seed in (*seeds, seeds[0])]
    assert losses[0] == losses[3]
    assert len(set(losses)) == 3


def test_autocast_changes_the_loss(config: Callable[..., RunConfig], inputs: Path) -> None:
    losses = {}
    for precision in ("float32", "bfloat16"):
        method = one_task(config(precision=precision, adapter=None), inputs)
        losses[precision] = method.inner.step(method.batch(0), lr_fraction=1.0, seed=0)
        assert all(p.dtype == torch.float32 for p in method.context.model.parameters())
    assert losses["float32"] != losses["bfloat16"]
    assert losses["float32"] == pytest.approx(losses["bfloat16"], rel=0.02)
