"""The three kinds of cases: damaged files, killed commands, and random calls."""

from __future__ import annotations

import math
import random
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import rkif
from bench.fuzzing.commandline import command
from bench.fuzzing.mutations import mutate
from bench.fuzzing.subjects import VICTIM, Subjects, contents, results
from rkif_kernels import FusionInputs, MergeRule, Scores, order_statistic_k
from rkif_kernels.backends import reference
from rkif_kernels.types import Scope

# Commands on a run with their options. True: the command may change the run if it succeeds.
COMMANDS = (
    ("log", (), False),
    ("log", ("--verify",), False),
    ("report", (), True),
    ("rollback", ("--to", "1"), True),
    ("reproduce", ("--round", "2"), False),
    ("run", ("--resume",), True),
)


class Outcome(NamedTuple):
    """The result of a case.

    Attributes:
        where: a description of the case.
        wrong: the defect; None if there is none.
        kills: number of processes that were killed.
    """

    where: str
    wrong: str | None
    kills: int = 0


def _unseen(done: str) -> bool:
    """Whether verification does not report this damage, as documented.

    docs/guide/ledger.md: `report.html` is not recorded, a state may be missing, and files added to the folder
    of a run itself are not reported. docs/guide/signatures.md: `provenance.json` is not in the manifest.
    """
    place, _, damage = done.partition(": ")
    at_top = "/" not in place
    return (
        place in ("report.html", "provenance.json")
        or (place.startswith("snapshots/") and damage == "deleted")
        or (at_top and damage.endswith("added beside it"))
    )


def mutation(seed: int, subjects: Subjects) -> Outcome:
    """Damage a run or a fused output. Every command must then work correctly, or fail with one line."""
    choose = random.Random(seed)
    original = choose.choice([subjects.run, subjects.run, subjects.fused])
    done = None
    while done is None:
        copy = subjects.copy_of(original)
        done = mutate(copy, choose)
    where = f"{original.name}/{done}"
    if original is subjects.fused:
        ended = command("verify", copy)
        unseen = done.startswith("provenance.json: ")
        wrong = ended.complaint or (None if ended.status == 1 or unseen else "verify accepts it")
        return Outcome(where, _problem("verify", wrong, copy))
    ended = command("log", copy, "--verify")
    if ended.complaint or (ended.status == 0 and not _unseen(done)):
        return Outcome(where, _problem("log --verify", ended.complaint or "it is accepted", copy))
    name, options, changes = choose.choice(COMMANDS)
    before = contents(copy)
    arguments = subjects.run_command(copy, *options) if name == "run" else [name, copy, *options]
    ended = command(*arguments)
    wrong = ended.complaint
    if wrong is None and (ended.status != 0 or not changes) and contents(copy) != before:
        wrong = "it failed and changed the run" if ended.status else "it changed the run"
    return Outcome(where, _problem(" ".join((name, *options)), wrong, copy))


def _problem(name: str, wrong: str | None, copy: Path) -> str | None:
    victim = copy.parent / "victim"
    if not victim.is_file() or victim.read_text() != VICTIM:
        return f"{name}: a file outside of the run was changed"
    return None if wrong is None else f"{name}: {wrong}"


def kill(seed: int, subjects: Subjects) -> Outcome:
    """Kill a command, perhaps several times. The documented continuation must give the same results."""
    choose = random.Random(seed)
    kind = choose.choice(["run", "run", "fuse", "rollback"])
    out = subjects.copy_of(subjects.run) if kind == "rollback" else subjects.place_for(kind)
    resume = subjects.fuse_command if kind == "fuse" else subjects.run_command
    killed = ["rollback", out, "--to", "1"] if kind == "rollback" else resume(out, "--resume")
    seconds = {"run": subjects.run_seconds, "fuse": subjects.fuse_seconds, "rollback": 0.3}[kind]
    # A command that ends before its moment is not killed.
    moments = [seconds * choose.random() for _ in range(choose.randint(1, 3))]
    kills = sum(command(*killed, kill_after=moment).status == -signal.SIGKILL for moment in moments)
    where = f"{kind} killed {kills} times"
    ended = command(*resume(out, "--resume"))
    checked = command("verify", out) if kind == "fuse" else command("log", out, "--verify")
    for step, one in (("to continue", ended), ("to verify", checked)):
        if one.complaint or one.status != 0:
            return Outcome(where, f"{step}: {one.complaint or one.errors[-200:]}", kills)
    found, wanted = results(out), results(subjects.fused if kind == "fuse" else subjects.run)
    if kind == "rollback":  # the ledger and the states have the rounds that were rolled back, too
        found, wanted = ({k: v for k, v in r.items() if k.startswith("tasks/")} for r in (found, wanted))
    names = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
    return Outcome(where, f"other results: {names[0]}" if names else None, kills)


