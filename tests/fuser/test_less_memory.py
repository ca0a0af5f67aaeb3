"""Options that reduce memory: the bits stay the same, and the memory is not allocated."""

from __future__ import annotations

import gc
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from fuser_loop import Loop, make_model
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor, nn

import rkif
from rkif.fuser import snapshot as snapshots
from rkif.fuser.bitmask import packed_masks, repacked, unpacked
from rkif.gate import Criterion, Gate
from rkif.plan import Option, Training
from rkif_kernels import Scores

OPTIONS = [{"pack_inner": True}, {"offload": True}, {"pack_inner": True, "offload": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options))
@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("preset", [rkif.FusionConfig.paper, rkif.FusionConfig.release])
@pytest.mark.parametrize("density", [0.3, 0, 1])
@pytest.mark.parametrize("turn", [1 << 24, 10])
def test_the_options_do_not_change_the_bits(
    options: dict[str, bool],
    scope: Any,
    preset: Any,
    density: float,
    turn: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(snapshots, "GROUP_NUMEL", turn)
    config = preset(scope=scope, density=density)
    plain, lean = Loop(config), Loop(replace(config, **options))
    for loop in (plain, lean):
        loop.run(range(21))
    assert all(torch.equal(a, b) for a, b in zip(plain.weights(), lean.weights(), strict=True))
    one, other = plain.fuser.last_report, lean.fuser.last_report
    assert one is not None
    assert other is not None
    assert (one.thresholds, one.counts, one.numel) == (other.thresholds, other.counts, other.numel)
    assert other.norms == pytest.approx(one.norms, rel=1e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options))
@pytest.mark.parametrize("stop", range(1, 14))
def test_a_state_is_resumed_at_any_point_of_a_round(options: dict[str, bool], stop: int) -> None:
    config = rkif.FusionConfig(**options)
    straight, first, second = Loop(config), Loop(config), Loop(config)
    straight.run(range(14))
    first.run(range(stop))
    second.fuser.load_state_dict(load(save(first.fuser.state_dict())))
    for one, other in ((second.model, first.model), (second.inner, first.inner), (second.outer, first.outer)):
        one.load_state_dict(other.state_dict())
    second.run(range(stop, 14))
    assert all(torch.equal(a, b) for a, b in zip(straight.weights(), second.weights(), strict=True))
    state, expected = second.fuser.state_dict(), straight.fuser.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_a_packed_state_is_validated_before_it_is_loaded() -> None:
    loop = Loop(rkif.FusionConfig(pack_inner=True))
    loop.run(range(5))
    state = loop.fuser.state_dict()
    assert state["inner_importance.mask.0.weight"].unique().tolist() == [0, 1]
    other = Loop(rkif.FusionConfig(pack_inner=True))
    before = other.fuser.state_dict()
    wrong = torch.zeros(3)
    for changed, message in (
        ({name: t for name, t in state.items() if name != "inner_thresholds"}, "inner_thresholds"),
        (state | {"inner_thresholds": wrong}, "must have 1 elements"),
        (state | {"inner_importance.mask.0.bias": wrong.to(torch.uint8)}, r"mask\.0\.bias"),
    ):
        with pytest.raises(ValueError, match=message):
            other.fuser.load_state_dict(changed)
        after = other.fuser.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(ValueError, match="has an entry that this fuser does not have"):
        Loop(rkif.FusionConfig()).fuser.load_state_dict(state)


def test_packed_scores_cannot_be_read_in_the_outer_phase() -> None:
    loop = Loop(rkif.FusionConfig(pack_inner=True))
    loop.run(range(4))
    with pytest.raises(RuntimeError, match="pack_inner"):
        loop.fuser.scores("inner")
    assert set(loop.fuser.scores("outer")) == set(loop.fuser.base())
    loop.fuser.rollback()
    assert not any(score.any() for score in loop.fuser.scores("inner").values())


def test_packing_needs_an_inner_importance_that_is_cleared() -> None:
    with pytest.raises(ValueError, match=r"pack_inner=True discards the inner importance.*clear_inner"):
        rkif.FusionConfig(pack_inner=True, clear_inner=False)


def storages() -> dict[int, int]:
    """Address -> bytes of all dense float and byte tensors; views of one storage count once."""
    gc.collect()
    return {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in gc.get_objects()
        if type(t) in (Tensor, nn.Parameter)
        and t.layout is torch.strided
        and t.dtype in (torch.float32, torch.bfloat16, torch.uint8)
    }


