"""``rkif.Fuser``: the rounds inside a training loop."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

import rkif
from rkif import Fuser, FusionConfig
from rkif.params import arena
from rkif_kernels import reference

PRESETS = [FusionConfig.paper(), FusionConfig.release()]
presets = pytest.mark.parametrize("config", PRESETS, ids=["paper", "release"])


def make_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 2)).to(dtype)


def batch(step: int) -> Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(step))


def train(
    model: nn.Module, fuser: Fuser | None, optimizer: torch.optim.Optimizer, steps: range, sign: int
) -> None:
    for step in steps:
        (sign * model(batch(step))).exp().mean().backward()
        if fuser is not None:
            fuser.observe()
        optimizer.step()
        optimizer.zero_grad()


class Loop:
    """A training loop whose state can be taken and given back, as by a program that is killed and resumed."""

    def __init__(self, config: FusionConfig) -> None:
        self.model = make_model()
        self.inner = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.outer = torch.optim.AdamW(self.model.parameters(), lr=3e-2)
        self.fuser = Fuser(self.model, config)

    def run(self, events: range) -> None:
        """Event 0..2 inner steps, 3 begins the outer phase, 4 and 5 outer steps, 6 fuses; and again."""
        for event in events:
            phase = event % 7
            if phase == 3:
                self.fuser.begin_outer()
            elif phase == 6:
                self.fuser.fuse()
            else:
                optimizer, sign = (self.inner, 1) if phase < 3 else (self.outer, -1)
                train(self.model, self.fuser, optimizer, range(event, event + 1), sign)

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


def naive_round(
    model: nn.Module, config: FusionConfig, carried: dict[str, list[Tensor]] | None
) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """One round as the paper writes it, tensor by tensor, with nothing of rkif in it."""
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
        # 65 scores, density 0.2: rank 51, so 13 lie above it
        assert report.counts["inner_only"] + report.counts["both"] == 13
        assert report.norms["outer"] > 0
    assert fuser.round == 2


def test_separate_calls_are_the_block() -> None:
    one, other = Loop(FusionConfig()), Loop(FusionConfig())
    one.run(range(7))
    train(other.model, other.fuser, other.inner, range(3), 1)
    with other.fuser.outer():
        train(other.model, other.fuser, other.outer, range(4, 6), -1)
    assert all(map(torch.equal, one.weights(), other.weights()))
    assert one.fuser.last_report == other.fuser.last_report


@pytest.mark.parametrize("killed_at", range(22))
def test_resumed_at_any_point_of_a_round_gives_the_same_bits(killed_at: int) -> None:
    config = FusionConfig(density=0.3)
    straight = Loop(config)
    straight.run(range(22))

    first = Loop(config)
    first.run(range(killed_at))
    file = save(first.fuser.state_dict())  # what does not go through safetensors is not saved
    second = Loop(config)
    second.model.load_state_dict(copy.deepcopy(first.model.state_dict()))
    second.inner.load_state_dict(copy.deepcopy(first.inner.state_dict()))
    second.outer.load_state_dict(copy.deepcopy(first.outer.state_dict()))
    second.fuser.load_state_dict(load(file))
    assert second.fuser.phase == first.fuser.phase
    second.run(range(killed_at, 22))

    assert all(map(torch.equal, second.weights(), straight.weights()))
    assert second.fuser.round == straight.fuser.round == 3
    for learner in ("inner", "outer"):
        one, other = second.fuser.scores(learner), straight.fuser.scores(learner)
        assert all(torch.equal(one[name], other[name]) for name in other)


def test_state_is_a_copy_and_loading_touches_neither_parameters_nor_the_state() -> None:
    loop = Loop(FusionConfig())
    loop.run(range(5))
    state = loop.fuser.state_dict()
    kept = {name: tensor.clone() for name, tensor in state.items()}
    loop.run(range(5, 9))
    assert all(torch.equal(state[name], kept[name]) for name in kept)
    before = loop.weights()
    loop.fuser.load_state_dict(state)
    assert all(map(torch.equal, loop.weights(), before))
    loop.fuser.rollback()
    assert all(torch.equal(state[name], kept[name]) for name in kept)


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    loop = Loop(FusionConfig())
    loop.run(range(2))
    state = loop.fuser.state_dict()
    other = Loop(FusionConfig())
    other.run(range(5))
    before = other.fuser.state_dict()

    def refused(changed: dict[str, Tensor], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            other.fuser.load_state_dict(changed)
        after = other.fuser.state_dict()
        assert set(after) == set(before)
        assert all(torch.equal(after[name], before[name]) for name in before)

    refused({n: t for n, t in state.items() if n != "base.0.weight"}, "the state lacks 'base.0.weight'")
    refused({n: t for n, t in state.items() if n != "phase"}, "the state lacks 'phase'")
    refused(state | {"base.x": torch.ones(1)}, "the state has, unlike this fuser, 'base.x'")
    refused(
        state | {"base.0.bias": torch.ones(3)},
        r"state\['base.0.bias'\] is .* \(3,\); this fuser has .* \(9,\)",
    )
    refused(state | {"base.0.bias": torch.ones(9).half()}, r"state\['base.0.bias'\] is torch.float16")
    three = torch.zeros(3, dtype=torch.int64)
    refused(state | {"nonfinite": three}, r"state\['nonfinite'\] must be one whole number")
    refused(state | {"round": torch.tensor(-1)}, r"state\['round'\] must be one whole number")
    refused(state | {"with_gradient": torch.ones(2).bool()}, "'with_gradient'.* must have 4 elements")
    refused(
        Fuser(make_model(), FusionConfig.paper()).state_dict(),
        "the state lacks 'inner_importance.uncertainty",
    )


def test_rollback_returns_to_base_bit_for_bit_in_either_phase() -> None:
    for events in (range(2), range(5)):
        loop = Loop(FusionConfig())
        start = loop.weights()
        loop.run(events)
        assert not all(map(torch.equal, loop.weights(), start))
        loop.fuser.rollback()
        assert all(map(torch.equal, loop.weights(), start))
        assert loop.fuser.phase == "inner"
        assert all((score == 0).all() for score in loop.fuser.scores("inner").values())
        loop.run(range(7))  # and a round can follow


@pytest.mark.parametrize("clear_inner", [True, False])
@pytest.mark.parametrize("clear_outer", [True, False])
def test_importance_is_cleared_or_kept_after_a_round(clear_inner: bool, clear_outer: bool) -> None:
    loop = Loop(FusionConfig(clear_inner=clear_inner, clear_outer=clear_outer))
    loop.run(range(6))
    before = {learner: loop.fuser.scores(learner) for learner in ("inner", "outer")}
    loop.run(range(6, 7))
    for learner, cleared in (("inner", clear_inner), ("outer", clear_outer)):
        assert any(score.any() for score in before[learner].values())
        for name, score in loop.fuser.scores(learner).items():
            assert torch.equal(score, torch.zeros_like(score) if cleared else before[learner][name])


def test_scores_are_copies_of_the_parameters_shapes() -> None:
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


def test_observation_goes_to_the_learner_whose_phase_it_is() -> None:
    loop = Loop(FusionConfig.paper())
    loop.run(range(3))
    assert (loop.fuser.inner_observed, loop.fuser.outer_observed) == (3, 0)
    assert not any(score.any() for score in loop.fuser.scores("outer").values())
    inner = loop.fuser.scores("inner")
    loop.run(range(3, 6))
    assert (loop.fuser.inner_observed, loop.fuser.outer_observed) == (3, 2)
    assert all(torch.equal(loop.fuser.scores("inner")[name], inner[name]) for name in inner)
    assert any(score.any() for score in loop.fuser.scores("outer").values())


def test_frozen_parameters_take_no_part() -> None:
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
def test_low_precision_models(dtype: torch.dtype) -> None:
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
    p = nn.Parameter(torch.tensor([2.0]))
    fuser = Fuser([("p", p)], FusionConfig.paper(beta1=0.5))
    p.grad = torch.tensor([3.0])
    fuser.observe()
    p.grad = None
    fuser.observe()
    assert fuser.scores("inner")["p"].item() == 0.5 * (0.5 * 6.0)


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


def poisoned_loop(nonfinite: str) -> Loop:
    loop = Loop(FusionConfig(nonfinite=nonfinite))
    loop.run(range(2))
    loop.model(batch(0)).sum().backward()
    loop.model[0].bias.grad[3] = torch.nan
    loop.fuser.observe()
    loop.inner.zero_grad()
    loop.run(range(3, 6))
    return loop


def test_a_nonfinite_gradient_raises_at_the_fusion_and_leaves_everything() -> None:
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


def test_a_nonfinite_gradient_can_refuse_the_fusion_instead() -> None:
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
    with pytest.raises(RuntimeError, match="was called twice in a round"):
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
        ([("p", nn.Parameter(torch.ones(1)))] * 2, ValueError, "the parameter name 'p' comes twice"),
        ([("p", nn.Parameter(torch.ones(1).double()))], TypeError, r"parameters\['p'\] has dtype float64"),
        (
            [("p", nn.Parameter(torch.ones(1))), ("q", nn.Parameter(torch.ones(1, device="meta")))],
            ValueError,
            "must be on one device; found cpu, meta",
        ),
    ],
)
def test_parameters_that_cannot_be_followed(source: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Fuser(source, FusionConfig())


def test_the_config_must_be_one() -> None:
    with pytest.raises(TypeError, match="config must be a FusionConfig; got dict"):
        Fuser(make_model(), {"density": 0.2})


def test_importance_sees_no_loss_scale_when_gradients_are_unscaled_first() -> None:
    """A scale of a power of two leaves the scores' bits alone if the loop unscales before it observes."""
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
    ("settings", "error", "message"),
    [
        ({"density": 2}, ValueError, "density must be in .*; got 2"),
        ({"beta1": -1}, ValueError, "beta1 must be in .*; got -1"),
        ({"beta2": "x"}, TypeError, "beta2 must be a number"),
        ({"rule": "mean"}, ValueError, "rule must be one of paper, release"),
        ({"scope": "x"}, ValueError, "scope must be one of global, tensor"),
        ({"importance": "x"}, ValueError, "importance must be one of sensitivity, sensitivity_uncertainty"),
        ({"order": "x"}, ValueError, "order must be one of first, second, mixed"),
        ({"nonfinite": "x"}, ValueError, "nonfinite must be one of raise, skip"),
        ({"inner_steps": 0}, ValueError, "inner_steps must be a whole number of at least 1; got 0"),
        ({"outer_steps": 1.5}, ValueError, "outer_steps must be a whole number"),
        ({"state_dtype": torch.float16}, ValueError, "state_dtype must be one of"),
        ({"clear_inner": "no"}, TypeError, "clear_inner must be True or False; got 'no'"),
        ({"state_dtype": "float8"}, ValueError, "state_dtype must be one of"),
    ],
)
def test_config_refuses(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FusionConfig(**settings)


def test_presets() -> None:
    paper, release = FusionConfig.paper(), FusionConfig.release()
    assert (paper.importance, paper.beta1, paper.rule) == ("sensitivity", 0.55, "paper")
    assert (release.importance, release.beta1, release.beta2) == ("sensitivity_uncertainty", 0.85, 0.85)
    assert release.rule == "release"
    for preset in (paper, release):
        assert (preset.density, preset.inner_steps, preset.outer_steps) == (0.2, 8, 4)
        assert preset.clear_inner
        assert not preset.clear_outer
    assert FusionConfig.paper(density=0.5).density == 0.5
    assert FusionConfig(state_dtype="bfloat16").state_dtype == torch.bfloat16
    with pytest.raises(AttributeError):
        paper.density = 0.3


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
def test_every_setting_has_its_effect(changes: dict[str, Any]) -> None:
    config = FusionConfig(**changes)
    model = make_model()
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fuser = Fuser(model, config)

    def learn(steps: range, sign: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Parameters afterwards, and their scores by the reference."""
        s = [torch.zeros_like(p, dtype=config.state_dtype) for p in parameters.values()]
        u = [torch.zeros_like(t) for t in s] if config.uses_uncertainty else None
        for step in steps:
            (sign * model(batch(step))).exp().mean().backward()
            fuser.observe()
            with torch.no_grad():
                reference.update_importance_(
                    list(parameters.values()),
                    [p.grad for p in parameters.values()],
                    s,
                    u,
                    beta1=config.beta1,
                    beta2=config.beta2,
                    order=config.order,
                    nonfinite=torch.zeros((), dtype=torch.int64),
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


def test_what_a_round_has_seen_survives_a_resume() -> None:
    first = poisoned_loop("raise")
    first.model[0].bias.grad = None
    second = Loop(FusionConfig())
    second.fuser.load_state_dict(first.fuser.state_dict())
    assert (second.fuser.inner_observed, second.fuser.outer_observed) == (3, 2)
    with pytest.raises(RuntimeError, match="1 elements had a non-finite importance"):
        second.fuser.fuse()

    partial = Loop(FusionConfig())
    for p in list(partial.model.parameters())[1:]:
        p.grad = torch.ones_like(p)
    partial.fuser.observe()
    partial.fuser.begin_outer()
    partial.fuser.observe()
    resumed = Loop(FusionConfig())
    resumed.fuser.load_state_dict(partial.fuser.state_dict())
    with pytest.raises(ValueError, match=r"parameter '0.weight' had no gradient"):
        resumed.fuser.fuse()


def test_a_gradient_of_the_last_round_does_not_count_in_this_one() -> None:
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


def test_state_is_aligned_for_wide_accesses() -> None:
    shapes = [torch.Size(shape) for shape in ((3,), (5, 7), (), (0,), (64,))]
    for dtype in (torch.float32, torch.bfloat16):
        flat, views = arena(shapes, dtype, torch.device("cpu"))
        assert [view.shape for view in views] == shapes
        assert all((view.data_ptr() - flat.data_ptr()) % 64 == 0 for view in views if view.numel())
        for index, view in enumerate(views):
            view.fill_(index + 1)
        assert [view.unique().tolist() for view in views if view.numel()] == [[1], [2], [3], [5]]


def test_state_of_parameters_in_other_memory_formats_can_be_saved() -> None:
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    fuser = Fuser(model, FusionConfig())
    assert not model.weight.is_contiguous()
    loaded = load(save(fuser.state_dict()))
    fuser.load_state_dict(loaded)
    assert torch.equal(loaded["base.weight"], model.weight)


def test_parameters_that_share_memory_are_refused() -> None:
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"parameters\['a'\] and parameters\['b'\] share memory"):
        Fuser([("a", p), ("b", p)], FusionConfig())
