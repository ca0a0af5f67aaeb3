"""``rkif.Fuser``: rounds in a training loop."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from fuser_loop import Loop, batch, make_model, poisoned_loop, train
from torch import Tensor, nn

import rkif
from rkif import Fuser, FusionConfig
from rkif_kernels import ImportanceInputs, Smoothing
from rkif_kernels.backends import reference

PRESETS = [FusionConfig.paper(), FusionConfig.release()]
presets = pytest.mark.parametrize("config", PRESETS, ids=["paper", "release"])


def naive_round(
    model: nn.Module, config: FusionConfig, carried: dict[str, list[Tensor]] | None
) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """One round by the paper's formulas, for each tensor, without rkif."""
    parameters = list(model.parameters())
    inner_optimizer = torch.optim.SGD(parameters, lr=0.1)
    outer_optimizer = torch.optim.SGD(parameters, lr=0.3)
    keep, take = torch.tensor(config.beta1), torch.tensor(1 - config.beta1)
    zeros = [torch.zeros_like(p) for p in parameters]
    state = {
        "s_in": [z.clone() for z in zeros],
        "u_in": [z.clone() for z in zeros],
        "s_out": [z.clone() for z in zeros] if carried is None else carried["s_out"],
        "u_out": [z.clone() for z in zeros] if carried is None else carried["u_out"],
    }

    def learn(optimizer: torch.optim.Optimizer, steps: range, sign: int, s: str, u: str) -> list[Tensor]:
        for step in steps:
            (sign * model(batch(step))).exp().mean().backward()
            for i, p in enumerate(parameters):
                assert p.grad is not None
                importance = (p * p.grad).abs().detach()
                state[s][i] = keep * state[s][i] + take * importance
                state[u][i] = keep * state[u][i] + take * (importance - state[s][i]).abs()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach().clone() for p in parameters]

    base = [p.detach().clone() for p in parameters]
    inner = learn(inner_optimizer, range(5), 1, "s_in", "u_in")
    outer = learn(outer_optimizer, range(100, 103), -1, "s_out", "u_out")

    def mask(s: str, u: str) -> list[Tensor]:
        scores = [a * b if config.uses_uncertainty else a for a, b in zip(state[s], state[u], strict=True)]
        flat = torch.cat([score.flatten() for score in scores]).sort().values
        limit = flat[math.floor(round(0.8 * (len(flat) - 1), 9))]
        return [score > limit for score in scores]

    fused = []
    for b, i, o, m_in, m_out in zip(
        base, inner, outer, mask("s_in", "u_in"), mask("s_out", "u_out"), strict=True
    ):
        if config.rule == "paper":
            w_in, w_out = m_in.float(), m_out.float()
        else:
            w_in = torch.where(m_in & m_out, 0.4, torch.where(m_in, 1.0, torch.where(m_out, 0.0, 0.5)))
            w_out = torch.where(m_in & m_out, 0.6, torch.where(m_out, 1.0, torch.where(m_in, 0.0, 0.5)))
        fused.append((b + w_in * (i - b)) + w_out * (o - i))
    with torch.no_grad():
        for p, value in zip(parameters, fused, strict=True):
            p.copy_(value)
    return fused, state


@presets
def test_two_rounds_equal_a_transcription_of_the_method(config: FusionConfig) -> None:
    model, plain = make_model(), make_model()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    outer = torch.optim.SGD(model.parameters(), lr=0.3)
    fuser = Fuser(model, config)
    carried = None
    for _ in range(2):
        train(model, fuser, inner, range(5), 1)
        with fuser.outer() as same:
            assert same is fuser
            train(model, fuser, outer, range(100, 103), -1)
        expected, carried = naive_round(plain, config, carried)
        for parameter, value in zip(model.parameters(), expected, strict=True):
            assert torch.equal(parameter, value)
        report = fuser.last_report
        assert report is not None
        assert sum(report.counts.values()) == report.numel == 65
        # 65 scores, density 0.2: k = 51, so 13 scores are above the threshold
        assert report.counts["inner_only"] + report.counts["both"] == 13
        assert report.norms["outer"] > 0
    assert fuser.round == 2


def test_separate_calls_equal_the_with_block() -> None:
    one, other = Loop(FusionConfig()), Loop(FusionConfig())
    one.run(range(7))
    train(other.model, other.fuser, other.inner, range(3), 1)
    with other.fuser.outer():
        train(other.model, other.fuser, other.outer, range(4, 6), -1)
    assert all(map(torch.equal, one.weights(), other.weights()))
    assert one.fuser.last_report == other.fuser.last_report


