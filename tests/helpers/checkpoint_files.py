"""Three checkpoints on disk for the tests, and their expected fusion."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from command import Rkif
from safetensors.torch import load_file, save_file
from torch import Tensor

from rkif.checkpoint.fuse import fuse_checkpoints
from rkif.checkpoint.manifest import verify
from rkif.checkpoint.methods import make_method
from rkif.checkpoint.preflight import preflight
from rkif.checkpoint.provenance import PROVENANCE
from rkif.checkpoint.request import Request
from rkif.checkpoint.summary import Summary

Tensors = dict[str, Tensor]


def tensors(seed: int = 0, *, scale: int = 1) -> Tensors:
    """Tensors of all fused dtypes, an empty tensor, a single element, and a copied tensor."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "embed.weight": normal(300 * scale, 32).bfloat16(),
        "layer.0.norm": normal(32),
        "layer.0.weight": normal(64 * scale, 64).bfloat16(),
        "layer.1.weight": normal(64, 65).half(),
        "layer.1.bias": normal(1).bfloat16(),
        "layer.2.empty": normal(0, 4),
        "layer.2.scalar": normal(),
        "positions": torch.arange(20),
    }


def noisy(base: Mapping[str, Tensor], seed: int) -> Tensors:
    """The tensors with noise, as after training."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (value.float() + 0.1 * torch.randn(value.shape, generator=generator)).to(value.dtype)
        if value.is_floating_point()
        else value.clone()
        for name, value in base.items()
    }


def scores(base: Mapping[str, Tensor], seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(value.shape, generator=generator)
        for name, value in base.items()
        if value.is_floating_point()
    }


def floats(values: Mapping[str, Tensor]) -> Tensors:
    return {name: value for name, value in values.items() if value.is_floating_point()}


class Triple:
    """Three checkpoints in a folder as single files, and their tensors."""

    def __init__(self, folder: Path, *, scale: int = 1) -> None:
        self.folder = folder
        self.base = tensors(scale=scale)
        self.inner, self.outer = noisy(self.base, 1), noisy(self.base, 2)
        self.inner_scores, self.outer_scores = scores(self.base, 3), scores(self.base, 4)
        for name in ("base", "inner", "outer", "inner_scores", "outer_scores"):
            self.save(name)

    def save(self, name: str) -> None:
        save_file(getattr(self, name), self.path(name))

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def add_models(self, count: int) -> None:
        """Save further models, "model2" and so on; a request takes them after inner and outer."""
        for number in range(2, count):
            setattr(self, f"model{number}", noisy(self.base, 10 + number))
            self.save(f"model{number}")

    def models(self, count: int) -> list[str]:
        return ["inner", "outer", *(f"model{number}" for number in range(2, count))][:count]

    def request(
        self, *, importance: bool = False, method: str = "recurrent_kif", models: int = 2, **settings: Any
    ) -> Request:
        of_request = {
            key: settings.pop(key)
            for key in ("out", "resume", "max_memory", "max_shard_size")
            if key in settings
        }
        if importance:
            of_request |= {f"{side}_importance": self.path(f"{side}_scores") for side in ("inner", "outer")}
        paths = tuple(self.path(name) for name in self.models(models))
        chosen = make_method(method, settings, models)
        return Request(self.path("base"), paths, **{"out": self.folder / "out", **of_request}, method=chosen)

    def fuse(self, **settings: Any) -> Summary:
        return fuse_checkpoints(preflight(self.request(**settings)))


def split_folder(folder: Path, values: Tensors, files: int, stem: str = "model") -> None:
    """Save tensors in Hugging Face layout, in a number of files."""
    folder.mkdir(parents=True)
    names = list(values)
    weight_map = {}
    for number in range(files):
        file = f"{stem}-{number + 1:05}-of-{files:05}.safetensors"
        part = names[number::files]
        save_file({name: values[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def load_folder(folder: Path) -> Tensors:
    """All tensors of an output, from all its files."""
    found: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def same(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same names, dtypes and bytes."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype, name
        assert torch.equal(got[name].view(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8)), name


def files_of(folder: Path) -> dict[str, bytes]:
    """The bytes of an output's files, except the provenance, which has times."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != PROVENANCE
    }


def merge(rkif: Rkif, folder: Path, content: dict[str, Any], *options: object) -> Tensors:
    """The tensors that ``rkif fuse`` merges in a folder by a file of mergekit."""
    (folder / "merge.yml").write_text(yaml.safe_dump(content))
    out = folder / "out"
    status, _, errors = rkif("fuse", "--mergekit", "merge.yml", "--out", out, *options)
    assert (status, errors) == (0, "")
    assert verify(out) == []
    return load_folder(out)


def loaded(folder: Path, names: Sequence[str]) -> list[dict[str, Tensor]]:
    """The tensors of several checkpoints in a folder."""
    return [load_folder(folder / name) for name in names]