def call(seed: int, _: Subjects) -> Outcome:
    """A call of ``rkif.fuse``, or rounds of a ``Fuser``: the reference's result, or a clear error."""
    choose = random.Random(seed)
    return (fuser_call if choose.random() < 0.3 else _fuse_call)(choose, seed)


def _fuse_call(choose: random.Random, seed: int) -> Outcome:
    generator = torch.Generator().manual_seed(seed)
    shapes = [_shape(choose) for _ in range(choose.randint(1, 4))]
    if sum(map(math.prod, shapes)) == 0:
        shapes[0] = (3,)
    names = [f"w{index}" for index in range(len(shapes))]
    dtypes = [choose.choice([torch.float32, torch.bfloat16, torch.float16]) for _ in shapes]

    def params() -> dict[str, Tensor]:
        rows = zip(names, shapes, dtypes, strict=True)
        return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape, dtype in rows}

    def scores() -> dict[str, Tensor]:
        kind = choose.choice(["random", "ties", "zero", "infinite"])
        uniform = {
            name: torch.rand(shape, generator=generator) for name, shape in zip(names, shapes, strict=True)
        }
        changes: dict[str, Callable[[Tensor], Tensor]] = {
            "random": torch.clone,
            "ties": lambda t: (4 * t).round(),
            "zero": torch.zeros_like,
            "infinite": lambda t: torch.where(t > 0.7, torch.inf, t),
        }
        return {name: changes[kind](tensor) for name, tensor in uniform.items()}

    base, inner, outer, inner_scores, outer_scores = params(), params(), params(), scores(), scores()
    density = choose.choice([0.0, 1.0, 0.2, choose.random(), 1e-9])
    scope: Scope = choose.choice(["global", "tensor"])
    rule = choose.choice(["paper", "release", "sum"])
    where = f"fuse of {shapes}, {dtypes}, density {density}, {scope}, {rule}"
    if choose.random() < 0.3:
        return Outcome(where, _refused(choose, base, inner, outer, inner_scores, outer_scores))
    got = rkif.fuse(base, inner, outer, inner_scores, outer_scores, density=density, scope=scope, rule=rule)
    out = [torch.empty_like(tensor) for tensor in base.values()]
    sides = [Scores(list(side.values())) for side in (inner_scores, outer_scores)]
    limits = [_thresholds(side.sensitivity, density, scope) for side in sides]
    weights = rkif.config.merge_weights(rule).cases
    lists = [list(row.values()) for row in (base, inner, outer)]
    inputs = FusionInputs(out, lists[0], lists[1], lists[2], sides[0], sides[1])
    reference.fuse_(inputs, (limits[0], limits[1]), MergeRule(weights, "inner"))
    for name, expected in zip(names, out, strict=True):
        fused = got.params[name]
        if not torch.equal(torch.nan_to_num(fused.float()), torch.nan_to_num(expected.float())):
            return Outcome(where, f"{name} differs from the reference")
    return Outcome(where, None)


def _thresholds(scores: Sequence[Tensor], density: float, scope: Scope) -> Tensor:
    """The thresholds by sorting; -inf selects everything."""
    flat = [tensor.reshape(-1) for tensor in scores]
    groups = flat if scope == "tensor" else [torch.cat(flat)]
    limits = []
    for group in groups:
        k = order_statistic_k(group.numel(), density) if group.numel() and density < 1 else -1
        limits.append(float(group.sort().values[k]) if k >= 0 else -math.inf)
    return torch.tensor(limits)


def _refused(choose: random.Random, *given: dict[str, Tensor]) -> str | None:
    """Make one argument invalid; the error must name it, and nothing may be written."""
    arguments = ("base", "inner", "outer", "inner_importance", "outer_importance")
    place = choose.randrange(len(arguments))
    name = choose.choice(list(given[place]))
    tensor = given[place][name]
    spoiled: list[Any] = [tensor.double(), tensor.reshape(-1)[:-1], tensor.to_sparse(), None, "tensor"]
    if place > 2 and tensor.numel():
        spoiled += [-1 - tensor, torch.full_like(tensor, torch.nan)]
    out = {key: torch.zeros_like(value) for key, value in given[0].items()}
    changed: list[dict[str, Any]] = [dict(row) for row in given]
    # An empty tensor has no last element to remove.
    changed[place][name] = choose.choice(spoiled if tensor.numel() else [None, "tensor"])
    try:
        rkif.fuse(*changed, out=out)
    except (TypeError, ValueError) as error:
        if any(tensor.any() for tensor in out.values()):
            return f"{arguments[place]}[{name!r}] was refused after something was written"
        return None if arguments[place] in str(error) or name in str(error) else f"not named: {error}"
    except Exception as error:
        return f"{arguments[place]}[{name!r}]: {type(error).__name__}: {error}"
    return f"{arguments[place]}[{name!r}] = {str(changed[place][name])[:60]} was accepted"


