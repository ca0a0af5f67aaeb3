"""The gate keeps, damps or undoes a fusion as a whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import rkif
from rkif.gate import Criterion, Gate, Gatekeeper, without_values

CONFIG = rkif.FusionConfig.paper(density=1.0)  # both whole task vectors


class Scripted:
    """Values for each fraction of the step."""

    def __init__(self, figures: dict[float, float]) -> None:
        self.figures, self.taken, self.measured = figures, [], 0
        self.at = 1.0

    def take(self, factor: float) -> None:
        self.at = factor
        self.taken.append(factor)

    def __call__(self) -> float:
        self.measured += 1
        return self.figures[self.at]


def judged(figures: dict[float, float], **settings: Any) -> tuple[Any, Scripted]:
    script = Scripted(figures)
    criterion = {
        key: settings.pop(key) for key in ("higher_is_better", "floor", "tolerance") if key in settings
    }
    gate = Gate([Criterion("kpi", script, samples=10, **criterion)], **settings)
    return Gatekeeper(gate).judge(script.take), script


@pytest.mark.parametrize(
    ("figures", "settings", "verdict", "factor"),
    [
        ({0: 5, 1: 5}, {}, "keep", 1.0),
        ({0: 5, 1: 4.99, 0.5: 5}, {}, "damp", 0.5),
        ({0: 5, 1: 4.99}, {"tolerance": 0.02}, "keep", 1.0),
        ({0: 5, 1: 4, 0.5: 4, 0.25: 5.5}, {}, "damp", 0.25),
        ({0: 5, 1: 4, 0.5: 4, 0.25: 4}, {}, "undo", 0.0),
        ({0: 5, 1: 4, 0.5: 4, 0.25: 4}, {"otherwise": "stop"}, "stop", 0.0),
        ({0: 5, 1: 4}, {"ladder": ()}, "undo", 0.0),
        ({0: 5, 1: 5.1, 0.5: 4.9}, {"higher_is_better": False}, "damp", 0.5),
        ({0: 5, 1: 4}, {"higher_is_better": False}, "keep", 1.0),
        ({0: 5, 1: 3, 0.5: 4}, {"tolerance": None, "floor": 3.5}, "damp", 0.5),
        ({0: 2, 1: 3, 0.5: 3, 0.25: 3}, {"floor": 3.5}, "undo", 0.0),  # better, but below the floor
        ({0: 5, 1: 3.4, 0.5: 3.6}, {"tolerance": None, "floor": 3.5, "higher_is_better": False}, "keep", 1.0),
        ({0: 5, 1: math.nan, 0.5: math.nan, 0.25: 5}, {}, "damp", 0.25),
        ({0: 5, 1: math.nan}, {"tolerance": None, "floor": -9, "ladder": ()}, "undo", 0.0),
        ({0: math.inf, 1: 4}, {"higher_is_better": False}, "keep", 1.0),
        ({0: -math.inf, 1: 4, 0.5: 4, 0.25: 4}, {"higher_is_better": False}, "undo", 0.0),
        ({0: math.nan, 1: 5, 0.5: 5, 0.25: 5}, {}, "undo", 0.0),
        ({0: math.nan, 1: 5, 0.5: 5, 0.25: 5}, {"floor": 3}, "undo", 0.0),
        ({0: math.nan, 1: 5}, {"tolerance": None, "floor": 3}, "keep", 1.0),
    ],
)
def test_the_verdict_follows_from_the_values(
    figures: dict[float, float], settings: dict[str, Any], verdict: str, factor: float
) -> None:
    report, script = judged(figures, **settings)
    assert (report.verdict, report.factor) == (verdict, factor)
    assert script.taken[-1] == factor
    assert [attempt.factor for attempt in report.attempts] == [t for t in script.taken[1:] if t > 0]
    assert report.samples == 10 * script.measured
    for attempt in report.attempts:
        assert bool(attempt.objections) == (attempt.factor != factor)


def test_all_criteria_must_pass_and_objections_are_reported() -> None:
    loss = Scripted({0: 1.0, 1: 2.0, 0.5: 1.2})
    accuracy = Scripted({0: 80.0, 1: 85.0, 0.5: 70.0})
    gate = Gate(
        [
            Criterion("loss", loss, higher_is_better=False, tolerance=0.5),
            Criterion("accuracy", accuracy, floor=75),
        ],
        ladder=(0.5,),
    )

    def take(factor: float) -> None:
        loss.take(factor)
        accuracy.take(factor)

    report = Gatekeeper(gate).judge(take)
    assert report.verdict == "undo"
    assert report.attempts[0].objections == ["loss went from 1 to 2; tolerated: 0.5"]
    assert report.attempts[1].objections == ["accuracy 70 is below 75"]
    assert report.to_dict()["before"] == {"loss": 1.0, "accuracy": 80.0}


def test_objections_of_one_kind_are_equal_without_their_values() -> None:
    accuracy = Criterion("mean accuracy", float, floor=60, tolerance=5)
    below = {without_values(str(accuracy.objection(70, value))) for value in (59.123, 1e-9)}
    assert below == {"mean accuracy below floor 60"}
    worse = {without_values(str(accuracy.objection(before, 65))) for before in (71, 90)}
    assert worse == {"mean accuracy worse by more than 5"}
    loss = Criterion("loss", float, higher_is_better=False, floor=2)
    assert without_values(str(loss.objection(3, 3))) == "loss above ceiling 2"
    assert without_values(str(loss.objection(0, math.nan))) == "loss is not a number"
    assert without_values(str(loss.objection(math.nan, 0))) == "loss was not a number before the fusion"


def test_a_value_that_is_not_finite_is_refused_on_both_sides() -> None:
    for value in (math.inf, -math.inf):
        for higher in (True, False):
            criterion = Criterion("kpi", float, higher_is_better=higher, tolerance=None, floor=0)
            assert criterion.objection(1, value) == "kpi is not finite"


def test_a_criterion_that_returns_no_number_is_named() -> None:
    gatekeeper = Gatekeeper(Gate([Criterion("kpi", lambda: None)]))  # type: ignore[arg-type,return-value]
    with pytest.raises(TypeError, match="evaluate of criterion 'kpi' must return a number; got None"):
        gatekeeper.judge(lambda factor: None)


def test_the_value_after_a_round_is_reused() -> None:
    script = Scripted({0: 5.0, 1: 5.0})
    keeper = Gatekeeper(Gate([Criterion("kpi", script, samples=7)]))
    for _ in range(3):
        assert keeper.judge(script.take).verdict == "keep"
    assert script.measured == 4
    assert keeper.samples == 28
    keeper.forget()
    keeper.judge(script.take)
    assert script.measured == 6


def test_every_and_budget_limit_the_measurements() -> None:
    script = Scripted({0: 5.0, 1: 5.0})
    keeper = Gatekeeper(Gate([Criterion("kpi", script, samples=10)], every=2, ladder=()))
    assert [keeper.judge(script.take).verdict for _ in range(5)] == [
        "unchecked",
        "keep",
        "unchecked",
        "keep",
        "unchecked",
    ]
    keeper = Gatekeeper(Gate([Criterion("kpi", script, samples=10)], budget=45, ladder=(0.5,)))
    verdicts = [keeper.judge(script.take).verdict for _ in range(4)]
    # Of a budget of 45: a check may take 30 and takes 20; may take 20 and takes 10; then 20 would exceed it.
    assert verdicts == ["keep", "keep", "unchecked", "unchecked"]
    assert keeper.samples == 30


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Criterion("x", float, tolerance=None), "neither floor nor tolerance"),
        (
            lambda: Criterion("x", float, tolerance=-1),
            "tolerance of criterion 'x' must be at least 0; got -1",
        ),
        (lambda: Criterion("x", float, floor=math.nan), "floor of criterion 'x' must be finite"),
        (lambda: Criterion("x", float, tolerance=10**400), "tolerance of criterion 'x' must be finite"),
        (lambda: Criterion("x", float, samples=1.5), "samples of criterion 'x' must be a whole number"),
        (lambda: Gate([]), "at least one criterion"),
        (lambda: Gate([Criterion("x", float)] * 2), "two criteria are named 'x'"),
        (lambda: Gate([Criterion("x", float)], ladder=(0.5, 0.5)), "ladder must fall"),
        (lambda: Gate([Criterion("x", float)], ladder=(1.0,)), "ladder must fall"),
        (lambda: Gate([Criterion("x", float)], ladder=(0.5, 0.0)), "ladder must fall"),
        (lambda: Gate([Criterion("x", float)], every=0), "every must be a whole number of at least 1; got 0"),
        (lambda: Gate([Criterion("x", float)], every=1.5), "every must be a whole number .*; got 1.5"),
        (lambda: Gate([Criterion("x", float)], every=True), "every must be a whole number .*; got True"),
        (lambda: Gate([Criterion("x", float)], budget=-1), "budget must be a whole number of at least 0"),
        (lambda: Gate([Criterion("x", float)], budget="x"), "budget must be a whole number .*; got 'x'"),
        (lambda: Gate([Criterion("x", float)], otherwise="shrug"), "otherwise must be"),
    ],
)
def test_invalid_settings_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Criterion("x", float, floor="a"), "floor of criterion 'x' must be a number; got 'a'"),
        (
            lambda: Criterion("x", float, tolerance="a"),
            "tolerance of criterion 'x' must be a number; got 'a'",
        ),
        (lambda: Gate([Criterion("x", float), 7]), r"criteria\[1\] must be a Criterion; got 7"),
        (lambda: Gate([Criterion("x", float)], ladder=0.5), "ladder must be a tuple of numbers; got 0.5"),
        (lambda: Gate([Criterion("x", float)], ladder="ab"), r"ladder\[0\] must be a number; got 'a'"),
        (
            lambda: Gate([Criterion("x", float)], ladder=(0.5, "a")),
            r"ladder\[1\] must be a number; got 'a'",
        ),
    ],
)
def test_settings_of_another_type_are_refused_by_name(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make()


def one_round(fuser: rkif.Fuser, model: nn.Module, change: float) -> Any:
    """The inner and the outer learner each add ``change`` to every parameter."""
    for phase in ("inner", "outer"):
        if phase == "outer":
            fuser.begin_outer()
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        fuser.observe()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(change)
    return fuser.fuse()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fuser_takes_the_fraction_that_the_gate_accepts(dtype: torch.dtype) -> None:
    model = nn.Linear(3, 2).to(dtype)
    start = [parameter.detach().clone() for parameter in model.parameters()]
    limit = [math.inf]

    def moved() -> float:
        return max(
            (p.float() - s.float()).abs().max().item() for p, s in zip(model.parameters(), start, strict=True)
        )

    def beyond() -> float:
        return max(0.0, moved() - limit[0])

    gate = Gate([Criterion("movement", beyond, higher_is_better=False)])
    fuser = rkif.Fuser(model, CONFIG, gate=gate)
    report = one_round(fuser, model, 0.5)
    assert report.gate.verdict == "keep"
    free = nn.Linear(3, 2).to(dtype)
    with torch.no_grad():
        for parameter, value in zip(free.parameters(), start, strict=True):
            parameter.copy_(value)
    expected = one_round(rkif.Fuser(free, CONFIG), free, 0.5)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), free.parameters(), strict=True))
    assert report.norms["update"] == pytest.approx(expected.norms["update"], rel=1e-6)

    base = [parameter.detach().clone() for parameter in model.parameters()]
    limit[0] = 1.6  # the whole step is 2; the gate accepts half
    report = one_round(fuser, model, 0.5)
    assert (report.gate.verdict, report.gate.factor, report.applied) == ("damp", 0.5, True)
    for parameter, value in zip(model.parameters(), base, strict=True):
        torch.testing.assert_close(parameter.detach().float(), value.float() + 0.5, rtol=1e-2, atol=1e-2)
    assert report.norms["update"] == pytest.approx(0.5 * math.sqrt(8), rel=2e-2)

    base = [parameter.detach().clone() for parameter in model.parameters()]
    limit[0] = 1.5
    report = one_round(fuser, model, 4.0)
    assert (report.gate.verdict, report.applied, report.norms["update"]) == ("undo", False, 0.0)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), base, strict=True))
    assert fuser.round == 3
    limit[0] = math.inf
    assert one_round(fuser, model, 0.5).gate.verdict == "keep"  # training continues


def test_a_criterion_that_fails_leaves_the_round_as_it_was() -> None:
    model = nn.Linear(3, 2)
    broken = [True]

    def figure() -> float:
        if broken[0]:
            raise OSError("no validation set")
        return 1.0

    fuser = rkif.Fuser(model, CONFIG, gate=Gate([Criterion("figure", figure, samples=5)]))
    with pytest.raises(OSError, match="no validation set"):
        one_round(fuser, model, 0.5)
    assert (fuser.phase, fuser.round, fuser.last_report) == ("outer", 0, None)
    ended = [parameter.detach().clone() for parameter in model.parameters()]
    broken[0] = False
    report = fuser.fuse()
    assert report.gate.verdict == "keep"
    assert report.gate.samples == 10
    # With density 1 and the paper's rule, the fusion is the outer learner's result.
    for parameter, value in zip(model.parameters(), ended, strict=True):
        torch.testing.assert_close(parameter.detach(), value)


def test_a_gate_resumes_from_its_state() -> None:
    def made() -> tuple[nn.Module, rkif.Fuser, list[int]]:
        torch.manual_seed(0)
        model, calls = nn.Linear(3, 2), [0]

        def figure() -> float:
            calls[0] += 1
            return model.weight.sum().item()

        return (
            model,
            rkif.Fuser(model, CONFIG, gate=Gate([Criterion("sum", figure, samples=3)], every=2)),
            calls,
        )

    model, fuser, calls = made()
    for _ in range(3):
        one_round(fuser, model, 0.25)
    state, values = fuser.state_dict(), [p.detach().clone() for p in model.parameters()]
    other, resumed, counted = made()
    with torch.no_grad():
        for parameter, value in zip(other.parameters(), values, strict=True):
            parameter.copy_(value)
    resumed.load_state_dict(state)
    before = calls[0]
    reports = [one_round(fuser, model, 0.25).to_dict(), one_round(resumed, other, 0.25).to_dict()]
    assert reports[0] == reports[1]
    assert calls[0] - before == counted[0] > 0
    with pytest.raises(ValueError, match="the state lacks 'gate"):
        made()[1].load_state_dict({k: v for k, v in state.items() if not k.startswith("gate.")})
    for name, wrong in (
        ("counters", torch.tensor([1, 2, 3])),
        ("counters", torch.tensor([1.0, 2.0])),
        ("counters", torch.tensor([1, -2])),
        ("known", torch.zeros(1, 1)),
    ):
        with pytest.raises(ValueError, match=rf"state\['gate\.{name}'\] must "):
            made()[1].load_state_dict(state | {f"gate.{name}": wrong})
    with pytest.raises(ValueError, match="that this fuser does not have"):
        rkif.Fuser(made()[0], CONFIG).load_state_dict(state)


def test_a_gate_of_another_type_is_refused() -> None:
    with pytest.raises(TypeError, match="gate must be a Gate; got function"):
        rkif.Fuser(nn.Linear(2, 2), gate=lambda: True)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_nonfinite_step_is_undone_bit_for_bit(value: float) -> None:
    """No fraction of the step is finite, not even zero: 0 * inf is NaN."""
    parameter = nn.Parameter(torch.ones(4))

    def figure() -> float:
        return float(parameter.detach().sum())

    gate = Gate([Criterion("sum", figure, higher_is_better=False, tolerance=100.0)])
    fuser = rkif.Fuser([("p", parameter)], rkif.FusionConfig(density=1), gate=gate)
    for end, go_on in ((2.0, fuser.begin_outer), (value, fuser.fuse)):
        parameter.grad = torch.ones(4)
        fuser.observe()
        with torch.no_grad():
            parameter[0] = end
        go_on()
    assert fuser.last_report is not None
    assert fuser.last_report.gate is not None
    assert fuser.last_report.gate.verdict == "undo"
    assert torch.equal(parameter, torch.ones(4))
    assert torch.equal(fuser.base()["p"], torch.ones(4))
    assert fuser.last_report.norms["update"] == 0
