"""Merge throughput on LLaMA-2-13B's shapes: an adapter in one call, and all parameters layer by layer.

Four copies of 13 billion parameters with two importance states do not fit on one device. So the tensors of
one layer are made on the device, observed, fused and freed, then those of the next. Each layer, the
embedding, the final norm and the head have their own thresholds, which moves as many bytes as one global
threshold.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from bench.common.peak import GIB, Peak, release
from bench.common.rows import Row, row
from bench.common.timing import copy_gbps, plan, seconds
from bench.kernels.operations import BETA, DENSITY, DTYPES, WEIGHTS, Dtypes, Fuse, bytes_per_element
from bench.kernels.shapes import LLAMA_2_13B, LORA_R8, ShapeSet
from rkif_kernels import FuseStats, fuse_, score_thresholds, select_and_fuse_, update_importance_
from rkif_kernels.backends.choose import available
from rkif_kernels.types import Backend

WHOLE = LLAMA_2_13B.whole().numel


@dataclass
class Part:
    """Measurements of one set of parameters.

    Attributes:
        name: as in rows.
        numel, tensors: number of parameters and of tensors.
        dtypes: storage dtypes.
        taken: step ("observe", "fuse") -> seconds for all parameters together.
        breakdown: kernel of one group (CUDA) or operation (CPU) -> seconds.
        peak: maximum of bytes beyond the inputs (CPU) or in total (CUDA).
    """

    name: str
    numel: int
    tensors: int
    dtypes: Dtypes
    taken: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    breakdown: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    peak: int = 0

    def rows(self, device: torch.device, bandwidth: float) -> list[Row]:
        """One row per step."""
        return [
            row(
                op="profile-13b",
                shape=f"{self.name}: {step}",
                dtype=self.dtypes.name,
                implementation=f"rkif.{available(device)[0]}",
                numel=self.numel,
                tensors=self.tensors,
                seconds=[taken],
                bytes_min=self.numel * bytes_per_element(step, self.dtypes),
                copy_gbps=bandwidth,
                device=device,
                parameters_per_s=round(self.numel / taken),
                peak_bytes=self.peak,
                peak_is="allocated in total" if device.type == "cuda" else "resident, beyond the inputs",
                breakdown_ms={name: round(value * 1e3, 3) for name, value in self.breakdown.items()},
            )
            for step, taken in self.taken.items()
        ]


def profile_13b(device: torch.device, layers: int, dtypes: str) -> list[Row]:
    """Measure the adapter and ``layers`` of 40 layers; 40 adds embedding, norm and head.

    Raises:
        ValueError: ``layers`` is out of range, or ``dtypes`` is unknown.
    """
    if not 1 <= layers <= LLAMA_2_13B.layers:
        raise ValueError(f"--layers must be from 1 to {LLAMA_2_13B.layers}; got {layers}")
    if dtypes not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}; got {dtypes!r}")
    bandwidth = copy_gbps(device)
    release(device)
    chosen = DTYPES[dtypes]
    return [
        timed
        for part in (_adapter(device, chosen), _layers(device, chosen, layers))
        for timed in part.rows(device, bandwidth)
    ]


def report(measured: list[Row]) -> Iterator[str]:
    """Yield lines of text for the rows."""
    for part in measured:
        yield (
            f"{part['shape']}, {part['dtype']}, {part['implementation']} on {part['device']}: "
            f"{part['numel']:,} parameters in {part['ms_median']:,.3f} ms, "
            f"{part['parameters_per_s'] / 1e9:.3f} G parameters/s, {part['gbps']:,.1f} GB/s, "
            f"{part['share']:.0%} of a copy's {part['copy_gbps']:,.1f}; "
            f"peak memory {part['peak_bytes'] / GIB:.3f} GiB "
            f"({part['peak_is']})"
        )
        if part["shape"].startswith(LLAMA_2_13B.name + ",") and part["numel"] < WHOLE:
            yield (
                f"  extrapolated, not measured: {part['ms_median'] / 1e3 * WHOLE / part['numel']:,.2f} s "
                f"for all {WHOLE:,} parameters"
            )
    for title, breakdown in {
        part["shape"].partition(":")[0]: part["breakdown_ms"] for part in measured
    }.items():
        yield f"{title}, time by part:"
        total = sum(breakdown.values())
        for name, value in sorted(breakdown.items(), key=lambda item: -item[1]):
            yield f"  {value:12,.3f} ms  {value / total:4.0%}  {name}"


def _adapter(device: torch.device, dtypes: Dtypes) -> Part:
    """Measure the released adapter: many small tensors in one call."""
    part = Part(LORA_R8.name, LORA_R8.numel, len(LORA_R8.shapes), dtypes)
    _profile(part, _Group(LORA_R8, dtypes, device), several=True)
    release(device)
    return part


def _layers(device: torch.device, dtypes: Dtypes, layers: int) -> Part:
    """Measure the model's parameters, one group at a time."""
    stack = LLAMA_2_13B
    whole = layers == stack.layers
    shapes = stack.whole() if whole else stack.first(layers)
    name = f"{stack.name}, all parameters" if whole else shapes.name
    part = Part(f"{name}, thresholds by layer", shapes.numel, len(shapes.shapes), dtypes)
    groups = [stack.layer] * layers + [(shape,) for shape in (stack.rest if whole else ())]
    for index, group in enumerate(groups):
        tensors = _Group(ShapeSet(stack.name, group), dtypes, device)
        if index == 0 or device.type == "cuda":
            tensors.observe()  # compiles, uploads addresses, touches memory for the first time
            tensors.fuse()
        _profile(part, tensors, several=False)
        del tensors
        release(device)
    return part


