"""Whether checkpoints can be fused: their names, shapes, dtypes and configs are compared."""

from __future__ import annotations

import json
from collections.abc import Mapping

from rkif.checkpoint.source import DTYPES, FUSED, Checkpoint

SHOWN = 5  # names in a message


def compare_tensors(base: Checkpoint, other: Checkpoint, argument: str, problems: list[str]) -> None:
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


def compare_importance(base: Checkpoint, scores: Checkpoint, argument: str, problems: list[str]) -> None:
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


def require_dtypes(checkpoints: Mapping[str, Checkpoint], problems: list[str]) -> None:
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


def compare_configs(
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


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(repr, names[:SHOWN])) + more
