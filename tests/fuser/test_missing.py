"""Parameters without a gradient in a whole round: `FusionConfig(missing=...)`."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fuser_loop import batch
from torch import Tensor, nn

import rkif
from rkif import Criterion, Fuser, FusionConfig, Gate
from rkif.continual.config import dump_config
from rkif.continual.evaluation.history import RoundHistory
from rkif.continual.rundir.verify import verify
from rkif.ledger.chain import read_ledger

EXPERT = ("0.bias", "2.weight")  # without a gradient in some rounds


class Loop:
    """A loop in which `without` names the parameters that have no gradient."""

    def __init__(
        self,
        config: FusionConfig,
        *,
        dtype: torch.dtype = torch.float32,
        observing: bool = False,
        **fuser_settings: Any,
    ) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 2)).to(dtype)
        self.dtype = dtype
        self.fuser = Fuser(self.model, config, **fuser_settings)
        self.observing = observing
        kind: Any = partial(rkif.optim.AdamW, fuser=self.fuser) if observing else torch.optim.AdamW
        self.optimizers = [kind(self.model.parameters(), lr=rate) for rate in (1e-2, 3e-2)]
        self.inner: dict[str, Tensor] = {}
        self.seed = 0

    def steps(self, learner: int, count: int, without: tuple[str, ...]) -> None:
        for _ in range(count):
            self.seed += 1
            (self.model(batch(self.seed).to(self.dtype)) * (-1) ** learner).exp().mean().backward()
            for name, parameter in self.model.named_parameters():
                if name in without:
                    parameter.grad = None
            if not self.observing:
                self.fuser.observe()
            self.optimizers[learner].step()
            self.optimizers[learner].zero_grad()

    def train(self, *, inner: tuple[str, ...] = (), outer: tuple[str, ...] = ()) -> None:
        """A round before its fusion."""
        self.steps(0, 3, inner)
        self.fuser.begin_outer()
        self.inner = self.weights()
        self.steps(1, 2, outer)

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}


def zero(**changes: Any) -> FusionConfig:
    return FusionConfig(density=0.3, missing="zero", **changes)


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("rule", ["paper", "release"])
@pytest.mark.parametrize("observing", [False, True], ids=["observe()", "observing optimizer"])
def test_a_missing_parameter_takes_no_part(scope: Any, rule: str, observing: bool) -> None:
    """The round equals that of a model in which the parameter is frozen, although it was important before."""
    loop = Loop(zero(scope=scope, rule=rule), observing=observing)
    loop.train()
    loop.fuser.fuse()
    loop.train(inner=EXPERT, outer=EXPERT)
    assert all(loop.fuser.scores("outer")[name].any() for name in EXPERT)
    present = [name for name in loop.weights() if name not in EXPERT]
    rows = (loop.fuser.base(), loop.inner, loop.weights())
    rows += (loop.fuser.scores("inner"), loop.fuser.scores("outer"))
    rows = tuple({name: row[name] for name in present} for row in rows)
    expected = rkif.fuse(*rows, density=0.3, rule=rule, scope=scope)
    before = loop.weights()

    report = loop.fuser.fuse()
    found = loop.weights()
    assert all(torch.equal(found[name], expected.params[name]) for name in present)
    assert all(torch.equal(found[name], before[name]) for name in EXPERT)
    assert report.missing == EXPERT
    assert report.to_dict()["missing"] == list(EXPERT)
    assert (report.numel, report.counts) == (expected.report.numel, expected.report.counts)
    assert report.norms == pytest.approx(expected.report.norms, rel=1e-12)
    for threshold, wanted in zip(report.thresholds, expected.report.thresholds, strict=True):
        if isinstance(wanted, dict):
            assert threshold == {**wanted, **dict.fromkeys(EXPERT, float("inf"))}
        else:
            assert threshold == wanted


def test_a_gradient_of_one_learner_is_enough() -> None:
    """The importance of the other learner is updated with zeros."""
    loops = [Loop(FusionConfig(density=0.3, missing=missing)) for missing in ("zero", "raise")]
    for loop in loops:
        loop.train(inner=EXPERT[:1], outer=EXPERT[1:])
        loop.fuser.fuse()
    first, second = loops
    assert first.fuser.last_report == second.fuser.last_report
    assert first.fuser.last_report is not None
    assert first.fuser.last_report.missing == ()
    assert "missing" not in first.fuser.last_report.to_dict()
    assert all(map(torch.equal, first.weights().values(), second.weights().values()))


@pytest.mark.parametrize("missing", [None, "raise"])
def test_by_default_a_missing_parameter_is_an_error_that_names_the_setting(missing: Any) -> None:
    loop = Loop(FusionConfig(missing=missing))
    loop.train(inner=EXPERT, outer=EXPERT)
    message = (
        r"parameter '0.bias' had no gradient in any observe\(\) of this round \(2 parameters had none\): "
        r"freeze what the loss does not use .* FusionConfig\(missing='zero'\)"
    )
    with pytest.raises(ValueError, match=message):
        loop.fuser.fuse()


def test_values_that_something_else_has_changed_are_kept() -> None:
    loop = Loop(zero())
    loop.train(inner=EXPERT, outer=EXPERT)
    with torch.no_grad():
        loop.model[0].bias.add_(1.0)
    before = loop.weights()
    loop.fuser.fuse()
    assert torch.equal(loop.weights()["0.bias"], before["0.bias"])
    assert torch.equal(loop.fuser.base()["0.bias"], before["0.bias"])


def test_a_float32_master_keeps_what_rounding_took() -> None:
    """The second round does not change the master of the missing parameters."""
    loop = Loop(zero(), dtype=torch.bfloat16)
    loop.train()
    loop.fuser.fuse()
    before = loop.fuser.state_dict()
    loop.train(inner=EXPERT, outer=EXPERT)
    loop.fuser.fuse()
    after = loop.fuser.state_dict()
    for name in EXPERT:
        assert before[f"base.{name}"].dtype == torch.float32
        assert not torch.equal(before[f"base.{name}"], before[f"base.{name}"].bfloat16().float())
        assert torch.equal(after[f"base.{name}"], before[f"base.{name}"])


def test_a_resumed_round_has_the_same_missing_parameters() -> None:
    loop = Loop(zero())
    loop.train(inner=EXPERT, outer=EXPERT)
    resumed = Loop(zero())
    for parameter, value in zip(resumed.model.parameters(), loop.weights().values(), strict=True):
        parameter.data.copy_(value)
    resumed.fuser.load_state_dict(loop.fuser.state_dict())
    assert resumed.fuser.fuse() == loop.fuser.fuse()
    assert all(map(torch.equal, resumed.weights().values(), loop.weights().values()))


@pytest.mark.parametrize(("limit", "factor"), [(1e9, 0.0), (0.0, 1.0)])
def test_a_gate_decides_about_the_other_parameters(limit: float, factor: float) -> None:
    gate = Gate([Criterion("one", lambda: 1.0, floor=limit, tolerance=None)])
    loop = Loop(zero(), gate=gate)
    start = loop.weights()
    loop.train(inner=EXPERT, outer=EXPERT)
    report = loop.fuser.fuse()
    assert report.gate is not None
    assert (report.gate.factor, report.missing) == (factor, EXPERT)
    assert all(torch.equal(loop.weights()[name], start[name]) for name in EXPERT)


def test_records_count_no_element_of_a_missing_parameter(tmp_path: Path) -> None:
    loop = Loop(zero(), ledger=tmp_path)
    history = RoundHistory()
    for without in ((), EXPERT):
        loop.train(inner=without, outer=without)
        scores = loop.fuser.scores("inner"), loop.fuser.scores("outer")
        history.add(*scores, loop.fuser.fuse())
    verify(tmp_path)
    _, first, second = read_ledger(tmp_path / "ledger.jsonl")
    assert "missing" not in first
    assert second["missing"] == list(EXPERT)
    report = loop.fuser.last_report
    assert report is not None
    counts = {name: module["counts"] for name, module in second["modules"].items()}
    assert [counts[name] for name in EXPERT] == [[0] * 4] * 2
    assert [sum(column) for column in zip(*counts.values(), strict=True)] == list(report.counts.values())
    assert {name: history.tensors()[f"counts.{name}"][1].tolist() for name in counts} == counts


@pytest.mark.parametrize("missing", [None, "zero"])
def test_a_ledger_that_is_older_than_the_setting_is_continued(tmp_path: Path, missing: Any) -> None:
    loop = Loop(FusionConfig(), ledger=tmp_path)
    assert "missing" not in json.loads((tmp_path / "config.yaml").read_text())["fusion"]
    loop.train()
    loop.fuser.fuse()
    again = Loop(FusionConfig(missing=missing), ledger=tmp_path)
    again.fuser.load_state_dict(loop.fuser.state_dict())
    again.train()
    again.fuser.fuse()
    begin, *rounds = read_ledger(tmp_path / "ledger.jsonl")
    assert {record["config"] for record in rounds} == {begin["config"]}
    with pytest.raises(ValueError, match="was written with other settings"):
        Loop(FusionConfig(density=0.3, missing=missing), ledger=tmp_path)


def test_settings_are_validated() -> None:
    with pytest.raises(ValueError, match=r"missing must be .*; got 'skip'"):
        FusionConfig(missing="skip")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"pack_inner=True selects before .* needs missing='raise'"):
        zero(pack_inner=True)


def test_a_config_of_a_run_has_the_setting_only_if_it_is_set(config: Any) -> None:
    """Runs that are older than the setting are resumed with the same text."""
    configs = [config(fusion=fusion) for fusion in ({}, {"missing": "zero"})]
    first, second = (yaml.safe_load(dump_config(one))["fusion"] for one in configs)
    assert second == {**first, "missing": "zero"}
    assert "missing" not in first
