"""``rkif fuse --space delta``: adapters merged as weight updates B·A."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import files_of, load_folder, same
from command import Rkif
from safetensors.torch import save_file
from torch import Tensor

import rkif as library
from rkif.checkpoint import preflight as planning
from rkif.checkpoint.manifest import read_manifest, verify
from rkif.checkpoint.workdir import Workdir

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "alpha_pattern": {"v": 3}}
SHAPES = {"q": (6, 9), "v": (12, 5)}


def adapter(seed: int, rank: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {"base_model.model.head.weight": torch.randn(3, 4, generator=generator).bfloat16()}
    for name, (out, into) in SHAPES.items():
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, into, generator=generator)
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(out, rank, generator=generator)
    return tensors


def save(folder: Path, tensors: dict[str, Tensor], **config: Any) -> None:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))


def updates(tensors: dict[str, Tensor], rank: int = 2) -> dict[str, Tensor]:
    found = {}
    for name in SHAPES:
        a, b = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        found[name] = (3 if name == "v" else 6) / rank * b @ a
    return found | {"head": tensors["base_model.model.head.weight"].float()}


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    folders = [tmp_path / name for name in ("base", "inner", "outer", "third")]
    for seed, folder in enumerate(folders):
        save(folder, adapter(seed))
    return folders


def fuse(rkif: Rkif, inputs: list[Path], out: Path, *options: object) -> dict[str, Any]:
    status, output, errors = rkif("fuse", *inputs, "--out", out, "--space", "delta", "--json", *options)
    assert status == 0, errors
    assert verify(out) == []
    summary: dict[str, Any] = json.loads(output)
    return summary


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("outer_from", ["inner", "base"])
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_recurrent_kif_has_the_bits_of_fuse_delta(
    rkif: Rkif, adapters: list[Path], scope: Any, outer_from: Any, density: float
) -> None:
    out = adapters[0].parent / "out"
    options = ("--scope", scope, "--outer-from", outer_from, "--density", density)
    summary = fuse(rkif, adapters[:3], out, *options)
    sets = [adapter(seed) for seed in range(3)]
    expected = library.fuse_delta(
        *sets,
        scaling=library.lora_scaling(CONFIG, list(sets[0])),
        density=density,
        scope=scope,
        outer_from=outer_from,
    )
    same(load_folder(out), expected.params)
    report = expected.report.to_dict()
    assert summary["report"]["counts"] == report["counts"]
    assert summary["report"]["numel"] == report["numel"] == 6 * 9 + 12 * 5 + 12
    assert summary["report"]["norms"] == pytest.approx(report["norms"], rel=1e-5)
    assert summary["report"]["truncation"] == pytest.approx(expected.truncation, rel=1e-5)
    if density < 1:
        assert summary["report"]["thresholds"] == report["thresholds"]
    assert read_manifest(out)["settings"]["space"] == "delta"
    assert (out / "adapter_config.json").read_bytes() == (adapters[0] / "adapter_config.json").read_bytes()


def test_lambda_of_one_half_halves_the_updates(rkif: Rkif, adapters: list[Path]) -> None:
    """From an adapter with B = 0, as training starts; in factor space half of both factors is a quarter."""
    start = {name: torch.zeros_like(t) if "lora" in name else t for name, t in adapter(0).items()}
    save(adapters[0], start)
    whole = updates(adapter(1))
    options = ("--method", "task_arithmetic", "--lambda", 0.5)
    for space, share in (("delta", 0.5), ("factor", 0.25)):
        out = adapters[0].parent / space
        status, output, _ = rkif("fuse", *adapters[:2], "--out", out, *options, "--space", space, "--json")
        assert status == 0
        got = updates(load_folder(out))
        for name in SHAPES:
            torch.testing.assert_close(got[name], share * whole[name])
        notes = json.loads(output)["notes"]
        assert len(notes) == (space == "factor")
        assert not notes or "gives a quarter of the update B·A; --space delta merges the updates" in notes[0]


def test_recurrent_kif_on_factors_has_no_note(rkif: Rkif, adapters: list[Path]) -> None:
    status, output, _ = rkif("fuse", *adapters[:3], "--out", adapters[0].parent / "out", "--json")
    assert (status, json.loads(output)["notes"]) == (0, [])


@pytest.mark.parametrize("models", [2, 3])
@pytest.mark.parametrize(
    "options",
    [
        ["--method", "ties", "--density", 0.4],
        ["--method", "ties", "--density", 0.4, "--scope", "global"],
        ["--method", "dare_ties", "--density", 0.5],
        ["--method", "linear"],
        ["--method", "wsm"],
    ],
    ids=lambda options: " ".join(map(str, options[1:])),
)
def test_every_method_merges_the_updates(rkif: Rkif, tmp_path: Path, options: list[Any], models: int) -> None:
    """At a rank that loses nothing, the product is the merge of dense updates."""
    sets = [adapter(seed, rank=6) for seed in range(models + 1)]
    folders = [tmp_path / f"adapter{number}" for number in range(models + 1)]
    dense = [tmp_path / f"dense{number}.safetensors" for number in range(models + 1)]
    for tensors, folder, file in zip(sets, folders, dense, strict=True):
        save(folder, tensors, r=6)
        named = {f"base_model.model.{name}": t for name, t in updates(tensors, 6).items()}
        named["base_model.model.head.weight"] = tensors["base_model.model.head.weight"]
        del named["base_model.model.head"]
        save_file(named, file)
    status, output, _ = rkif("fuse", *dense, "--out", tmp_path / "expected", "--json", *options)
    assert status == 0
    summary = fuse(rkif, folders, tmp_path / "out", *options)
    expected = load_folder(tmp_path / "expected")
    got = updates(load_folder(tmp_path / "out"), 6)
    for name in SHAPES:
        torch.testing.assert_close(got[name], expected[f"base_model.model.{name}"], atol=2e-5, rtol=1e-4)
    assert torch.equal(got["head"], expected["base_model.model.head.weight"].float())
    assert summary["report"]["counts"] == json.loads(output)["report"]["counts"]


def test_an_interrupted_merge_starts_again(
    rkif: Rkif, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of two factorisations must not be mixed."""
    monkeypatch.setattr(planning, "MAX_SLOT", 256)
    monkeypatch.setattr(planning, "MIN_SLOT", 64)
    folder = adapters[0].parent
    fuse(rkif, adapters[:3], folder / "whole")
    keep, seen = Workdir.record, []

    def record(self: Workdir, content: dict[str, Any]) -> None:
        seen.append(content["chunk"])
        if len(seen) == 2:
            raise OSError(28, "No space left on device", "disk")
        keep(self, content)

    monkeypatch.setattr(Workdir, "record", record)
    status, _, errors = rkif("fuse", *adapters[:3], "--out", folder / "out", "--space", "delta")
    assert (status, errors) == (1, "rkif: error: No space left on device: disk\n")
    status, _, errors = rkif("fuse", *adapters[:3], "--out", folder / "out", "--space", "delta")
    assert "holds an interrupted fusion; continue it with --resume" in errors
    summary = fuse(rkif, adapters[:3], folder / "out", "--resume")
    assert seen == [0, 1, 0, 1]
    assert not summary["resumed"]
    assert files_of(folder / "out") == files_of(folder / "whole")
    assert fuse(rkif, adapters[:3], folder / "out", "--resume")["resumed"]