def _shape(choose: random.Random) -> tuple[int, ...]:
    long, rows, columns = choose.randint(1, 300), choose.randint(1, 40), choose.randint(1, 70)
    return choose.choice([(0,), (), (1,), (long,), (rows, columns)])


def fuser_call(choose: random.Random, seed: int) -> Outcome:
    """Rounds of a fuser, in which some parameters have no gradient."""
    torch.manual_seed(seed)
    config = rkif.FusionConfig(
        density=choose.choice([0.0, 0.2, 0.5, 1.0]),
        rule=choose.choice(["paper", "release", "sum"]),
        scope=choose.choice(["global", "tensor"]),
        importance=choose.choice(["sensitivity", "sensitivity_uncertainty"]),
        beta1=choose.choice([0.0, 0.5, 0.85, 1.0]),
        fp32_master=choose.random() < 0.5,
        missing=choose.choice([None, "raise", "zero"]),
    )
    units = choose.randint(1, 60)
    model = nn.Sequential(nn.Linear(5, units), nn.Linear(units, 3))
    fuser = rkif.Fuser(model, config)
    wrong = None
    for _ in range(3):
        wrong = wrong or _round(choose, model, fuser)
    return Outcome(f"fuser of {units} units, {config}", wrong)


def _round(choose: random.Random, model: nn.Module, fuser: rkif.Fuser) -> str | None:
    """Run a round; returns the defect of its result, or None.

    For the parameters that had a gradient, ``rkif.fuse`` must give the same result and counts. The others
    must keep their values, or the round is refused.
    """
    names, config = list(fuser.parameters), fuser.config
    always = choose.choice(names)  # a step without any gradient is an error
    absent = [{name for name in names if choose.random() < 0.3} - {always} for _ in range(2)]
    base = fuser.base()
    _steps(model, fuser, choose.randint(1, 3), 1.0, absent[0])
    fuser.begin_outer()
    inner = _copies(model)
    _steps(model, fuser, choose.randint(1, 2), -1.0, absent[1])
    outer = _copies(model)
    missing = [name for name in names if name in absent[0] & absent[1]]
    if missing and config.missing != "zero":
        return _refused_round(model, fuser, missing[0], outer)
    rows = (base, inner, outer, fuser.scores("inner"), fuser.scores("outer"))
    present = ({name: row[name] for name in names if name not in missing} for row in rows)
    report = fuser.fuse()
    expected = rkif.fuse(*present, density=config.density, rule=config.rule, scope=config.scope)
    wanted = {**outer, **expected.params}
    if any(not torch.equal(p, wanted[name]) for name, p in model.named_parameters()):
        return "its result is not that of rkif.fuse"
    if report.counts != expected.report.counts:
        return f"its counts are {report.counts}, those of rkif.fuse {expected.report.counts}"
    if report.missing != tuple(missing):
        return f"its report has {report.missing} as missing, and {missing} had no gradient"
    return None


def _refused_round(model: nn.Module, fuser: rkif.Fuser, missing: str, outer: dict[str, Tensor]) -> str | None:
    """Fuse a round without a gradient of a parameter: an error must name it, and nothing may change."""
    try:
        fuser.fuse()
    except ValueError as error:
        if repr(missing) not in str(error):
            return f"not named: {error}"
    else:
        return f"a round without a gradient of {missing} was fused"
    if any(not torch.equal(p, outer[name]) for name, p in model.named_parameters()):
        return f"a round without a gradient of {missing} was refused after something was written"
    base = fuser.base()
    fuser.rollback()
    if any(not torch.equal(p, base[name]) for name, p in model.named_parameters()):
        return "its rollback does not return to its base"
    return None


def _copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def _steps(model: nn.Module, fuser: rkif.Fuser, count: int, sign: float, absent: set[str]) -> None:
    """Steps without a gradient of the ``absent`` parameters."""
    for _ in range(count):
        model.zero_grad()
        (sign * model(torch.randn(4, 5))).square().mean().backward()
        for name, parameter in model.named_parameters():
            if name in absent:
                parameter.grad = None
        fuser.observe()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=0.05 * sign)
