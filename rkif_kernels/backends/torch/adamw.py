"""AdamW, with the importance of the parameters updated in the same pass over memory."""

from __future__ import annotations

import torch
from torch import Tensor

from rkif_kernels.backends.torch.blocks import Scratch, blocks
from rkif_kernels.backends.torch.importance import update_block
from rkif_kernels.contiguous import in_place
from rkif_kernels.types import AdamWConstants, AdamWInputs, Smoothing


def adamw_(inputs: AdamWInputs, constants: AdamWConstants, smoothing: Smoothing, nonfinite: Tensor) -> None:
    """See :func:`rkif_kernels.ops.adamw_`."""
    scratch = Scratch(nonfinite.device)
    with in_place(inputs.params) as params:
        for _, (w, g, m, v, s, u) in blocks(params, *inputs.lists[1:]):
            assert w is not None
            assert g is not None
            assert m is not None
            assert v is not None
            if s is not None:
                update_block(w, g, s, u, scratch, smoothing, nonfinite)
            _step(w, g, m, v, scratch, constants)


def _step(w: Tensor, g: Tensor, m: Tensor, v: Tensor, scratch: Scratch, constants: AdamWConstants) -> None:
    """Step one block. Products and sums are separate: lerp_ and addcmul_ contract to a fused multiply-add."""
    size = w.numel()
    grad = scratch.float32(g, 0)
    mean, square = scratch.float32(m, 1), scratch.float32(v, 2)
    mean.add_(torch.sub(grad, mean, out=scratch(3, size)).mul_(constants.take1))
    square.mul_(constants.keep2)
    square.add_(torch.mul(grad, constants.take2, out=scratch(3, size)).mul_(grad))
    # PyTorch's float32 root is not always correctly rounded; that of float64 rounds to the correct one.
    root = scratch(3, size).copy_(scratch(6, size, torch.float64).copy_(square).sqrt_())
    denominator = root.mul_(constants.unbias2).add_(constants.eps)
    update = torch.mul(mean, constants.step_size, out=scratch(4, size)).div_(denominator)
    weight = scratch.float32(w, 5).mul_(constants.decay).sub_(update)
    for stored, value in ((w, weight), (m, mean), (v, square)):
        if stored is not value:
            stored.copy_(value)
