"""`rkif.optim.AdamW`: the weights of torch.optim.AdamW, the importance of observe(), PyTorch's interface."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from fuser_loop import Loop, batch, make_model, train
from torch import Tensor, nn

import rkif
from rkif import Fuser, FusionConfig

RELEASE = FusionConfig.release()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(first: Any, second: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def backward(model: nn.Module, step: int = 0) -> None:
    model(batch(step)).exp().mean().backward()


class JoinedLoop(Loop):
    """The loop with optimizers that also update the importance, or with separate calls of observe()."""

    def __init__(self, config: FusionConfig, *, joined: bool = True) -> None:
        super().__init__(config)
        self.inner = rkif.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.outer = rkif.optim.AdamW(self.model.parameters(), lr=3e-2)
        self.joined = joined
        if joined:
            self.inner.fuser = self.outer.fuser = self.fuser

    def run(self, events: range) -> None:
        for event in events:
            phase = event % 7
            if phase == 3:
                self.fuser.begin_outer()
            elif phase == 6:
                self.fuser.fuse()
            else:
                optimizer, sign = (self.inner, 1) if phase < 3 else (self.outer, -1)
                observed = None if self.joined else self.fuser
                train(self.model, observed, optimizer, range(event, event + 1), sign)


CONFIGS = {
    "paper": FusionConfig.paper(),
    "release": RELEASE,
    "packed": FusionConfig.release(pack_inner=True),
    "offloaded": FusionConfig.release(offload=True),
    "bfloat16 states": FusionConfig.release(state_dtype=torch.bfloat16),
    "outer importance of the first round": FusionConfig.release(refresh_outer=False),
    "mixed order": FusionConfig.release(order="mixed"),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_step_equals_observe_and_a_step(config: FusionConfig) -> None:
    joined, apart = JoinedLoop(config), JoinedLoop(config, joined=False)
    for event in range(15):
        joined.run(range(event, event + 1))
        apart.run(range(event, event + 1))
        assert same(joined.weights(), apart.weights())
        first, second = joined.fuser.state_dict(), apart.fuser.state_dict()
        assert first.keys() == second.keys()
        assert same(first.values(), second.values())
    assert joined.fuser.last_report == apart.fuser.last_report


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.5)], ids=str)
def test_weights_are_those_of_torch(weight_decay: float, betas: tuple[float, float]) -> None:
    """The documented bound: per step, 4 units in the last place of the weight and the step."""
    n, steps, lr, epsilon = 10_000, 50, 1e-3, torch.finfo(torch.float32).eps
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(n, generator=generator)
    own, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    settings: dict[str, Any] = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
    pairs = (own, rkif.optim.AdamW([own], **settings)), (theirs, torch.optim.AdamW([theirs], **settings))
    for _ in range(steps):
        gradient = torch.randn(n, generator=generator) * 1e-3
        for parameter, optimizer in pairs:
            parameter.grad = gradient.clone()
            optimizer.step()
    moved = (theirs - start).abs().max()
    assert moved > 0.5 * lr
    allowed = 4 * epsilon * steps * (lr + theirs.abs().clamp(min=start.abs()))
    assert ((own - theirs).abs() <= allowed).all()


def test_a_learning_rate_scheduler_and_groups_reach_the_step() -> None:
    results = []
    for kind in (rkif.optim.AdamW, torch.optim.AdamW):
        model = make_model()
        groups = [{"params": model[0].parameters(), "lr": 1e-2}, {"params": model[2].parameters(), "lr": 0.0}]
        optimizer = kind(groups, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
        before = weights(model)
        for step in range(4):
            train(model, None, optimizer, range(step, step + 1), 1)
            schedule.step()
        assert same(weights(model)[2:], before[2:])
        assert not same(weights(model)[:2], before[:2])
        results.append(weights(model))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_moments_of_16_bit_parameters_have_the_state_dtype(
    dtype: torch.dtype, state_dtype: torch.dtype
) -> None:
    model = make_model(dtype=dtype)
    fuser = Fuser(model, RELEASE)
    optimizer = rkif.optim.AdamW(model.parameters(), lr=1e-2, fuser=fuser, state_dtype=state_dtype)
    before = weights(model)
    model(batch(0).to(dtype)).float().exp().mean().backward()
    optimizer.step()
    assert not same(weights(model), before)
    assert {s["exp_avg_sq"].dtype for s in optimizer.state.values()} == {state_dtype}
    restored = rkif.optim.AdamW(model.parameters(), lr=1e-2, state_dtype=state_dtype)
    restored.load_state_dict(optimizer.state_dict())
    for moment in ("exp_avg", "exp_avg_sq"):
        pairs = zip(restored.state.values(), optimizer.state.values(), strict=True)
        assert all(torch.equal(a[moment], b[moment]) and a[moment].dtype == state_dtype for a, b in pairs)


@pytest.mark.parametrize("first", [rkif.optim.AdamW, torch.optim.AdamW], ids=["ours", "torch's"])
def test_state_dicts_are_exchangeable_with_torch(first: Any) -> None:
    second = torch.optim.AdamW if first is rkif.optim.AdamW else rkif.optim.AdamW
    model, other = make_model(), make_model()
    optimizer = first(model.parameters(), lr=1e-2, weight_decay=0.1)
    train(model, None, optimizer, range(3), 1)
    other.load_state_dict(model.state_dict())
    loaded = second(other.parameters(), lr=1.0)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert loaded.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    train(model, None, optimizer, range(3, 6), 1)
    train(other, None, loaded, range(3, 6), 1)
    torch.testing.assert_close(weights(other), weights(model), rtol=1e-5, atol=1e-7)


def test_a_loaded_state_shares_no_memory() -> None:
    model = make_model()
    optimizer = rkif.optim.AdamW(model.parameters())
    train(model, None, optimizer, range(1), 1)
    state = optimizer.state_dict()
    kept = copy.deepcopy(state)
    optimizer.load_state_dict(state)
    train(model, None, optimizer, range(1, 2), 1)
    for index, entry in kept["state"].items():
        assert all(torch.equal(state["state"][index][key], value) for key, value in entry.items())


def test_an_optimizer_can_be_copied_and_pickled() -> None:
    model = make_model()
    optimizer = rkif.optim.AdamW(model.parameters(), state_dtype=torch.bfloat16)
    train(model, None, optimizer, range(1), 1)
    again = pickle.loads(pickle.dumps(optimizer))
    assert again.state_dtype == torch.bfloat16
    assert again.fuser is None
    assert again.state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()


def test_a_step_observes_all_parameters_and_steps_its_own() -> None:
    """Every parameter of the fuser is observed, also without a step; other parameters are only stepped."""
    model, other, extra = make_model(), make_model(), nn.Parameter(torch.ones(3))
    fuser, twin = Fuser(model, RELEASE), Fuser(other, RELEASE)
    optimizer = rkif.optim.AdamW([*model[0].parameters(), extra], lr=1e-2, fuser=fuser)
    before = weights(model)
    for step in range(2):
        other.load_state_dict(model.state_dict())
        for one in (model, other):
            backward(one, step)
            one[0].bias.grad = None
        extra.grad = torch.ones(3)
        twin.observe()
        optimizer.step()
        model.zero_grad()
        other.zero_grad()
    after = weights(model)
    assert not torch.equal(after[0], before[0])
    assert same(after[1:], before[1:])
    assert (extra < 1).all()
    assert len(optimizer.state) == 2
    mine, theirs = fuser.state_dict(), twin.state_dict()
    assert mine.keys() == theirs.keys()
    assert same(mine.values(), theirs.values())
    assert mine["with_gradient"].tolist() == [False, True, True, True]


def test_importance_that_is_not_finite_is_counted() -> None:
    model = make_model()
    fuser = Fuser(model, RELEASE)
    optimizer = rkif.optim.AdamW(model.parameters(), fuser=fuser)
    backward(model)
    model[0].bias.grad[3] = torch.nan
    optimizer.step()
    assert fuser.state_dict()["nonfinite"] == 1


def test_observe_works_without_a_step() -> None:
    model = make_model()
    fuser = Fuser(model, RELEASE)
    optimizer = rkif.optim.AdamW(model.parameters(), fuser=fuser)
    before = weights(model)
    backward(model)
    optimizer.observe()
    assert fuser.inner_observed == 1
    assert same(weights(model), before)
    assert fuser.scores("inner")["0.weight"].any()
    optimizer.fuser = None
    with pytest.raises(RuntimeError, match="needs a fuser"):
        optimizer.observe()


@pytest.mark.parametrize("first", ["observe", "step"])
def test_a_phase_has_one_observer(first: str) -> None:
    model = make_model()
    fuser = Fuser(model, RELEASE)
    optimizer = rkif.optim.AdamW(model.parameters(), fuser=fuser)
    second = rkif.optim.AdamW(model.parameters(), fuser=fuser)
    backward(model)
    calls = [fuser.observe, optimizer.step]
    if first == "step":
        calls.reverse()
    calls[0]()
    before, state = weights(model), fuser.state_dict()
    for call in (calls[1], second.step):
        with pytest.raises(RuntimeError, match="second observer of this inner phase"):
            call()
    assert same(weights(model), before)
    assert same(fuser.state_dict().values(), state.values())
    assert not second.state
    calls[0]()
    assert fuser.inner_observed == 2
    fuser.begin_outer()
    second.step()
    assert fuser.outer_observed == 1


def test_a_step_accepts_a_closure_and_missing_gradients() -> None:
    model = make_model()
    optimizer = rkif.optim.AdamW(model.parameters())
    assert optimizer.step() is None
    assert not optimizer.state

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(batch(0)).exp().mean()
        loss.backward()
        return loss

    before = weights(model)
    loss = optimizer.step(closure)
    assert isinstance(loss, Tensor)
    assert not same(weights(model), before)


@pytest.mark.parametrize("overflow", [False, True])
def test_a_step_skipped_by_a_gradient_scaler_is_not_observed(overflow: bool) -> None:
    model = make_model()
    fuser = Fuser(model, RELEASE)
    optimizer = rkif.optim.AdamW(model.parameters(), fuser=fuser)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    scaler.scale(model(batch(0)).exp().mean()).backward()
    if overflow:
        model[0].bias.grad[0] = torch.inf
    before = weights(model)
    scaler.step(optimizer)
    assert fuser.inner_observed == (0 if overflow else 1)
    assert same(weights(model), before) == overflow


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr must be a non-negative number"),
        ({"lr": 1e300}, ValueError, "lr must be a non-negative number, finite in float32"),
        ({"lr": torch.tensor(0.1)}, ValueError, "not a tensor"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\]"),
        ({"state_dtype": torch.float16}, ValueError, "state_dtype must be"),
        ({"amsgrad": True}, TypeError, "amsgrad"),
        ({"fuser": "a fuser"}, TypeError, "fuser must be a Fuser; got str"),
    ],
    ids=str,
)
def test_refuses_invalid_settings(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rkif.optim.AdamW(make_model().parameters(), **settings)


def test_refuses_invalid_parameters_groups_and_fusers() -> None:
    model = make_model()
    with pytest.raises(TypeError, match="float64"):
        rkif.optim.AdamW(make_model(dtype=torch.float64).parameters())
    with pytest.raises(ValueError, match="maximize=True is not supported"):
        rkif.optim.AdamW([{"params": model.parameters(), "maximize": True}])
    with pytest.raises(ValueError, match="has none of this optimizer's parameters"):
        rkif.optim.AdamW(model.parameters(), fuser=Fuser(make_model()))


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (torch.optim.AdamW, {"amsgrad": True}, "amsgrad=True is not supported"),
        (torch.optim.Adam, {}, "decoupled_weight_decay=False"),
    ],
    ids=["amsgrad", "Adam"],
)
def test_refuses_a_state_of_unsupported_features(kind: Any, settings: dict[str, Any], message: str) -> None:
    model = make_model()
    optimizer = rkif.optim.AdamW(model.parameters(), lr=0.5)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(kind(model.parameters(), lr=0.1, **settings).state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_a_step_that_is_refused_writes_nothing() -> None:
    model, table = make_model(), nn.Embedding(5, 2, sparse=True)
    fuser = Fuser(model, RELEASE)
    groups = [{"params": model.parameters()}, {"params": table.parameters()}]
    optimizer = rkif.optim.AdamW(groups, fuser=fuser)
    before = weights(model)
    backward(model)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match=r"param_groups\[1\].*sparse"):
        optimizer.step()
    table.zero_grad()
    optimizer.param_groups[1]["lr"] = -1.0
    table.weight.grad = torch.ones(5, 2)
    with pytest.raises(ValueError, match="lr must be"):
        optimizer.step()
    assert same(weights(model), before)
    assert fuser.inner_observed == 0
    assert not optimizer.state
