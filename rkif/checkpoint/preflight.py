"""Everything that can be known of a fusion before a weight is read."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rkif.checkpoint.card import companions
from rkif.checkpoint.layout import ALIGNMENT, Chunk, Layout, plan_chunks, plan_layout
from rkif.checkpoint.manifest import MANIFEST
from rkif.checkpoint.methods import Method, ScanResult, settings_of
from rkif.checkpoint.process_memory import anonymous_memory
from rkif.checkpoint.scores import scores_of
from rkif.checkpoint.source import DTYPES, FUSED, Checkpoint, changes, open_checkpoint
from rkif.checkpoint.stream import IN_FLIGHT
from rkif.checkpoint.tiles import Tile
from rkif.checkpoint.workdir import partial_folder, recorded_slot

MIB = 1 << 20
# Beside the buffers: counts of both searches and their sums, a sample, the collected scores of an in-memory
# selection, threads' stacks, the tables of names and digests.
OVERHEAD = 56 * MIB
SLOT_MOST = 8 * MIB  # of one input: larger chunks are no faster
SLOT_LEAST = MIB
TILE = 1 << 17  # elements that the CPU computes on at a time, in cache
TILE_BUFFERS = 12  # float32 values an element that a method makes of them at most
SHOWN = 5  # names in a message


CPU = torch.device("cpu")


class PreflightError(ValueError):
    """The inputs cannot be fused as asked; ``problems`` says all that is wrong, a line each."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        count = f"{len(problems)} problems; the first: " if len(problems) > 1 else ""
        super().__init__(f"{count}{problems[0]}")


@dataclass(frozen=True)
class Request:
    """What is to be fused, and how.

    Attributes:
        base, inner, outer: folders in Hugging Face layout, or safetensors files.
        out: the folder to be made; it must not exist.
        method: from :func:`rkif.checkpoint.methods.make_method`.
        inner_importance, outer_importance: the same with scores under the parameters' names; both or
            neither. Without them the scores are the magnitudes of the task vectors.
        max_memory: bytes of anonymous memory that the process may use, what it has already included. On a
            GPU, also the bytes of its memory for buffers.
        max_shard_size: bytes of a file of the output.
        device: what computes.
        resume: go on with an interrupted fusion to the same folder.
    """

    base: Path
    inner: Path
    outer: Path
    out: Path
    method: Method
    inner_importance: Path | None = None
    outer_importance: Path | None = None
    max_memory: int = 2 << 30
    max_shard_size: int = 5 * 10**9
    device: torch.device = CPU
    resume: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", Path(os.path.abspath(self.out)))


@dataclass(frozen=True)
class Plan:
    """How it will be done.

    Attributes:
        checkpoints: the inputs by argument, base first.
        layout: the output's files.
        slot: bytes of one input's buffer for a chunk.
        chunks: of tensors that are fused.
        copies: of tensors that are copied.
        notes: what the user should know, though it hinders nothing.
        memory: bytes that it will take at most.
        read, written: bytes; ``read`` with all passes that are likely.
        seconds: a rough estimate of how long it takes.
        identity: digest of what decides the output.
    """

    request: Request
    checkpoints: dict[str, Checkpoint]
    layout: Layout
    slot: int
    chunks: list[Chunk]
    copies: list[Chunk]
    notes: list[str]
    memory: int
    read: int
    written: int
    seconds: float
    identity: str

    def cut(self, slot: int) -> Plan:
        """The same work in chunks of another size."""
        tensors = self.layout.tensors
        chunks, copies = (plan_chunks(tensors, slot, fused=fused) for fused in (True, False))
        return replace(self, slot=slot, chunks=chunks, copies=copies)

    @property
    def tile(self) -> int:
        """Elements that are fused at a time: a chunk where kernels stream, else what stays in cache."""
        return self.slot if self.request.method.streams or self.request.device.type != "cpu" else TILE

    @property
    def scan_tile(self) -> int:
        """Elements that are scanned at a time: counting streams, too."""
        return self.slot if self.request.method.scope is not None else self.tile

    @property
    def journal_identity(self) -> str:
        """Of the work: it is resumed only where all that goes into the output is unchanged since."""
        changed = [checkpoint.changed for checkpoint in self.checkpoints.values()]
        beside = [[path.name, *changes([path])[0]] for path in companions(self.checkpoints["BASE"])]
        return _digest([self.identity, importlib.metadata.version("rkif"), changed, beside])

    @property
    def last_change(self) -> int:
        """When an input was last changed, in nanoseconds."""
        return max(max(file[1:]) for checkpoint in self.checkpoints.values() for file in checkpoint.changed)


