"""Results of ``rkif fuse --mergekit``, compared with those of mergekit itself if it is installed."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoint_files import load_folder, loaded, merge
from command import Rkif
from torch import Tensor

# Python of an environment with mergekit; this environment if it has mergekit.
MERGEKIT = os.environ.get("RKIF_MERGEKIT") or (
    sys.executable if importlib.util.find_spec("mergekit") else None
)
WITH_MERGEKIT = pytest.mark.skipif(
    MERGEKIT is None, reason="mergekit is not installed (RKIF_MERGEKIT names a Python that has it)"
)
RUN = "import sys; from mergekit.scripts.run_yaml import main; main()"


def llamas(folder: Path, dtype: torch.dtype, vocab_size: int = 32) -> None:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=5,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(dtype)
    for name in ("base", "a", "b", "c"):  # each a few steps further
        model.save_pretrained(folder / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.002 * torch.randn_like(parameter))


def by_mergekit(folder: Path, content: dict[str, Any]) -> dict[str, Tensor]:
    assert MERGEKIT is not None
    (folder / "merge.yml").write_text(yaml.safe_dump(content))
    words = [MERGEKIT, "-c", RUN, "merge.yml", "theirs", "--no-copy-tokenizer", "--no-write-model-card"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return load_folder(folder / "theirs")


@WITH_MERGEKIT
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "dare_linear", "dare_ties"])
def test_results_are_those_of_mergekit(
    rkif: Rkif, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients, filters and defaults, in float32: equal within the rounding of a few operations."""
    monkeypatch.chdir(tmp_path)
    llamas(tmp_path, torch.float32)
    density = {"density": [0.3, 0.9]} if method == "ties" else {}
    content: dict[str, Any] = {
        "merge_method": method,
        "models": [
            {"model": "a", "parameters": {"weight": [0.1, 1, 0.5], **density}},
            {
                "model": "b",
                "parameters": {"weight": [{"filter": "mlp", "value": [0.2, 0.6]}, {"value": 0.7}]},
            },
            {"model": "c"},
        ],
        "parameters": {"weight": [{"filter": "lm_head", "value": 0.4}, {"value": 0.3}]},
        "dtype": "float32",
    }
    if method != "linear":
        content["base_model"] = "base"
        content["parameters"]["lambda"] = 0.9
    theirs = by_mergekit(tmp_path, content)
    ours = merge(rkif, tmp_path, content)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, msg=lambda text, name=name: f"{name}: {text}")


@WITH_MERGEKIT
def test_mergekit_computes_in_the_dtype_of_the_checkpoints(
    rkif: Rkif, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16 about a tenth of its elements differ from a result that is rounded once."""
    monkeypatch.chdir(tmp_path)
    llamas(tmp_path, torch.bfloat16)
    content: dict[str, Any] = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [{"model": name, "parameters": {"weight": 0.4}} for name in ("a", "b")],
    }
    theirs = by_mergekit(tmp_path, content)
    ours = merge(rkif, tmp_path, content)
    differ = sum(int((ours[name] != value).sum()) for name, value in theirs.items())
    share = differ / sum(value.numel() for value in theirs.values())
    assert 0.02 < share < 0.4
    content |= {"dtype": "float32", "out_dtype": "bfloat16"}
    (tmp_path / "theirs").rename(tmp_path / "low")
    for name, value in by_mergekit(tmp_path, content).items():
        assert torch.equal(ours[name], value) or (ours[name] != value).float().mean() < 0.01, name


@pytest.mark.parametrize("program", ["rkif", pytest.param("mergekit", marks=WITH_MERGEKIT)])
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("rescale", [True, False])
def test_random_drops_have_the_same_distribution(
    rkif: Rkif, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, method: str, rescale: bool
) -> None:
    """Properties of both programs below density 1, where each draws its own random numbers.

    The task vector v has n elements, normally distributed; d is the density. Bounds are five standard errors.

    - The share of kept elements is d, with the standard error sqrt(d (1 - d) / n).
    - Kept elements are v times one factor, |v|_1 / |kept v|_1 or 1, to the rounding of the sum with the base.
    - The length along v is 1, or d without the factor: there is no bias. Its standard error is
      s sqrt((1 - d) / (d n)), with s^2 = 3 + pi/2 - 4 < 1, or 3 d^2.
    """
    monkeypatch.chdir(tmp_path)
    llamas(tmp_path, torch.float32, vocab_size=2048)
    weight, density = 0.7, 0.25
    content: dict[str, Any] = {
        "merge_method": method,
        "base_model": "base",
        "models": [{"model": "a", "parameters": {"weight": weight, "density": density}}],
        "parameters": {"normalize": False, "rescale": rescale},
        "dtype": "float32",
    }
    out = merge(rkif, tmp_path, content) if program == "rkif" else by_mergekit(tmp_path, content)
    base, a = loaded(tmp_path, ("base", "a"))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        vector = a[name] - base[name]
        kept = out[name] != base[name]
        share, n = kept.double().mean().item(), kept.numel()
        assert abs(share - density) < 5 * math.sqrt(density * (1 - density) / n)
        factor = (vector.abs().sum() / vector[kept].abs().sum()).item() if rescale else 1.0
        wanted = base[name] + weight * factor * vector * kept
        torch.testing.assert_close(out[name], wanted, rtol=1e-6, atol=1e-8)
        length = ((out[name] - base[name]) * vector).sum() / (weight * vector.square().sum())
        spread = 1 if rescale else math.sqrt(3) * density
        error = spread * math.sqrt((1 - density) / (density * n))
        assert abs(length.item() - (1 if rescale else density)) < 5 * error