@pytest.mark.parametrize(
    ("change", "options", "error"),
    [
        ({"use_dora": True}, [], "--space delta: BASE: DoRA's update depends on the weights"),
        ({}, ["--max-memory", "1MiB"], "--max-memory: 1 MiB is too little"),
        (
            {},
            ["--inner-importance", "base", "--outer-importance", "base"],
            "importances belong to the factors",
        ),
        ({}, ["--space", "sum"], "space must be one of factor, delta; got 'sum'"),
    ],
)
def test_unsupported_requests_are_refused(
    rkif: Rkif, adapters: list[Path], change: dict[str, Any], options: list[str], error: str
) -> None:
    for folder in adapters[:3]:
        (folder / "adapter_config.json").write_text(json.dumps(CONFIG | change))
    words = [adapters[0] if word == "base" else word for word in options]
    out = adapters[0].parent / "out"
    status, _, errors = rkif("fuse", *adapters[:3], "--out", out, "--space", "delta", *words)
    assert status == 1
    assert error in errors
    assert not out.exists()


def test_a_model_or_an_invalid_adapter_is_refused(rkif: Rkif, adapters: list[Path]) -> None:
    folder = adapters[0].parent
    out = folder / "out"
    broken = adapter(1)
    broken["base_model.model.q.lora_B.weight"][1, 1] = torch.inf
    save(adapters[1], broken)
    status, _, errors = rkif("fuse", *adapters[:3], "--out", out, "--space", "delta")
    assert status == 1
    assert "INNER: " in errors
    assert "has inf in 'base_model.model.q.lora_B.weight', element 3; nothing was published" in errors
    for path in adapters:
        (path / "adapter_config.json").unlink()
    status, _, errors = rkif("fuse", *adapters[:3], "--out", out, "--space", "delta")
    assert "--space delta: BASE must be the folder of a LoRA adapter, with lora_alpha and r in its" in errors
    assert not out.exists()
