"""The importance of every parameter for one learner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from rkif.config import FusionConfig
from rkif.fuser.bitmask import packed_masks, repacked, unpacked
from rkif.fuser.parameters import arena
from rkif_kernels import ImportancePlan, Scores, Smoothing, Views

_PLANS = 2  # plans that are kept: see Importance._plans


class Importance:
    """Smoothed sensitivity S, and uncertainty U where the config uses it, of a list of tensors.

    The inner and the outer learner each have one. Both start at zero. A mask of one bit per element can
    replace the scores (:meth:`pack`) until they are cleared.

    Args:
        tensors: name -> parameter, or the shard of it in this process; gives shapes and device.
        config: the settings.

    Attributes:
        thresholds: those of the mask; None unless the scores are packed.
    """

    def __init__(self, tensors: Mapping[str, Tensor], config: FusionConfig) -> None:
        self._config = config
        self._smoothing = Smoothing(config.beta1, config.beta2, config.order)
        self._parts = ["sensitivity", *(["uncertainty"] if config.uses_uncertainty else [])]
        self._names = list(tensors)
        self._shapes = [tensor.shape for tensor in tensors.values()]
        self._device = next(iter(tensors.values())).device
        self._views: dict[str, Views] = {}
        self._packed: list[Tensor] = []
        # Address of the counter -> indices and plan: for tensors that this process counts, and for replicas.
        self._plans: dict[int, tuple[Sequence[int] | None, ImportancePlan]] = {}
        self.thresholds: Tensor | None = None
        self.clear()

    def update(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        nonfinite: Tensor,
        indices: Sequence[int] | None = None,
        *,
        frozen: bool = False,
    ) -> None:
        """Update by one step.

        Args:
            parameters, gradients: of all tensors, before the optimizer's step. A gradient that is None counts
                as zero.
            nonfinite: int64 [1], mutated: elements whose importance is not finite are added to it.
            indices: which tensors to update; all by default.
            frozen: leave the importance as it is, and only count elements that are not finite.
        """
        planned, plan = self._plans.get(nonfinite.data_ptr(), (None, None))
        if plan is None or planned != indices:
            plan = self._plan(nonfinite, range(len(self._names)) if indices is None else indices)
            self._plans[nonfinite.data_ptr()] = indices, plan
            if len(self._plans) > _PLANS:
                del self._plans[next(iter(self._plans))]
        if indices is not None and len(indices) < len(self._names):
            parameters = [parameters[index] for index in indices]
            gradients = [gradients[index] for index in indices]
        plan.update(parameters, gradients, frozen=frozen)

    def _plan(self, nonfinite: Tensor, indices: Sequence[int]) -> ImportancePlan:
        scores = self.of(indices)
        return ImportancePlan(
            scores.sensitivity,
            scores.uncertainty,
            smoothing=self._smoothing,
            nonfinite=nonfinite,
            names=[self._names[index] for index in indices],
        )

    def update_arguments(self, indices: Sequence[int], *, frozen: bool = False) -> dict[str, Any]:
        """The keyword arguments with which an operation updates the importance of some tensors."""
        smoothing = self._smoothing.frozen if frozen else self._smoothing
        states = {part: [views[index] for index in indices] for part, views in self._views.items()}
        names = [self._names[index] for index in indices]
        return {**states, **asdict(smoothing), "names": names}

    def clear(self) -> None:
        """Set the importance to zero."""
        self._packed, self.thresholds = [], None
        if self._views:
            for views in self._views.values():
                views.flat.zero_()
            return
        for part in self._parts:
            self._views[part] = arena(self._shapes, self._config.state_dtype, self._device)

    @property
    def scores(self) -> Scores:
        """The scores, without a copy."""
        return Scores(self._views["sensitivity"], self._views.get("uncertainty"))

    @property
    def packed(self) -> bool:
        return self.thresholds is not None

    def pack(self, thresholds: Tensor) -> None:
        """Replace the scores by the masks ``score > threshold``, and free their memory."""
        self._packed = packed_masks(self.scores, thresholds)
        self.thresholds = thresholds
        self._views, self._plans = {}, {}

    def selection(self, thresholds: Tensor, indices: Sequence[int]) -> tuple[Scores, Tensor]:
        """Scores and thresholds that give :func:`rkif_kernels.fuse_` the masks of some tensors.

        Args:
            thresholds: those of the scores, [1] or one for each of all tensors.
        """
        if self.packed:
            masks = [unpacked(self._packed[index], self._shapes[index]) for index in indices]
            return Scores(masks), torch.full_like(thresholds[:1], 0.5)
        limits = thresholds if thresholds.numel() == 1 else thresholds[list(indices)]
        return self.of(indices), limits

    def of(self, indices: Sequence[int]) -> Scores:
        """The scores of some tensors, without a copy."""
        return self.scores.subset(indices)

    def score_copies(self) -> dict[str, Tensor]:
        """Name -> float32 scores of the tensor's shape, as copies."""
        scores = self.scores
        copies = (scores.values(index) for index in range(len(self._names)))
        if scores.uncertainty is None and self._config.state_dtype == torch.float32:
            copies = (values.clone() for values in copies)  # they are S itself
        return dict(zip(self._names, copies, strict=True))

    def tensors(self) -> dict[str, Tensor]:
        """Key "part.name" -> the state itself, not a copy. A packed mask is unpacked: uint8 0 and 1."""
        if self.packed:
            rows = zip(self._names, self._packed, self._shapes, strict=True)
            return {f"mask.{name}": unpacked(bits, shape).to(torch.uint8) for name, bits, shape in rows}
        return {
            f"{part}.{name}": view
            for part, views in self._views.items()
            for name, view in zip(self._names, views, strict=True)
        }

    def dtypes(self, *, packed: bool) -> dict[str, torch.dtype]:
        """Key -> dtype of the tensors that :meth:`load_tensors` needs."""
        if packed:
            return {f"mask.{name}": torch.uint8 for name in self._names}
        return {f"{part}.{name}": self._config.state_dtype for part in self._parts for name in self._names}

    def load_tensors(self, tensors: Mapping[str, Tensor], thresholds: Tensor | None = None) -> None:
        """Load what :meth:`tensors` returned: a packed mask if ``thresholds`` are given, else the scores."""
        if thresholds is not None:
            self._packed = [repacked(tensors[f"mask.{name}"]) for name in self._names]
            self.thresholds = thresholds
            self._views, self._plans = {}, {}
            return
        if self.packed:
            self.clear()
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])
