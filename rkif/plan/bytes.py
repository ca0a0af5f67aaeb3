"""Bytes that a round holds on a device, phase by phase, by what they are for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rkif.fuser.snapshot import GROUP_NUMEL

Optimizer = Literal["adamw", "adamw8bit", "sgd"]
Phase = Literal["inner", "outer", "fusion"]
PHASES: tuple[Phase, ...] = ("inner", "outer", "fusion")


@dataclass(frozen=True)
class Training:
    """What is trained, and how, whatever rkif does about memory.

    Attributes:
        trainable, frozen: number of parameters, over all ranks.
        largest: number of elements of the largest trainable parameter.
        trainable_bytes, frozen_bytes: of one parameter of either kind: 4 for float32, 2 for 16 bits.
        optimizer: of both learners. AdamW keeps its two moments in the parameters' dtype, as PyTorch's does;
            "adamw8bit" keeps a byte for each, and two float32 scales for every 256; "sgd" nothing.
        uncertainty: whether importance is S*U, or S alone.
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
        """Bytes a trainable parameter of one learner's optimizer."""
        kept = {"adamw": 2.0 * self.trainable_bytes, "adamw8bit": 2 * (1 + 4 / 256), "sgd": 0.0}
        return kept[self.optimizer]


@dataclass(frozen=True)
class Option:
    """Settings of :class:`rkif.FusionConfig` that decide how much memory is held."""

    pack_inner: bool = False
    offload: bool = False
    state_dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def exact(self) -> bool:
        """Whether the results are those of the plain way, bit for bit."""
        return self.state_dtype == "float32"

    @property
    def changes(self) -> dict[str, bool | str]:
        """What differs from the defaults."""
        every = {"pack_inner": self.pack_inner, "offload": self.offload, "state_dtype": self.state_dtype}
        return {name: value for name, value in every.items() if value not in (False, "float32")}

    def bytes_a_parameter(self, training: Training) -> dict[str, dict[Phase, float]]:
        """Purpose -> phase -> bytes on the device for each trainable parameter."""
        weight = float(training.trainable_bytes)
        base = 0.0 if self.offload else 4.0  # of 16-bit parameters a float32 master
        inner = 0.0 if self.offload else weight
        scores = (4.0 if self.exact else 2.0) * (2 if training.uncertainty else 1)
        selected = 1 / 8 if self.pack_inner else scores
        return {
            "weights": dict.fromkeys(PHASES, weight),
            "gradients": {"inner": weight, "outer": weight, "fusion": 0.0},  # zero_grad() has freed them
            "inner optimizer": dict.fromkeys(PHASES, training.moments),
            "outer optimizer": dict.fromkeys(PHASES, training.moments),
            "base": dict.fromkeys(PHASES, base),
            "inner result": {"inner": 0.0, "outer": inner, "fusion": inner},
            "inner importance": {"inner": scores, "outer": selected, "fusion": selected},
            "outer importance": dict.fromkeys(PHASES, scores),
            "fusion": {"inner": 0.0, "outer": 0.0, "fusion": base},
        }

    def scratch(self, training: Training) -> int:
        """Bytes that a fusion needs for the tensors it is at, where it goes through them in groups."""
        elements = min(max(GROUP_NUMEL, -(-training.largest // training.ranks)), training.trainable)
        weight = training.trainable_bytes
        start = weight if weight < 4 else 0  # the base as the learners saw it
        mask = 2 if self.pack_inner else 0
        # The result, and base and inner result of this group and the next.
        offloaded = 4 + 2 * (4 + weight) if self.offload else 0
        return elements * (start + mask + offloaded)


OPTIONS = tuple(
    Option(pack, offload, dtype)
    for dtype in ("float32", "bfloat16")
    for offload, pack in ((False, False), (False, True), (True, False), (True, True))
)
"""From what is exact and fast to what is neither: packing costs a pass over bits, offloading the bus."""


@dataclass(frozen=True)
class Budget:
    """What an option takes of one device.

    Attributes:
        option: the settings.
        phases: phase -> bytes in all.
        peak: the phase that takes most.
        fits: whether that is at most what there is.
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
    """What an option takes, with ``reserve`` bytes for activations and all else that is not counted."""
    rows = option.bytes_a_parameter(training).values()
    frozen = training.frozen * training.frozen_bytes / training.ranks
    phases: dict[Phase, int] = {}
    for phase in PHASES:
        held = training.trainable * sum(row[phase] for row in rows) / training.ranks
        phases[phase] = round(frozen + held) + reserve
    phases["fusion"] += option.scratch(training)
    return Budget(option, phases, max(phases.values()) <= memory)


def choose(training: Training, *, memory: int, reserve: int) -> tuple[list[Budget], Budget | None]:
    """All options, and the first that fits: exact ones come before others, and faster ones before slower."""
    budgets: Sequence[Budget] = [
        budget(option, training, memory=memory, reserve=reserve) for option in OPTIONS
    ]
    return list(budgets), next((one for one in budgets if one.fits), None)
