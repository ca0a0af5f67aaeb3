"""Bytes on a device in each phase of a round, by purpose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rkif.fuser.snapshot import GROUP_NUMEL, keeps_memory

Optimizer = Literal["adamw", "adamw8bit", "sgd"]
Phase = Literal["inner", "outer", "fusion"]
PHASES: tuple[Phase, ...] = ("inner", "outer", "fusion")


@dataclass(frozen=True)
class Training:
    """What is trained and how: everything except rkif's options for memory.

    Attributes:
        trainable, frozen: numbers of parameters over all ranks.
        largest: number of elements of the largest trainable parameter.
        trainable_bytes, frozen_bytes: bytes per parameter of each kind: 4 for float32, 2 for 16 bits.
        optimizer: of both learners. "adamw" stores two moments in the parameters' dtype, as PyTorch does.
            "adamw8bit" stores each moment in a byte, and a float32 scale per 256 elements. "sgd": no state.
        uncertainty: whether importance is S*U; otherwise S alone.
        ranks: processes over which everything is sharded.
    """

    trainable: int
    frozen: int
    largest: int
    trainable_bytes: int = 4
    frozen_bytes: int = 4
    optimizer: Optimizer = "adamw"
    uncertainty: bool = True
    ranks: int = 1

    @property
    def moments(self) -> float:
        """Bytes of one learner's optimizer state per trainable parameter."""
        kept = {"adamw": 2.0 * self.trainable_bytes, "adamw8bit": 2 * (1 + 4 / 256), "sgd": 0.0}
        return kept[self.optimizer]


@dataclass(frozen=True)
class Option:
    """The settings of :class:`rkif.FusionConfig` that change the memory in use."""

    pack_inner: bool = False
    offload: bool = False
    state_dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def exact(self) -> bool:
        """Whether the results have the same bits as with the default settings."""
        return self.state_dtype == "float32"

    @property
    def changes(self) -> dict[str, bool | str]:
        """The settings that differ from their defaults."""
        every = {"pack_inner": self.pack_inner, "offload": self.offload, "state_dtype": self.state_dtype}
        return {name: value for name, value in every.items() if value not in (False, "float32")}

    def bytes_a_parameter(self, training: Training) -> dict[str, dict[Phase, float]]:
        """Purpose -> phase -> bytes on the device per trainable parameter."""
        weight = float(training.trainable_bytes)
        base = 0.0 if self.offload else 4.0  # float32, also for 16-bit parameters
        inner = 0.0 if self.offload else weight
        scores = (4.0 if self.exact else 2.0) * (2 if training.uncertainty else 1)
        selected = 1 / 8 if self.pack_inner else scores
        elements = training.trainable / training.ranks
        idle_inner, idle_base = (size if keeps_memory(size * elements) else 0.0 for size in (inner, base))
        return {
            "weights": dict.fromkeys(PHASES, weight),
            "gradients": {"inner": weight, "outer": weight, "fusion": 0.0},  # zero_grad() has freed them
            "inner optimizer": dict.fromkeys(PHASES, training.moments),
            "outer optimizer": dict.fromkeys(PHASES, training.moments),
            "base": dict.fromkeys(PHASES, base),
            "inner result": {"inner": idle_inner, "outer": inner, "fusion": inner},
            "inner importance": {"inner": scores, "outer": selected, "fusion": selected},
            "outer importance": dict.fromkeys(PHASES, scores),
            "fusion": {"inner": idle_base, "outer": idle_base, "fusion": base},
        }

    def scratch(self, training: Training) -> int:
        """Bytes that a fusion needs for one group of tensors, if it fuses in groups; else 0."""
        elements = min(max(GROUP_NUMEL, -(-training.largest // training.ranks)), training.trainable)
        weight = training.trainable_bytes
        start = weight if weight < 4 else 0  # the base, rounded to the parameters' dtype
        mask = 2 if self.pack_inner else 0
        # The result of this group, and base and inner result of this group and the next.
        offloaded = 4 + 2 * (4 + weight) if self.offload else 0
        return elements * (start + mask + offloaded)


OPTIONS = tuple(
    Option(pack, offload, dtype)
    for dtype in ("float32", "bfloat16")
    for offload, pack in ((False, False), (False, True), (True, False), (True, True))
)
"""Exact options first; among these, faster ones first. Packing needs passes over masks, offloading copies."""


@dataclass(frozen=True)
class Budget:
    """The memory that an option needs on one device.

    Attributes:
        option: the settings.
        phases: phase -> total bytes.
        peak: the phase that needs most.
        fits: whether the device has enough memory.
    """

    option: Option
    phases: dict[Phase, int]
    fits: bool

    @property
    def peak(self) -> Phase:
        return max(PHASES, key=lambda phase: self.phases[phase])

    @property
    def bytes(self) -> int:
        return self.phases[self.peak]


def budget(option: Option, training: Training, *, memory: int, reserve: int) -> Budget:
    """The budget of an option, with ``reserve`` bytes for activations and all else that is not counted."""
    rows = option.bytes_a_parameter(training).values()
    frozen = training.frozen * training.frozen_bytes / training.ranks
    phases: dict[Phase, int] = {}
    for phase in PHASES:
        total = training.trainable * sum(row[phase] for row in rows) / training.ranks
        phases[phase] = round(frozen + total) + reserve
    phases["fusion"] += option.scratch(training)
    return Budget(option, phases, max(phases.values()) <= memory)


def choose(training: Training, *, memory: int, reserve: int) -> tuple[list[Budget], Budget | None]:
    """The budgets of all options, and the first that fits, or None. See :data:`OPTIONS` for the order."""
    budgets: Sequence[Budget] = [
        budget(option, training, memory=memory, reserve=reserve) for option in OPTIONS
    ]
    return list(budgets), next((each for each in budgets if each.fits), None)