def test_scores_are_copies_with_the_shapes_of_the_parameters() -> None:
    loop = Loop(FusionConfig(state_dtype=torch.bfloat16))
    loop.run(range(2))
    scores = loop.fuser.scores("inner")
    assert {name: score.shape for name, score in scores.items()} == {
        name: p.shape for name, p in loop.model.named_parameters()
    }
    assert all(score.dtype == torch.float32 for score in scores.values())
    for score in scores.values():
        score.fill_(-1)
    assert all((score >= 0).all() for score in loop.fuser.scores("inner").values())
    with pytest.raises(ValueError, match="learner must be 'inner' or 'outer'; got 'both'"):
        loop.fuser.scores("both")


def test_observe_updates_the_learner_of_the_current_phase() -> None:
    loop = Loop(FusionConfig.paper())
    loop.run(range(3))
    assert (loop.fuser.inner_observed, loop.fuser.outer_observed) == (3, 0)
    assert not any(score.any() for score in loop.fuser.scores("outer").values())
    inner = loop.fuser.scores("inner")
    loop.run(range(3, 6))
    assert (loop.fuser.inner_observed, loop.fuser.outer_observed) == (3, 2)
    assert all(torch.equal(loop.fuser.scores("inner")[name], inner[name]) for name in inner)
    assert any(score.any() for score in loop.fuser.scores("outer").values())


def test_frozen_parameters_are_ignored() -> None:
    model = make_model()
    model[0].weight.requires_grad_(False)
    frozen = model[0].weight.clone()
    fuser = Fuser(model, FusionConfig())
    assert set(fuser.scores("inner")) == {"0.bias", "2.weight", "2.bias"}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    train(model, fuser, optimizer, range(2), 1)
    with fuser.outer():
        train(model, fuser, optimizer, range(2), -1)
    assert torch.equal(model[0].weight, frozen)


def test_parameters_may_be_given_by_name() -> None:
    model = make_model()
    fuser = Fuser(((f"model.{name}", p) for name, p in model.named_parameters()), FusionConfig())
    assert next(iter(fuser.scores("inner"))) == "model.0.weight"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models_are_fused(dtype: torch.dtype) -> None:
    model = make_model(dtype=dtype)
    fuser = Fuser(model, FusionConfig.paper())
    start = {name: p.detach().clone() for name, p in model.named_parameters()}

    def learn(steps: range, sign: int) -> dict[str, Tensor]:
        for step in steps:
            (sign * model(batch(step).to(dtype))).exp().mean().backward()
            fuser.observe()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad
                    p.grad = None
        return {name: p.detach().clone() for name, p in model.named_parameters()}

    inner = learn(range(3), 1)
    inner_scores = fuser.scores("inner")
    fuser.begin_outer()
    outer = learn(range(3), -1)
    expected = rkif.fuse(start, inner, outer, inner_scores, fuser.scores("outer"))
    assert fuser.fuse() == expected.report
    for name, p in model.named_parameters():
        assert p.dtype == dtype
        assert torch.equal(p, expected.params[name])


def test_a_gradient_missing_in_one_step_counts_as_zero() -> None:
    p, other = nn.Parameter(torch.tensor([2.0])), nn.Parameter(torch.ones(1))
    fuser = Fuser([("p", p), ("other", other)], FusionConfig.paper(beta1=0.5))
    p.grad = other.grad = torch.tensor([3.0])
    fuser.observe()
    p.grad = None
    fuser.observe()
    assert fuser.scores("inner")["p"].item() == 0.5 * (0.5 * 6.0)


def test_a_sparse_gradient_is_refused_by_name() -> None:
    model = nn.Embedding(5, 3, sparse=True)
    fuser = Fuser(model, FusionConfig())
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match=r"grads\['weight'\] must be a dense tensor; got layout"):
        fuser.observe()


def test_a_parameter_without_any_gradient_in_a_round_is_named() -> None:
    model = make_model()
    fuser = Fuser(model, FusionConfig())
    model[2].bias.register_hook(lambda gradient: gradient)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step() -> None:
        model(batch(0)).sum().backward()
        model[0].weight.grad = None
        fuser.observe()
        optimizer.step()
        optimizer.zero_grad()

    step()
    fuser.begin_outer()
    step()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(
        ValueError, match=r"parameter '0.weight' had no gradient in any observe\(\) of this round"
    ):
        fuser.fuse()
    assert all(map(torch.equal, model.parameters(), before))
    assert fuser.phase == "outer"


