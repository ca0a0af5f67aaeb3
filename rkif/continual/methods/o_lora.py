"""O-LoRA: each task in a subspace orthogonal to the earlier ones' (Wang et al., Findings of EMNLP 2023)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from rkif.continual.config import RunConfig
from rkif.continual.methods.sequential import Context, Sequential


class OLora(Sequential):
    """One LoRA adapter per task; earlier adapters are frozen, and the model uses the sum of all.

    The adapters are slices of one adapter of rank ``tasks * r``: rows of A and columns of B. A slice that is
    not trained yet has B = 0 and adds nothing. The loss gets ``o_lora.strength * sum |A_old A_new^T|``, as in
    the published code.
    """

    slices = True

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._hooks: list[RemovableHandle] = []
        for name, parameter in self.inner.parameters.items():
            mask = torch.zeros_like(parameter)
            self._slice(name, mask).fill_(1)
            # The mask acts before clipping, so that the gradient's norm does not include frozen slices.
            self._hooks.append(parameter.register_hook(partial(torch.mul, mask)))  # type: ignore[no-untyped-call]

    @staticmethod
    def require(config: RunConfig) -> None:
        if config.adapter is None:
            raise ValueError("method o_lora trains LoRA adapters; adapter is null")
        if config.training.weight_decay:
            raise ValueError("method o_lora freezes earlier tasks' adapters: training.weight_decay must be 0")

    def _slice(self, name: str, tensor: Tensor) -> Tensor:
        assert self.context.config.adapter is not None
        r, start = self.context.config.adapter.r, self.context.index * self.context.config.adapter.r
        return tensor[start : start + r] if "lora_A" in name else tensor[:, start : start + r]

    @torch.no_grad()
    def before_clip(self) -> None:
        """Add the gradient of the overlap with earlier slices: ``sign(A_new A_old^T) A_old``."""
        assert self.context.config.adapter is not None
        learned = self.context.index * self.context.config.adapter.r
        for name, parameter in self.inner.parameters.items():
            if "lora_A" in name and parameter.grad is not None:
                old = parameter[:learned]
                overlap = self._slice(name, parameter) @ old.T
                strength = self.context.config.o_lora.strength
                self._slice(name, parameter.grad).add_(overlap.sign() @ old, alpha=strength)

    def finish(self) -> None:
        for hook in self._hooks:
            hook.remove()
