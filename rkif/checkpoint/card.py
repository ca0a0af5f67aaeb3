"""The model card of an output, and the files that are copied from the base."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from rkif.checkpoint.source import Checkpoint
from rkif.files import fsync_file, write_text

# Files that are needed to load the model, beside the weights; and the terms of use.
_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab", ".spm", ".py"}
_TERMS = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
_EXCLUDED = ("trainer_state.json", "rkif-manifest.json", "provenance.json")  # records of the base's training


def copy_companions(base: Checkpoint, folder: Path) -> None:
    """Copy tokenizer, configs, chat templates and terms of use from the base's folder."""
    for source in companions(base):
        target = folder / source.relative_to(base.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        fsync_file(target)


def companions(base: Checkpoint) -> Iterator[Path]:
    """The files of the base that are copied."""
    for source in sorted(base.folder.rglob("*")) if base.folder is not None else ():
        name = source.relative_to(base.path)
        hidden = any(part.startswith(".") for part in name.parts)
        deep = len(name.parts) > 1 and name.parts[0] != "additional_chat_templates"
        needed = source.suffix in _SUFFIXES or source.name.upper().startswith(_TERMS)
        index = source.name.endswith(".index.json")
        if source.is_file() and needed and not (hidden or deep or index or source.name in _EXCLUDED):
            yield source


def write_card(
    folder: Path,
    base: Checkpoint,
    inputs: Mapping[str, Mapping[str, str]],
    method: str,
    settings: Mapping[str, Any],
    report: Mapping[str, Any],
    content: str,
) -> None:
    """Write README.md: inputs, method, settings, report and digests.

    Args:
        folder: the output's folder.
        base: the checkpoint whose license is repeated.
        inputs: argument -> "name" and "content_sha256".
        method, settings, report: as in the manifest.
        content: digest of the output's tensors.
    """
    models = [facts["name"] for argument, facts in inputs.items() if not argument.startswith("--")]
    adapter = base.stem == "adapter_model"
    data = ModelCardData(
        base_model=models,
        base_model_relation="merge",
        library_name="peft" if adapter else "transformers",
        license=_license(base),
        tags=["merge", "rkif", method.replace("_", "-")],
    )
    rows = [
        f"| {argument} | `{facts['name']}` | `{facts['content_sha256']}` |"
        for argument, facts in inputs.items()
    ]
    total = max(sum(report["counts"].values()), 1)
    selected = [f"| {name} | {n:,} | {n / total:.2%} |" for name, n in selections(report)]
    norms = ", ".join(f"{_norm(name)} {norm:.6g}" for name, norm in report["norms"].items())
    version = importlib.metadata.version("rkif")
    text = f"""---
{data.to_yaml()}
---

# {_title(method, models)}

Made by rkif {version} with the method `{method}`.

| input | name | SHA-256 of its tensors |
| --- | --- | --- |
{chr(10).join(rows)}

The tensors have the SHA-256 `{content}`; `rkif verify` checks all files against `rkif-manifest.json`.

## Settings

```json
{json.dumps({"method": method, **settings}, indent=1)}
```

## Result

{report["numel"]:,} parameters. L2 norms: {norms}.

| selected by | parameters | share |
| --- | ---: | ---: |
{chr(10).join(selected)}
"""
    write_text(folder / "README.md", text)


def selections(report: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Pairs (selected by, number of elements). Except for two models, pairs without elements are left out."""
    counts: dict[str, int] = report["counts"]
    if "all" in counts:
        return [("all checkpoints", counts["all"])]
    if "both" in counts:
        return [(case.replace("_", " "), n) for case, n in counts.items()]
    models = len(counts) - 1
    names = {str(models): "all models"}
    return [(names.get(number, f"{number} of {models} models"), n) for number, n in counts.items() if n]


def _norm(name: str) -> str:
    return "update" if name == "update" else f"{name} task vector" if name in ("inner", "outer") else name


def _title(method: str, models: Sequence[str]) -> str:
    base, *others = models
    if method == "wsm":
        return f"An average of {len(models)} checkpoints, from {base} to {others[-1]}"
    listed = " and ".join(filter(None, (", ".join(others[:-1]), others[-1])))
    return f"A fusion of {listed} on {base}"


def _license(base: Checkpoint) -> str | None:
    """The license that the base's model card names."""
    card = base.path / "README.md"
    if base.folder is None or not card.exists():
        return None
    from huggingface_hub import ModelCard  # slow to import: only for bases that have a card

    try:
        license_name = ModelCard.load(card).data.to_dict().get("license")
    except (ValueError, OSError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return None  # an unreadable card does not prevent a fusion
    return license_name if isinstance(license_name, str) else None