def test_a_nonfinite_gradient_raises_at_the_fusion_and_changes_nothing() -> None:
    loop = poisoned_loop("raise")
    before, state = loop.weights(), loop.fuser.state_dict()
    with pytest.raises(RuntimeError, match="1 elements had a non-finite importance"):
        loop.fuser.fuse()
    assert all(map(torch.equal, loop.weights(), before))
    after = loop.fuser.state_dict()
    assert all(torch.equal(after[name], state[name]) for name in state)
    loop.fuser.rollback()
    loop.run(range(7))
    assert loop.fuser.last_report is not None
    assert loop.fuser.last_report.nonfinite == 0


def test_a_nonfinite_gradient_can_skip_the_fusion() -> None:
    loop = poisoned_loop("skip")
    start = Loop(FusionConfig()).weights()
    report = loop.fuser.fuse()
    assert not report.applied
    assert report.nonfinite == 1
    assert report.norms["update"] == 0
    assert all(map(torch.equal, loop.weights(), start))
    assert loop.fuser.round == 1


def test_an_exception_in_the_outer_block_fuses_nothing() -> None:
    loop = Loop(FusionConfig())
    loop.run(range(3))

    def interrupted() -> None:
        with loop.fuser.outer():
            train(loop.model, loop.fuser, loop.outer, range(1), -1)
            raise KeyError("from the user's code")

    with pytest.raises(KeyError, match="from the user's code"):
        interrupted()
    assert loop.fuser.last_report is None
    assert loop.fuser.phase == "outer"
    loop.fuser.fuse()


