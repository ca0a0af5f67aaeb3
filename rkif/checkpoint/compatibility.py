"""Compares the names, shapes, dtypes and configs of the inputs.

Differences that prevent a fusion are appended to ``problems``. Each message names its input.
"""

from __future__ import annotations

from collections.abc import Mapping

from rkif.checkpoint.source import DTYPES, FUSED, Checkpoint
from rkif.files import parse_json

SHOWN = 5  # names in a message


def compare_inputs(checkpoints: Mapping[str, Checkpoint], problems: list[str], notes: list[str]) -> None:
    """Compare all inputs with the first, which gives the layout.

    Differences that prevent nothing are appended to ``notes``.
    """
    first, base = next(iter(checkpoints.items()))
    known = all(entry.dtype in DTYPES for entry in base.tensors.values())
    for argument, checkpoint in checkpoints.items():
        if argument.startswith("--"):
            if known:
                _compare_importance(base, checkpoint, argument, problems)
        elif argument != first:
            _compare_configs(base, checkpoint, argument, first, problems, notes)
            _compare_tensors(base, checkpoint, argument, first, problems)
    _check_dtypes(checkpoints, problems)
    if (
        known
        and base.tensors
        and not any(entry.dtype in FUSED and entry.numel for entry in base.tensors.values())
    ):
        problems.append(f"{first} has no floating-point element: there is nothing to fuse")


def _compare_tensors(
    base: Checkpoint, other: Checkpoint, argument: str, first: str, problems: list[str]
) -> None:
    """Check that names and shapes are those of ``base``; ``first`` is its name in messages."""
    missing = [name for name in base.tensors if name not in other.tensors]
    extra = [name for name in other.tensors if name not in base.tensors]
    if missing:
        problems.append(f"{argument} lacks {_some(missing)}")
    if extra:
        tied = base.config.get("tie_word_embeddings") and any("head" in name for name in extra)
        hint = (
            f"; {first} ties its head to the embedding (tie_word_embeddings): tie this one as well"
            if tied
            else ""
        )
        problems.append(f"{argument} has {_some(extra)}, which {first} lacks{hint}")
    for name, entry in base.tensors.items():
        if name in other.tensors and other.tensors[name].shape != entry.shape:
            shape, base_shape = list(other.tensors[name].shape), list(entry.shape)
            same_width = len(shape) == len(base_shape) == 2 and shape[1] == base_shape[1]
            vocabulary = same_width and any(part in name for part in ("embed", "lm_head", "wte"))
            hint = " (another vocabulary?)" if vocabulary else ""
            problems.append(f"{argument}: {name!r} has shape {shape}; in {first} it has {base_shape}{hint}")


def _compare_importance(base: Checkpoint, importance: Checkpoint, argument: str, problems: list[str]) -> None:
    """Check that every floating-point tensor of BASE has scores of its shape, and no other tensor has any."""
    fused = {name: entry for name, entry in base.tensors.items() if entry.dtype in FUSED}
    missing = [name for name in fused if name not in importance.tensors]
    extra = [name for name in importance.tensors if name not in fused]
    if missing:
        problems.append(f"{argument} lacks scores of {_some(missing)}")
    if extra:
        problems.append(
            f"{argument} has scores of {_some(extra)}, but BASE has no such floating-point tensor"
        )
    for name, entry in fused.items():
        scores = importance.tensors.get(name)
        if scores is not None and (scores.shape != entry.shape or scores.dtype not in FUSED):
            problems.append(
                f"{argument}: {name!r} is {scores.dtype} {list(scores.shape)}; "
                f"scores must be floating-point of shape {list(entry.shape)}"
            )


def _check_dtypes(checkpoints: Mapping[str, Checkpoint], problems: list[str]) -> None:
    """Check that dtypes are known, and that a tensor is floating-point in all inputs or has one dtype."""
    first, base = next(iter(checkpoints.items()))
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
            base_entry = base.tensors.get(name)
            if base_entry is None or argument.startswith("--"):
                continue
            if {entry.dtype, base_entry.dtype} - DTYPES.keys():  # reported above
                continue
            fused = entry.dtype in FUSED and base_entry.dtype in FUSED
            if not fused and entry.dtype != base_entry.dtype:
                problems.append(f"{argument}: {name!r} is {entry.dtype}; in {first} it is {base_entry.dtype}")


# Settings of the configs that must be equal. An absent setting equals None, False and 0.
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
    base: Checkpoint,
    other: Checkpoint,
    argument: str,
    first: str,
    problems: list[str],
    notes: list[str],
) -> None:
    """Check that kind, settings and vocabulary are those of ``base``; ``first`` is its name in messages."""
    if base.stem != other.stem:
        kinds = {"model": "a model", "adapter_model": "an adapter"}
        problems.append(f"{argument} is {kinds[other.stem]}, {first} {kinds[base.stem]}")
        return
    if base.config and other.config:
        for setting in _MODEL if base.stem == "model" else _ADAPTER:
            expected, value = base.config.get(setting), other.config.get(setting)
            # The default depends on the model class.
            absent = setting == "tie_word_embeddings" and None in (expected, value)
            if (expected or None) != (value or None) and not absent:
                problems.append(
                    f"{argument}: {setting} is {value!r} in its config; in {first} it is {expected!r}"
                )
        expected, value = (checkpoint.config.get("base_model_name_or_path") for checkpoint in (base, other))
        if base.stem == "adapter_model" and expected != value:
            notes.append(f"{argument} adapts {value!r} by its config; {first} adapts {expected!r}")
    expected, ids = _vocabulary(base), _vocabulary(other)
    if expected and ids and expected != ids:
        moved = [token for token in expected.keys() & ids.keys() if expected[token] != ids[token]]
        if moved:
            token = min(moved, key=lambda token: expected[token])
            problems.append(
                f"{argument}: its tokenizer has other ids for {len(moved)} tokens: "
                f"{token!r} is {ids[token]}, in {first} {expected[token]}"
            )
        else:
            notes.append(
                f"{argument}: its tokenizer has {len(ids):,} tokens, that of {first} {len(expected):,}"
            )


def _vocabulary(checkpoint: Checkpoint) -> dict[str, int]:
    """Ids by token; empty if there is no tokenizer.json with such a table."""
    file = checkpoint.path / "tokenizer.json"
    if checkpoint.folder is None or not file.exists():
        return {}
    try:
        content = parse_json(file.read_bytes(), file)
        vocabulary = content["model"]["vocab"]
        added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
        return {**vocabulary, **added} if isinstance(vocabulary, dict) else added
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # a tokenizer without such a table does not prevent a fusion


def _some(names: list[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(repr, names[:SHOWN])) + more