def preflight(request: Request) -> Plan:
    """Compare the inputs' headers and configs, and plan; no weight is read.

    Raises:
        PreflightError: with all that is wrong.
    """
    problems: list[str] = []
    notes: list[str] = []
    paths = {"BASE": request.base, "INNER": request.inner, "OUTER": request.outer}
    given = {
        "--inner-importance": request.inner_importance,
        "--outer-importance": request.outer_importance,
    }
    importances = {argument: path for argument, path in given.items() if path is not None}
    if len(importances) == 1:
        problems.append("--inner-importance and --outer-importance belong together: give both or neither")
    if importances and not request.method.accepts_importance:
        problems.append(f"importance is used by recurrent_kif only, not by {request.method.name}")
    checkpoints = {}
    for argument, path in (paths | importances).items():
        if (found := open_checkpoint(path, argument, problems)) is not None:
            checkpoints[argument] = found
    base = checkpoints.get("BASE")
    if base is not None:
        for argument, checkpoint in checkpoints.items():
            if argument in importances:
                _compare_importance(base, checkpoint, argument, problems)
            elif argument != "BASE":
                _compare_configs(base, checkpoint, argument, problems, notes)
                _compare_tensors(base, checkpoint, argument, problems)
        _require_dtypes(checkpoints, problems)
        if base.tensors and not any(one.dtype in FUSED and one.numel for one in base.tensors.values()):
            problems.append("BASE has no floating-point element: there is nothing to fuse")
    _require_out(request, problems)
    if problems or base is None:
        raise PreflightError(problems)

    data = partial_folder(request.out) / "data"
    others = [checkpoints[argument].tensors for argument in checkpoints if argument != "BASE"]
    layout = plan_layout(base, others, data, request.max_shard_size)
    slot, memory = _fit(request, layout, len(checkpoints), problems)
    written = sum(layout.sizes.values())
    _require_space(request, written, problems)
    if problems:
        raise PreflightError(problems)

    whole = sum(entry.nbytes for checkpoint in checkpoints.values() for entry in checkpoint.tensors.values())
    scanned = _scanned(request.method, checkpoints, whole)
    return Plan(
        request,
        checkpoints,
        layout,
        slot,
        plan_chunks(layout.tensors, slot, fused=True),
        plan_chunks(layout.tensors, slot, fused=False),
        notes,
        memory,
        read=whole + scanned,
        written=written,
        seconds=_estimate(request, layout.numel, whole + scanned, written),
        identity=_digest(
            [
                request.method.name,
                settings_of(request.method),
                request.max_shard_size,
                {argument: checkpoint.headers for argument, checkpoint in checkpoints.items()},
            ]
        ),
    )


def _compare_tensors(base: Checkpoint, other: Checkpoint, argument: str, problems: list[str]) -> None:
    """Names and shapes must be those of the base."""
    missing = [name for name in base.tensors if name not in other.tensors]
    extra = [name for name in other.tensors if name not in base.tensors]
    if missing:
        problems.append(f"{argument} lacks {_some(missing)}")
    if extra:
        tied = base.config.get("tie_word_embeddings") and any("head" in name for name in extra)
        why = "; BASE ties its head to the embedding (tie_word_embeddings): tie this one, too" if tied else ""
        problems.append(f"{argument} has {_some(extra)}, which BASE lacks{why}")
    for name, entry in base.tensors.items():
        if name in other.tensors and other.tensors[name].shape != entry.shape:
            got, wanted = list(other.tensors[name].shape), list(entry.shape)
            rows = len(got) == len(wanted) == 2 and got[1] == wanted[1]
            vocabulary = rows and any(part in name for part in ("embed", "lm_head", "wte"))
            why = " (another vocabulary?)" if vocabulary else ""
            problems.append(f"{argument}: {name!r} has shape {got}; in BASE it has {wanted}{why}")