def held(known: dict[int, int]) -> int:
    """Bytes of tensors that were allocated after ``known``."""
    return sum(size for at, size in storages().items() if at not in known)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize(
    ("options", "inner_phase", "outer_phase"),
    [
        ({}, 4 + 8 + 8, 4 + 8 + 8 + 4),
        ({"pack_inner": True}, 4 + 8 + 8, 4 + 8 + 4 + 1 / 8),
        ({"state_dtype": "bfloat16"}, 4 + 4 + 4, 4 + 4 + 4 + 4),
        ({"importance": "sensitivity", "pack_inner": True}, 4 + 4 + 4, 4 + 4 + 4 + 1 / 8),
    ],
)
def test_bytes_per_parameter_are_those_of_the_plan(
    options: dict[str, Any],
    inner_phase: float,
    outer_phase: float,
    kept: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(snapshots, "KEPT_BYTES", 1 << 20 if kept else 0)
    names = ("base", "inner result", "inner importance", "outer importance")
    config = rkif.FusionConfig(**options)
    state: Any = str(config.state_dtype).removeprefix("torch.")
    option = Option(config.pack_inner, config.offload, state)
    planned = option.bytes_a_parameter(Training(256 * 256, 0, 256 * 256, uncertainty=config.uses_uncertainty))
    assert sum(planned[name]["inner"] for name in names) == inner_phase + 4 * kept
    assert sum(planned[name]["outer"] for name in names) == outer_phase
    assert planned["fusion"]["outer"] == 4 * kept

    model = nn.Linear(256, 256, bias=False)
    model(torch.zeros(1, 256)).sum().backward()
    known = storages() | {model.weight.grad.untyped_storage().data_ptr(): 0}
    fuser = rkif.Fuser(model, config)
    fuser.observe()
    for expected, go_on in ((inner_phase, fuser.begin_outer), (outer_phase, fuser.observe)):
        assert held(known) == pytest.approx(expected * 256 * 256, abs=512)
        go_on()
    fuser.fuse()
    # Memory that stays allocated: the inner learner's copy and the previous base.
    assert held(known) == pytest.approx((inner_phase + 8 * kept) * 256 * 256, abs=512)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options))
@pytest.mark.parametrize(("tolerance", "factor"), [(100.0, 1.0), (1.0, 0.1), (0.0, 0.0)])
def test_the_gate_gives_the_same_verdicts(
    options: dict[str, bool], dtype: torch.dtype, tolerance: float, factor: float
) -> None:
    """The gate's verdict depends on the distance of the parameters from their start."""
    plain, lean = (gated_round(dtype, tolerance, chosen) for chosen in ({}, options))
    assert plain.last_report is not None
    assert plain.last_report.gate is not None
    assert plain.last_report.gate.factor == factor
    state, expected = lean.state_dict(), plain.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    base, expected = lean.base(), plain.base()
    assert all(torch.equal(base[name], expected[name]) for name in expected)
    assert lean.last_report is not None
    assert lean.last_report.norms == pytest.approx(plain.last_report.norms, rel=1e-6)


def gated_round(dtype: torch.dtype, tolerance: float, options: dict[str, bool]) -> rkif.Fuser:
    """One round with a long step of both learners; it ends with the parameters at the fuser's base."""
    model = make_model(dtype=dtype)
    start = [p.detach().clone() for p in model.parameters()]

    def distance() -> float:
        pairs = zip(model.parameters(), start, strict=True)
        return float(sum((p.detach() - s).float().abs().sum() for p, s in pairs))

    criterion = Criterion("distance", distance, higher_is_better=False, tolerance=tolerance)
    fuser = rkif.Fuser(model, rkif.FusionConfig(**options), gate=Gate([criterion], ladder=(0.5, 0.1)))
    for go_on in (fuser.begin_outer, fuser.fuse):
        for number, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(number)).to(dtype)
        fuser.observe()
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(p.grad, alpha=0.1)
        go_on()
    base = fuser.base()
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters())
    return fuser


