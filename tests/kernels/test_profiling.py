"""Operations have names in profiles; without a profile no range is recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch

import rkif_kernels
from rkif_kernels import ImportancePlan, Scores, Smoothing
from rkif_kernels.profiling import profiled

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def ones() -> list[torch.Tensor]:
    return [torch.ones(5, device=DEVICE)]


def nonfinite() -> torch.Tensor:
    return torch.zeros(1, dtype=torch.int64, device=DEVICE)


def fuse() -> None:
    thresholds = torch.zeros(1, device=DEVICE), torch.zeros(1, device=DEVICE)
    rkif_kernels.fuse_(
        ones(), ones(), ones(), ones(), Scores(ones()), Scores(ones()),
        thresholds=thresholds, weights=((1, 0), (0, 1), (1, 1), (0, 0)),
    )  # fmt: skip


def select_and_fuse() -> None:
    rkif_kernels.select_and_fuse_(
        ones(), ones(), ones(), ones(), Scores(ones()), Scores(ones()),
        density=0.5, weights=((1, 0), (0, 1), (1, 1), (0, 0)),
    )  # fmt: skip


CALLS: dict[str, tuple[Callable[[], object], set[str]]] = {
    "update": (
        lambda: rkif_kernels.update_importance_(ones(), ones(), ones(), beta1=0.5, nonfinite=nonfinite()),
        {"rkif.observe"},
    ),
    "plan": (
        lambda: ImportancePlan(ones(), smoothing=Smoothing(0.5), nonfinite=nonfinite()).update(
            ones(), ones()
        ),
        {"rkif.observe"},
    ),
    "thresholds": (
        lambda: rkif_kernels.score_thresholds(Scores(ones()), density=0.5),
        {"rkif.threshold"},
    ),
    "fuse": (fuse, {"rkif.fuse"}),
    "select and fuse": (select_and_fuse, {"rkif.fuse"}),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_profile_names_the_operation(call: str) -> None:
    operation, names = CALLS[call]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        operation()
    found = {event.name for event in profile.events() if event.name.startswith("rkif.")}
    if call == "select and fuse":
        found -= {"rkif.threshold"}  # some backends find thresholds in an earlier pass
    assert found == names


@pytest.mark.parametrize("call", CALLS)
def test_no_range_is_recorded_without_a_profiler(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def record(name: str) -> None:
        raise AssertionError(name)

    monkeypatch.setattr(torch.profiler, "record_function", record)
    CALLS[call][0]()


def test_nvtx_ranges_are_for_cuda_and_end_with_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    @contextmanager
    def nvtx(name: str) -> Iterator[None]:
        log.append(f"push {name}")
        try:
            yield
        finally:
            log.append("pop")

    monkeypatch.setattr(torch.cuda.nvtx, "range", nvtx)
    monkeypatch.setattr(torch._C, "_nvtx", object(), raising=False)
    with profiled("rkif.fuse", torch.device("cpu")):
        assert log == []
    with pytest.raises(ZeroDivisionError), profiled("rkif.fuse", torch.device("cuda", 0)):
        raise ZeroDivisionError
    assert log == ["push rkif.fuse", "pop"]


def test_a_pytorch_without_nvtx_records_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C, "_nvtx", raising=False)
    assert isinstance(profiled("rkif.fuse", torch.device("cuda", 0)), nullcontext)