def _compare_importance(base: Checkpoint, scores: Checkpoint, argument: str, problems: list[str]) -> None:
    wanted = {name: entry for name, entry in base.tensors.items() if entry.dtype in FUSED}
    missing = [name for name in wanted if name not in scores.tensors]
    extra = [name for name in scores.tensors if name not in wanted]
    if missing:
        problems.append(f"{argument} lacks scores of {_some(missing)}")
    if extra:
        problems.append(f"{argument} has scores of {_some(extra)}, which is no floating-point tensor of BASE")
    for name, entry in wanted.items():
        found = scores.tensors.get(name)
        if found is not None and (found.shape != entry.shape or found.dtype not in FUSED):
            problems.append(
                f"{argument}: {name!r} is {found.dtype} {list(found.shape)}; "
                f"scores must be floating-point of shape {list(entry.shape)}"
            )


def _require_dtypes(checkpoints: Mapping[str, Checkpoint], problems: list[str]) -> None:
    base = checkpoints["BASE"]
    for argument, checkpoint in checkpoints.items():
        if "quantization_config" in checkpoint.config:
            problems.append(f"{argument} is quantised (quantization_config); dequantise it first")
        unknown = [name for name, entry in checkpoint.tensors.items() if entry.dtype not in DTYPES]
        if unknown:
            dtype = checkpoint.tensors[unknown[0]].dtype
            problems.append(
                f"{argument}: {_some(unknown)} of dtype {dtype}, which cannot be fused; "
                f"{', '.join(FUSED)} can"
            )
        for name, entry in checkpoint.tensors.items():
            wanted = base.tensors.get(name)
            if wanted is None or argument.startswith("--"):
                continue
            if (entry.dtype in FUSED) != (wanted.dtype in FUSED) or (
                entry.dtype not in FUSED and entry.dtype != wanted.dtype
            ):
                problems.append(f"{argument}: {name!r} is {entry.dtype}; in BASE it is {wanted.dtype}")


# Settings in which checkpoints that are to be fused must agree, and those that are worth a note.
# An absent one has the default, where there is one.
_MODEL = ("model_type", "vocab_size", "tie_word_embeddings")
_ADAPTER = (
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "fan_in_fan_out",
    "alpha_pattern",
    "rank_pattern",
)


def _compare_configs(
    base: Checkpoint, other: Checkpoint, argument: str, problems: list[str], notes: list[str]
) -> None:
    if base.stem != other.stem:
        kinds = {"model": "a model", "adapter_model": "an adapter"}
        problems.append(f"{argument} is {kinds[other.stem]}, BASE {kinds[base.stem]}")
        return
    if base.config and other.config:
        for setting in _MODEL if base.stem == "model" else _ADAPTER:
            ours, theirs = base.config.get(setting), other.config.get(setting)
            absent = setting == "tie_word_embeddings" and None in (ours, theirs)  # each model has its default
            if (ours or None) != (theirs or None) and not absent:
                problems.append(f"{argument}: {setting} is {theirs!r} in its config; in BASE it is {ours!r}")
        ours, theirs = (c.config.get("base_model_name_or_path") for c in (base, other))
        if base.stem == "adapter_model" and ours != theirs:
            notes.append(f"{argument} says that it adapts {theirs!r}, BASE that it adapts {ours!r}")
    ours, theirs = _vocabulary(base), _vocabulary(other)
    if ours and theirs and ours != theirs:
        moved = [token for token in ours.keys() & theirs.keys() if ours[token] != theirs[token]]
        if moved:
            token = min(moved, key=lambda token: ours[token])
            problems.append(
                f"{argument}: its tokenizer numbers {len(moved)} tokens otherwise: "
                f"{token!r} is {theirs[token]}, in BASE {ours[token]}"
            )
        else:
            notes.append(
                f"{argument}: its tokenizer knows {len(theirs):,} tokens, that of BASE {len(ours):,}"
            )


def _vocabulary(checkpoint: Checkpoint) -> dict[str, int]:
    """Token -> number; empty where there is no tokenizer.json with such a table."""
    file = checkpoint.path / "tokenizer.json"
    if checkpoint.folder is None or not file.exists():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
        return {**vocabulary, **added} if isinstance(vocabulary, dict) else added
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # of a kind that has no such table: no reason not to fuse


def _require_out(request: Request, problems: list[str]) -> None:
    out = request.out
    finished = request.resume and (out / MANIFEST).exists()
    if out.is_symlink() or os.path.ismount(out):
        problems.append(f"--out: {out} is a link or a mount point, which no folder can be renamed to")
    elif out.exists() and not out.is_dir():
        problems.append(f"--out: {out} is a file")
    elif out.is_dir() and any(out.iterdir()) and not finished:
        problems.append(f"--out: {out} exists; name another folder, or remove it")
    for argument, path in (("BASE", request.base), ("INNER", request.inner), ("OUTER", request.outer)):
        if path.exists() and out.resolve() == path.resolve():
            problems.append(f"--out: {out} is {argument}")
    parent = _existing(out)
    if not parent.is_dir():
        problems.append(f"--out: {parent} is not a folder")


