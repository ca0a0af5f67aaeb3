"""``--space delta``: adapters merged as weight updates B·A, as :func:`rkif.fuse_delta` does in memory.

The factors of all adapters are in memory, and the updates of one module at a time. Methods merge updates in
place of tensors. The fused updates are factorised to the adapter's rank, so the output is an adapter again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rkif.checkpoint.buffers import as_bytes
from rkif.checkpoint.layout import OutputTensor, Piece
from rkif.checkpoint.scan import make_scan
from rkif.checkpoint.scores import invalid_element, scores_of
from rkif.checkpoint.source import DTYPES, FUSED, Checkpoint, Entry, InvalidInputError, TensorReader
from rkif.checkpoint.tiles import TILE, Tile, tiles
from rkif.distributed.process_group import ALONE
from rkif.lora import LoraModule, factorised, lora_modules, lora_scaling

if TYPE_CHECKING:
    from rkif.checkpoint.methods import Method

WORKING = 12  # maximum number of float32 tensors of a module's size, in addition to the updates


@dataclass(frozen=True)
class UpdateSpace:
    """The modules of an adapter, whose updates are merged in place of its tensors.

    Attributes:
        modules: those with factors, then the tensors without (modules_to_save).
        tensors: the updates as tensors of a layout; they are in no file.
    """

    modules: tuple[LoraModule, ...]
    tensors: tuple[OutputTensor, ...]

    @property
    def numel(self) -> int:
        return sum(tensor.target.numel for tensor in self.tensors)

    def memory(self, checkpoints: Sequence[Checkpoint]) -> int:
        """Bytes of all factors, of the result, and of the updates of the largest module."""
        factors = [sum(entry.nbytes for entry in one.tensors.values()) for one in checkpoints]
        largest = max(tensor.target.numel for tensor in self.tensors)
        return sum(factors) + factors[0] + 4 * largest * (len(checkpoints) + 1 + WORKING)


def update_space(base: Checkpoint, argument: str, problems: list[str]) -> UpdateSpace | None:
    """The modules of an adapter, from its header and config.

    None if updates cannot be computed; the reason is appended to ``problems``.
    """
    if base.stem != "adapter_model" or not {"lora_alpha", "r"} <= base.config.keys():
        problems.append(
            f"--space delta: {argument} must be the folder of a LoRA adapter, with lora_alpha and r in its "
            "adapter_config.json"
        )
        return None
    fused = {name: entry for name, entry in base.tensors.items() if entry.dtype in FUSED}
    shapes = {name: torch.empty(entry.shape, device="meta") for name, entry in fused.items()}
    try:
        modules = lora_modules(list(fused), shapes, lora_scaling(base.config, list(fused)))
    except (ValueError, TypeError) as error:
        problems.append(f"--space delta: {argument}: {error}")
        return None
    tensors = []
    for module in modules:
        a, b = fused[module.a], None if module.b is None else fused[module.b]
        shape = a.shape if b is None else (b.shape[0], a.shape[1])
        target = Entry(a.file, "F32" if b is not None else a.dtype, shape, 0, 0)
        tensors.append(OutputTensor(module.name, target, ()))
    return UpdateSpace(tuple(modules), tuple(tensors))


@dataclass(frozen=True)
class FusedUpdates:
    """The result of :func:`fuse_updates`.

    Attributes:
        params: tensor name -> fused tensor, flat.
        counts, squared_norms: by the name of a module's first tensor, as :meth:`Method.fuse` returns them.
        thresholds: as in a scan's result.
        truncation: module -> error of the factorised update, as a fraction of the fused update's Frobenius
            norm.
    """

    params: dict[str, Tensor]
    counts: dict[str, list[int]]
    squared_norms: dict[str, list[float]]
    thresholds: Tensor | None
    truncation: dict[str, float]


def fuse_updates(method: Method, space: UpdateSpace, checkpoints: Mapping[str, Checkpoint]) -> FusedUpdates:
    """Merge the updates of adapters, module by module.

    Raises:
        InvalidInputError: a tensor, or a fused update, is not finite.
    """
    sets = [_load(argument, checkpoint) for argument, checkpoint in checkpoints.items()]
    chunks = [(Piece(index, 0, tensor.target.numel),) for index, tensor in enumerate(space.tensors)]
    scan = make_scan(method, space.tensors, chunks, range(len(chunks)), ALONE, guess=None)

    def parts(index: int, out: Tensor | None, largest: int) -> Iterator[Tile]:
        rows = [[space.modules[index].update(tensors).flatten()] for tensors in sets]
        targets = None if out is None else [out.flatten()]
        names = [tensor.name for tensor in space.tensors]
        return tiles(chunks[index], rows, targets, largest, names, method.models)

    while (indices := scan.next_pass()) is not None:
        for index in indices:
            whole = max(space.tensors[index].target.numel, 1)
            for tile in parts(index, None, whole):
                scan.observe(tile, scores_of(method, tile))
        scan.end_pass()
    result = scan.result()
    fused = FusedUpdates({}, {}, {}, result.thresholds, {})
    for index, (module, tensor) in enumerate(zip(space.modules, space.tensors, strict=True)):
        out = torch.empty(tensor.target.shape, dtype=DTYPES[tensor.target.dtype])
        stats = [
            method.fuse(tile, scores_of(method, tile), result)
            for tile in parts(index, out, max(out.numel(), 1) if method.streams else TILE)
        ]
        if not bool(out.isfinite().all()):
            raise InvalidInputError(f"the fused update of {module.name!r} overflows; nothing was published")
        fused.counts[module.a] = sum(one.counts.cpu() for one in stats).tolist()  # type: ignore[union-attr]
        norms = sum(one.squared_norms.cpu() for one in stats)
        fused.squared_norms[module.a] = norms.tolist()  # type: ignore[union-attr]
        if module.b is None:
            fused.params[module.a] = out.flatten()
            continue
        basis = torch.cat([tensors[module.b].float() for tensors in sets], dim=1)
        rank = sets[0][module.a].shape[0]
        b, a, fused.truncation[module.name] = factorised(out, basis, rank, module.scaling)
        for name, factor in ((module.a, a), (module.b, b)):
            fused.params[name] = factor.to(sets[0][name].dtype).flatten()
    return fused


def _load(argument: str, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All floating-point tensors of an adapter."""
    reader, tensors = TensorReader(), {}
    try:
        for name, entry in checkpoint.tensors.items():
            if entry.dtype not in FUSED:
                continue
            flat = torch.empty(entry.numel, dtype=DTYPES[entry.dtype])
            reader.read(entry, 0, as_bytes(flat))
            if not bool(flat.isfinite().all()):
                raise invalid_element(argument, entry.file, name, flat, ~flat.isfinite())
            tensors[name] = flat.view(entry.shape)
    finally:
        reader.close()
    return tensors