class _Group:
    """Random tensors of one round that fit in memory together, and the operations on them."""

    def __init__(self, shapes: ShapeSet, dtypes: Dtypes, device: torch.device) -> None:
        fusion = Fuse(shapes, dtypes, device)
        self.device, self._backend = device, cast(Backend, available(device)[0])
        self._inner, self._sides = fusion.inner, (fusion.inner_scores, fusion.outer_scores)
        # The result is written to the gradients: a fusion into one of its inputs may need another pass.
        self._grads = [tensor.normal_() for tensor in fusion.out]
        self._lists = (self._grads, fusion.base, fusion.inner, fusion.outer, *self._sides)
        self._nonfinite = torch.zeros(1, dtype=torch.int64, device=device)

    def observe(self) -> None:
        s, u = self._sides[0].sensitivity, self._sides[0].uncertainty
        update_importance_(
            self._inner,
            self._grads,
            s,
            u,
            beta1=BETA,
            beta2=BETA,
            nonfinite=self._nonfinite,
            backend=self._backend,
        )

    def fuse(self) -> FuseStats:
        return select_and_fuse_(
            *self._lists,
            density=DENSITY,
            weights=WEIGHTS,
            backend=self._backend,
        )

    def thresholds(self) -> None:
        for scores in self._sides:
            score_thresholds(scores, density=DENSITY, backend=self._backend)

    def merge(self, thresholds: tuple[torch.Tensor, torch.Tensor]) -> None:
        fuse_(
            *self._lists,
            thresholds=thresholds,
            weights=WEIGHTS,
            backend=self._backend,
        )


def _profile(part: Part, group: _Group, several: bool) -> None:
    """Add a group's times to a part: one run of each step, or the mean of ``several``."""
    steps: dict[str, Callable[[], Any]] = {"observe": group.observe, "fuse": group.fuse}
    for name, run in steps.items():
        with Peak(group.device) as peak:
            once = seconds(run, group.device)
        used = peak.total if group.device.type == "cuda" else peak.extra
        part.peak = max(part.peak, used or 0)
        part.taken[name] += _mean(run, group.device, once) if several else once
    if group.device.type == "cuda":
        part.breakdown = part.breakdown or _kernels(steps)
        return
    thresholds = group.fuse().thresholds
    separate: dict[str, Callable[[], Any]] = {
        "observe": group.observe,
        "thresholds": group.thresholds,
        "fuse, thresholds given": lambda: group.merge(thresholds),
    }
    for name, run in separate.items():
        part.breakdown[name] += seconds(run, group.device)


def _mean(run: Callable[[], Any], device: torch.device, first: float) -> float:
    """Mean seconds of a run over many runs, which makes the synchronisation negligible."""
    seconds(run, device)
    _, iterations = plan(min(first, 0.05), round_s=0.2, total_s=0.2, rounds=(1, 1))

    def many() -> None:
        for _ in range(iterations):
            run()

    return seconds(many, device) / iterations


def _kernels(steps: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """GPU kernel -> seconds in one run of each step."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for run in steps.values():
            run()
        torch.cuda.synchronize()
    return {
        event.key: event.self_device_time_total / 1e6
        for event in trace.key_averages()
        if event.self_device_time_total
    }
