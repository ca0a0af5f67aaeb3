"""The state of a ``Fuser``: saved, loaded, rolled back and cleared."""

from __future__ import annotations

import copy
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from fuser_loop import Loop, make_model, poisoned_loop
from safetensors.torch import load, save
from torch import Tensor, nn

from rkif import Fuser, FusionConfig
from rkif.fuser.parameters import arena
from rkif.gate import Criterion, Gate


@pytest.mark.parametrize("killed_at", range(22))
def test_resumed_at_any_point_of_a_round_gives_the_same_bits(killed_at: int) -> None:
    config = FusionConfig(density=0.3)
    straight = Loop(config)
    straight.run(range(22))

    first = Loop(config)
    first.run(range(killed_at))
    file = save(first.fuser.state_dict())  # safetensors saves only tensors
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


@pytest.mark.parametrize("name", ["round", "base.0.weight", "outer_importance.sensitivity.0.weight"])
def test_a_state_has_only_tensors(name: str) -> None:
    fuser = Fuser(make_model(), FusionConfig())
    state = fuser.state_dict()
    assert name in state
    for value in (0, None, state[name].tolist()):
        with pytest.raises(TypeError, match=rf"state\['{name}'\] must be a tensor; got "):
            fuser.load_state_dict(state | {name: value})


@pytest.mark.parametrize("ended_by", ["fusion", "rollback", "refusal", "gate"])
def test_static_importance_is_that_of_the_first_fusion(ended_by: str) -> None:
    """Outer importance is estimated until the first fusion, also over a resume, and fixed afterwards."""
    figures = iter([0.0, 1.0, 1.0, 1.0] + 20 * [0.0])
    gate = Gate([Criterion("loss", lambda: next(figures), higher_is_better=False)])
    config = FusionConfig(refresh_outer=False, nonfinite="skip")
    loop = Loop(config)
    loop.fuser = Fuser(loop.model, config, gate=gate if ended_by == "gate" else None)
    if ended_by == "rollback":
        loop.run(range(2))
        loop.fuser.rollback()
    elif ended_by == "refusal":
        loop.run(range(6))
        loop.model[0].weight.grad = torch.full((9, 4), torch.nan)
        loop.fuser.observe()
        assert not loop.fuser.fuse().applied
        loop.model.zero_grad()
    else:
        loop.run(range(7))
        assert loop.fuser.last_report is not None
        assert loop.fuser.last_report.applied == (ended_by == "fusion")
    if ended_by != "fusion":
        loop.run(range(7, 14))
    found = loop.fuser.scores("outer")
    assert all(scores.max() > 0 for scores in found.values())
    state = loop.fuser.state_dict()
    loop.fuser = Fuser(loop.model, config, gate=gate if ended_by == "gate" else None)
    loop.fuser.load_state_dict(state)
    loop.run(range(14, 21))
    assert all(torch.equal(found[name], scores) for name, scores in loop.fuser.scores("outer").items())
    loop.run(range(21, 26))
    loop.model[0].weight.grad = torch.full((9, 4), torch.nan)
    loop.fuser.observe()
    assert loop.fuser.fuse().nonfinite == 36  # still estimated


def test_a_state_on_disk_is_replaced_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(FusionConfig())
    (tmp_path / "link").symlink_to(tmp_path / "state")
    loop.fuser.save(tmp_path / "state")
    loop.run(range(5))
    loop.fuser.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    loop.fuser.load(tmp_path / "state")
    assert loop.fuser.phase == "outer"

    rename = os.rename
    for fails in ("rename", "killed"):

        def broken(source: Path, target: Path, fails: str = fails) -> None:
            if Path(source).suffix == ".rkif-new":
                raise OSError("no more names") if fails == "rename" else KeyboardInterrupt
            rename(source, target)

        monkeypatch.setattr(os, "rename", broken)
        loop.run(range(5, 7))
        with pytest.raises((OSError, KeyboardInterrupt)):
            loop.fuser.save(tmp_path / "state")
        monkeypatch.undo()
        loop.run(range(7, 8))
        loop.fuser.load(tmp_path / "state")
        assert loop.fuser.phase == "outer"
    loop.fuser.save(tmp_path / "state")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"link", "state"}

    (file,) = (tmp_path / "state").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(RuntimeError, match=r"state could not be read: "):
        loop.fuser.load(tmp_path / "state")


def test_save_does_not_overwrite_other_files(tmp_path: Path) -> None:
    fuser = Fuser(nn.Linear(3, 3))
    (tmp_path / "thesis.txt").write_text("years of work")
    for folder, named in ((tmp_path, "thesis.txt"), (tmp_path / "thesis.txt", "thesis.txt")):
        with pytest.raises(ValueError, match=f"holds '{named}', which is not part of a state"):
            fuser.save(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    (tmp_path / "empty").mkdir()
    fuser.save(tmp_path / "empty")
    fuser.save(tmp_path / "empty")
    fuser.load(tmp_path / "empty")


def test_a_state_with_a_similar_name_is_kept(tmp_path: Path) -> None:
    fuser = Fuser(nn.Linear(3, 3))
    for name in ("state.old", "state.tmp"):
        fuser.save(tmp_path / name)
    for _ in range(2):
        fuser.save(tmp_path / "state")
    assert {path.name for path in tmp_path.iterdir()} == {"state", "state.old", "state.tmp"}


def test_a_failed_write_raises_an_error(tmp_path: Path) -> None:
    """A limit on the size of files simulates a full disk."""
    fuser = Fuser(nn.Linear(300, 300))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(RuntimeError, match="state could not be written: rank 0 failed: OSError"):
            fuser.save(tmp_path / "state")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not (tmp_path / "state").exists()


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


def test_an_incompatible_state_is_refused_and_changes_nothing() -> None:
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
    refused(
        state | {"base.x": torch.ones(1)}, "the state has an entry that this fuser does not have: 'base.x'"
    )
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
        loop.run(range(7))  # another round works


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


def test_observed_counts_survive_a_resume() -> None:
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


def test_state_is_aligned_for_wide_accesses() -> None:
    shapes = [torch.Size(shape) for shape in ((3,), (5, 7), (), (0,), (64,))]
    for dtype in (torch.float32, torch.bfloat16):
        views = arena(shapes, dtype, torch.device("cpu"))
        assert [view.shape for view in views] == shapes
        assert all((view.data_ptr() - views.flat.data_ptr()) % 64 == 0 for view in views if view.numel())
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


def test_parameter_names_may_equal_section_names() -> None:
    names = ("weight", "base.weight", "inner.weight", "start.inner_importance.sensitivity.weight")
    parameters = [(name, nn.Parameter(torch.ones(size))) for size, name in enumerate(names, start=1)]
    fuser = Fuser(parameters)
    for _, parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    fuser.observe()
    fuser.begin_outer()
    state = fuser.state_dict()
    fuser.load_state_dict(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in fuser.state_dict().items())