def _existing(path: Path) -> Path:
    """The nearest of a path's parents that exists."""
    return next(parent for parent in path.absolute().parents if parent.exists())


def _fit(request: Request, layout: Layout, inputs: int, problems: list[str]) -> tuple[int, int]:
    """Bytes of an input's buffer for a chunk, and of all memory with it."""
    widest = max((tensor.widest for tensor in layout.tensors), default=4)
    narrowest = min((tensor.target.itemsize for tensor in layout.tensors if tensor.fused), default=4)
    shares = (inputs + 1) * IN_FLIGHT
    scratch = TILE * 4 * TILE_BUFFERS
    if request.device.type != "cpu" and not request.method.streams:
        shares += TILE_BUFFERS * 4 // narrowest  # a chunk is computed on whole
    fixed = anonymous_memory() + OVERHEAD + scratch
    grain = ALIGNMENT * widest
    whole = sum(-(-tensor.target.numel * tensor.widest // grain) * grain for tensor in layout.tensors)
    affordable = (request.max_memory - fixed) // shares
    slot = max(min(affordable, SLOT_MOST, whole) // grain * grain, grain)
    recorded = recorded_slot(request.out) if request.resume else None
    if recorded is not None and (recorded <= 0 or recorded % grain):
        recorded = None  # of other inputs
    # What Python and PyTorch take is not the same every time; the overhead has room for that.
    if recorded is not None and recorded <= affordable + OVERHEAD // 4 // shares:
        slot = recorded
    elif recorded is not None:
        problems.append(
            f"--max-memory: the interrupted fusion needs {(fixed + shares * recorded) / MIB:.0f} MiB; "
            "resume it with as much as it was begun with"
        )
    if recorded is None and affordable < min(SLOT_LEAST, whole):
        least = fixed + shares * SLOT_LEAST
        problems.append(
            f"--max-memory: {request.max_memory / MIB:.0f} MiB are too few; with {inputs} inputs and what "
            f"Python and PyTorch take themselves it needs {least / MIB:.0f} MiB"
        )
    return slot, fixed + shares * slot


def _require_space(request: Request, written: int, problems: list[str]) -> None:
    free = shutil.disk_usage(_existing(request.out)).free
    partial = partial_folder(request.out)
    taken = sum(path.stat().st_blocks * 512 for path in partial.rglob("*") if path.is_file())
    if free + taken < written:
        problems.append(
            f"--out: {written / 1e9:.2f} GB are to be written, and {free / 1e9:.2f} GB are free at "
            f"{_existing(request.out)}"
        )


def _scanned(method: Method, checkpoints: Mapping[str, Checkpoint], whole: int) -> int:
    """Bytes that are read before the fusion, with the usual luck."""
    if method.needs_threshold:
        scores = [checkpoint for argument, checkpoint in checkpoints.items() if argument.startswith("--")]
        if scores:
            return sum(entry.nbytes for checkpoint in scores for entry in checkpoint.tensors.values())
        return whole
    return whole if method.rescales else 0


def _estimate(request: Request, numel: int, read: int, written: int) -> float:
    """Seconds, from computing on a made-up tile and writing a few MiB where the output will lie."""
    part = [torch.rand(TILE, device=request.device) for _ in range(4)]
    tile = Tile([0], [0], part[:1], part[1:2], part[2:3], part[3:4], None, ["tile"])
    scan_result = ScanResult(torch.full((2, 1), 0.5), torch.ones(2, 1, dtype=torch.float64))
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        request.method.fuse(tile, scores_of(request.method, tile), scan_result)
        taken.append(time.perf_counter() - start)
    computing = min(taken) / TILE * numel * 1.5  # with the scores and their counts
    block = bytes(8 * MIB)
    rate = math.inf
    with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=_existing(request.out)) as file:
        start = time.perf_counter()
        file.write(block)
        file.flush()
        rate = len(block) / (time.perf_counter() - start)
    return max(computing, (read + written) / rate)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(repr, names[:SHOWN])) + more


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