@given(
    st.lists(st.floats(0, 4, width=32), max_size=40),
    st.sampled_from([-torch.inf, 0.0, 0.5, 1.0, torch.inf]),
    st.booleans(),
)
def test_packing_keeps_the_mask(values: list[float], threshold: float, product: bool) -> None:
    s = torch.tensor(values, dtype=torch.float32)
    u = s.flip(0).bfloat16() if product else None
    scores = Scores([s], None if u is None else [u])
    expected = (s if u is None else s * u.float()) > threshold
    (packed,) = packed_masks(scores, torch.tensor([threshold]))
    assert packed.numel() == -(-len(values) // 8)
    assert torch.equal(unpacked(packed, s.shape) > 0.5, expected)
    assert torch.equal(repacked(expected.to(torch.uint8)), packed)


def test_density_one_selects_nan_scores() -> None:
    """As in the kernels, a threshold of -inf selects every element, although no comparison with NaN holds."""
    scores = Scores([torch.tensor([torch.inf, 1.0])], [torch.tensor([0.0, 1.0])])
    (packed,) = packed_masks(scores, torch.tensor([-torch.inf]))
    assert packed.tolist() == [3]


@pytest.mark.parametrize(("kept", "pieces"), [(1 << 20, [96, 32]), (0, [48, 32, 48])])
def test_large_copies_are_allocated_in_pieces(
    kept: int, pieces: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "KEPT_BYTES", kept)
    monkeypatch.setattr(snapshots, "GROUP_NUMEL", 40)
    values = [torch.randn(size) for size in (17, 0, 16, 3, 41)]
    dtypes = [torch.float32] * 3 + [torch.bfloat16, torch.float32]
    snapshot = snapshots.Snapshot(values, dtypes, offload=False)
    assert [arena.numel() for arena in snapshot._arenas] == pieces
    found = [torch.empty_like(value) for value in values]
    for _ in range(2):
        snapshot.copy_from(range(5), values)
        snapshot.copy_to(found)
        for got, value, dtype in zip(found, values, dtypes, strict=True):
            assert torch.equal(got, value.to(dtype).float())
        assert all(tensor.data_ptr() % 64 == 0 for tensor in snapshot.tensors)
        snapshot.free()
        held = [arena.untyped_storage().nbytes() for arena in snapshot._arenas]
        assert any(held) == bool(kept)
        snapshot.allocate()


@pytest.mark.parametrize("preset", [rkif.FusionConfig.paper(), rkif.FusionConfig(scope="tensor")])
@pytest.mark.parametrize("turn", [10, 1 << 24])
def test_rounds_in_reused_memory_give_the_same_bits(
    preset: rkif.FusionConfig, turn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, loop = Loop(preset), Loop(preset)
    expected.run(range(35))
    monkeypatch.setattr(snapshots, "KEPT_BYTES", 0)
    monkeypatch.setattr(snapshots, "GROUP_NUMEL", turn)
    others = []  # of the same sizes, so they reuse freed memory
    for event in range(35):
        loop.run(range(event, event + 1))
        others.append(torch.full((16 * (1 + event % 5),), torch.nan))
        others.extend(torch.full_like(weight, torch.nan) for weight in loop.weights())
    assert all(map(torch.equal, loop.weights(), expected.weights()))
    state, wanted = loop.fuser.state_dict(), expected.fuser.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in wanted.items())


def test_groups_cover_every_tensor_once() -> None:
    for sizes, size in product([[], [0], [5], [3, 4, 0, 9, 1, 1], [0, 0, 20, 0]], [1, 4, 100]):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(snapshots, "GROUP_NUMEL", size)
            found = snapshots.groups(sizes)
        assert [number for turn in found for number in turn] == list(range(len(sizes)))
        for turn in found:
            filled = [sizes[number] for number in turn if sizes[number]]
            assert len(filled) <= 1 or sum(filled) <= size


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_asynchronous_copies_give_the_same_bits(
    options: dict[str, bool], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, copies run during the learners' steps: large tensors, small groups, no synchronisation."""
    monkeypatch.setattr(snapshots, "GROUP_NUMEL", 1 << 20)
    ends = []
    for chosen in ({}, options):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(1500, 1500) for _ in range(6))).to("cuda", dtype)
        fuser = rkif.Fuser(model, rkif.FusionConfig(**chosen))
        for step in range(4):
            for _ in range(2):
                generator = torch.Generator("cuda").manual_seed(step)
                for p in model.parameters():
                    p.grad = torch.randn(p.shape, generator=generator, device="cuda").to(dtype)
                fuser.observe()
                with torch.no_grad():
                    for p in model.parameters():
                        p.sub_(p.grad, alpha=0.01)
                if fuser.phase == "inner":
                    fuser.begin_outer()
            fuser.fuse()
        state = fuser.state_dict().values()
        ends.append([tensor.detach().cpu() for tensor in (*model.parameters(), *state)])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