def test_calls_out_of_order_are_refused() -> None:
    loop = Loop(FusionConfig())
    with pytest.raises(RuntimeError, match="was called in the inner phase"):
        loop.fuser.fuse()
    loop.fuser.begin_outer()
    with pytest.raises(RuntimeError, match="outer phase of this round has begun already"):
        loop.fuser.begin_outer()
    with pytest.raises(RuntimeError, match="never called for the inner learner"):
        loop.fuser.fuse()
    loop.fuser.rollback()
    loop.run(range(4))
    with pytest.raises(RuntimeError, match="never called for the outer learner"):
        loop.fuser.fuse()


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (3, TypeError, "got int with int"),
        ([nn.Parameter(torch.ones(1))], TypeError, "expected an nn.Module or an iterable"),
        ([], ValueError, "no parameter is trainable"),
        ([("p", nn.Parameter(torch.ones(1), requires_grad=False))], ValueError, "no parameter is trainable"),
        ([("p", nn.Parameter(torch.ones(1)))] * 2, ValueError, "the parameter name 'p' is given twice"),
        ([("p", nn.Parameter(torch.ones(1).double()))], TypeError, r"parameters\['p'\] has dtype float64"),
        (
            [("p", nn.Parameter(torch.ones(1))), ("q", nn.Parameter(torch.ones(1, device="meta")))],
            ValueError,
            "must be on one device; found cpu, meta",
        ),
    ],
)
def test_invalid_parameters_are_refused(source: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Fuser(source, FusionConfig())


def test_importance_sees_no_loss_scale_when_gradients_are_unscaled_first() -> None:
    """A loss scale of a power of two does not change the bits of the scores if the loop unscales first."""
    scores = []
    for scaler in (
        torch.amp.GradScaler("cpu", enabled=False),
        torch.amp.GradScaler("cpu", init_scale=2.0**10),
    ):
        loop = Loop(FusionConfig())
        for step in range(3):
            scaler.scale(loop.model(batch(step)).exp().mean()).backward()
            scaler.unscale_(loop.inner)
            loop.fuser.observe()
            scaler.step(loop.inner)
            scaler.update()
            loop.inner.zero_grad()
        scores.append(loop.fuser.scores("inner"))
    assert all(torch.equal(scores[0][name], scores[1][name]) for name in scores[0])


@pytest.mark.parametrize(
    "changes",
    [
        {"density": 0.5},
        {"scope": "tensor"},
        {"order": "second"},
        {"order": "mixed"},
        {"beta1": 0.3},
        {"beta2": 0.2},
        {"state_dtype": torch.bfloat16},
        {"importance": "sensitivity"},
        {"rule": rkif.MergeWeights(inner_only=(1, 0), outer_only=(0, 1), both=(0.1, 0.2), neither=(0, 0.3))},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_setting_changes_the_result(changes: dict[str, Any]) -> None:
    config = FusionConfig(**changes)
    model = make_model()
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fuser = Fuser(model, config)

    def learn(steps: range, sign: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The trained parameters, and their scores by the reference."""
        s = [torch.zeros_like(p, dtype=config.state_dtype) for p in parameters.values()]
        u = [torch.zeros_like(t) for t in s] if config.uses_uncertainty else None
        for step in steps:
            (sign * model(batch(step))).exp().mean().backward()
            fuser.observe()
            with torch.no_grad():
                reference.update_importance_(
                    ImportanceInputs(list(parameters.values()), [p.grad for p in parameters.values()], s, u),
                    Smoothing(config.beta1, config.beta2, config.order),
                    torch.zeros((), dtype=torch.int64),
                )
            optimizer.step()
            optimizer.zero_grad()
        scores = (
            [t.float() for t in s]
            if u is None
            else [a.float() * b.float() for a, b in zip(s, u, strict=True)]
        )
        return {n: p.detach().clone() for n, p in parameters.items()}, dict(
            zip(parameters, scores, strict=True)
        )

    base = {name: p.detach().clone() for name, p in parameters.items()}
    inner, inner_scores = learn(range(4), 1)
    fuser.begin_outer()
    outer, outer_scores = learn(range(10, 13), -1)
    for learner, scores in (("inner", inner_scores), ("outer", outer_scores)):
        assert all(torch.equal(fuser.scores(learner)[name], scores[name]) for name in scores)
    settings = {"density": config.density, "rule": config.rule, "scope": config.scope}
    expected = rkif.fuse(base, inner, outer, inner_scores, outer_scores, **settings)
    assert fuser.fuse() == expected.report
    assert all(torch.equal(p, expected.params[name]) for name, p in parameters.items())


def test_a_gradient_of_the_previous_round_does_not_count() -> None:
    loop = Loop(FusionConfig())
    loop.run(range(7))
    for phase in ("inner", "outer"):
        for p in list(loop.model.parameters())[1:]:
            p.grad = torch.ones_like(p)
        loop.fuser.observe()
        if phase == "inner":
            loop.fuser.begin_outer()
    with pytest.raises(ValueError, match=r"parameter '0.weight' had no gradient"):
        loop.fuser.fuse()


def test_parameters_that_share_memory_are_refused() -> None:
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"parameters\['a'\] and parameters\['b'\] share memory"):
        Fuser([("a", p), ("b", p)], FusionConfig())


@pytest.mark.parametrize(("size", "scope"), [(100, "global"), (100, "tensor"), (1 << 18, "global")])
def test_a_deleted_fuser_frees_its_memory(size: int, scope: Any) -> None:
    weight = nn.Parameter(torch.randn(size))
    fuser = Fuser([("w", weight)], FusionConfig(scope=scope))
    weight.grad = torch.randn(size)
    for _ in range(2):
        fuser.observe()
        with fuser.outer():
            fuser.observe()
    held = [fuser._base.tensors[0], *fuser._importance["inner"].tensors().values()]
    known = [weakref.ref(tensor) for tensor in held]
    gc.disable()
    try:
        del fuser, held
        assert all(tensor() is None for tensor in known)
    finally:
        gc.enable()


def test_a_failed_fusion_frees_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rkif.fuser.snapshot.KEPT_BYTES", 0)
    loops = [Loop(FusionConfig.paper()) for _ in range(2)]
    for loop in loops:
        loop.run(range(6))
    fuser = loops[0].fuser
    with monkeypatch.context() as failing:
        failing.setattr("rkif.fuser.round_fusion.report_of", Mock(side_effect=MemoryError))
        for _ in range(3):
            with pytest.raises(MemoryError):
                fuser.fuse()
    outs = [bound.views[0].flat for bound in fuser._plan._bound]
    assert {out.untyped_storage().nbytes() for out in outs} == {0}
    assert fuser.fuse() == loops[1].fuser.fuse()


def test_a_fuser_works_after_a_fusion_in_inference_mode() -> None:
    model = torch.nn.Linear(3, 2)
    fuser = rkif.Fuser(model, rkif.FusionConfig.paper())
    for _ in range(2):
        for phase in ("inner", "outer"):
            if phase == "outer":
                fuser.begin_outer()
            model(torch.ones(1, 3)).sum().backward()
            fuser.observe()
        with torch.inference_mode():
            fuser.fuse()
    fuser.load_state_dict(fuser.state_dict())
    fuser.rollback()
    assert fuser.round == 3
