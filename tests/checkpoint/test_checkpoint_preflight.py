"""The pre-flight reports all problems at once, before any weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import Triple, noisy, scores, split_folder, tensors
from safetensors.torch import save_file

from rkif.checkpoint import preflight as planning
from rkif.checkpoint.methods import make_method
from rkif.checkpoint.preflight import preflight
from rkif.checkpoint.request import PreflightError, Request
from rkif.checkpoint.source import TensorReader, open_checkpoint

NESTED = "[" * 100_000


@pytest.fixture(autouse=True)
def no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(TensorReader, "read", refuse)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Three folders with configs."""
    base = tensors()
    for name, values in {"base": base, "inner": noisy(base, 1), "outer": noisy(base, 2)}.items():
        split_folder(tmp_path / name, values, 2)
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 300}))
    return tmp_path


def problems(folder: Path, **more: Any) -> list[str]:
    request = Request(
        folder / "base",
        (folder / "inner", folder / "outer"),
        **{"out": folder / "out", "method": make_method("recurrent_kif", {}), **more},
    )
    with pytest.raises(PreflightError) as caught:
        preflight(request)
    assert not (folder / "out").exists()
    assert not (folder / "out.partial").exists()
    return caught.value.problems


def change(folder: Path, name: str, **values: Any) -> None:
    """Save a checkpoint again with changed tensors; None removes a tensor."""
    merged = {key: value for key, value in {**tensors(), **values}.items() if value is not None}
    for file in (folder / name).glob("model*"):
        file.unlink()
    config = (folder / name / "config.json").read_text()
    (folder / name / "config.json").unlink()
    (folder / name).rmdir()
    split_folder(folder / name, merged, 2)
    (folder / name / "config.json").write_text(config)


def set_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def test_a_valid_request_gives_a_complete_plan(folders: Path) -> None:
    plan = preflight(
        Request(
            folders / "base",
            (folders / "inner", folders / "outer"),
            folders / "out",
            make_method("recurrent_kif", {}),
        )
    )
    assert plan.layout.numel == sum(v.numel() for v in tensors().values() if v.is_floating_point())
    assert plan.notes == []
    assert 0 < plan.seconds < 60
    assert not (folders / "out").exists()
    assert not (folders / "out.partial").exists()


def test_all_problems_in_one_report(folders: Path) -> None:
    change(
        folders,
        "inner",
        **{"layer.1.bias": None, "more": torch.ones(2), "embed.weight": torch.ones(301, 32).bfloat16()},
    )
    change(
        folders,
        "outer",
        **{"positions": torch.ones(20), "layer.0.norm": torch.ones(32).to(torch.float8_e5m2)},
    )
    set_config(folders / "base", tie_word_embeddings=False)
    set_config(folders / "inner", vocab_size=301, tie_word_embeddings=True)
    found = problems(folders)
    wanted = [
        "INNER lacks 'layer.1.bias'",
        "INNER has 'more', which BASE lacks",
        "INNER: 'embed.weight' has shape [301, 32]; in BASE it has [300, 32] (another vocabulary?)",
        "INNER: vocab_size is 301 in its config; in BASE it is 300",
        "INNER: tie_word_embeddings is True in its config; in BASE it is False",
        "OUTER: 'layer.0.norm' of dtype F8_E5M2, which cannot be fused; F32, BF16, F16 can",
        "OUTER: 'positions' is F32; in BASE it is I64",
    ]
    for problem in wanted:
        assert problem in found, found


def test_an_untied_head_in_one_input_is_explained(folders: Path) -> None:
    set_config(folders / "base", tie_word_embeddings=True)
    change(folders, "outer", **{"lm_head.weight": torch.ones(300, 32).bfloat16()})
    found = problems(folders)
    assert any(
        "OUTER has 'lm_head.weight', which BASE lacks; BASE ties its head" in problem for problem in found
    )


def test_tokenizers_with_other_token_ids_are_refused(folders: Path) -> None:
    for name, vocabulary in (("base", {"a": 0, "b": 1}), ("inner", {"a": 1, "b": 0}), ("outer", {"a": 0})):
        content = {"model": {"vocab": vocabulary}, "added_tokens": [{"content": "<s>", "id": 9}]}
        (folders / name / "tokenizer.json").write_text(json.dumps(content))
    (problem,) = problems(folders)
    assert problem == "INNER: its tokenizer has other ids for 2 tokens: 'a' is 1, in BASE 0"
    (folders / "outer" / "tokenizer.json").write_text(NESTED)  # an unreadable tokenizer is not compared
    assert problems(folders) == [problem]


@pytest.mark.parametrize(
    ("harm", "wanted"),
    [
        ("missing shard", "INNER: .* lacks model-00002-of-00002.safetensors, which its index names"),
        ("truncated shard", "INNER: .*model-00002-of-00002.safetensors cannot be read: .*"),
        ("no index", "INNER: .* is not an index: .*"),
        ("wrong index", "INNER: the index has 'embed.weight' in model-00002.*but it is in model-00001.*"),
        ("nothing there", "INNER: there is no .*"),
        ("only pickles", "INNER: .* has neither model.safetensors.*it has pytorch_model.bin.*not read"),
        ("quantised", "INNER is quantised .*"),
        ("no object", ".*config.json cannot be read: it must hold a JSON object; got list"),
        ("an adapter", "INNER is an adapter, BASE a model"),
        ("nested index", "INNER: .*index.json is not an index: its text is damaged: it is nested too deeply"),
        ("nested config", ".*config.json cannot be read: its text is damaged: it is nested too deeply"),
    ],
)
def test_unusable_inputs_are_refused(folders: Path, harm: str, wanted: str) -> None:
    inner = folders / "inner"
    index = inner / "model.safetensors.index.json"
    second = inner / "model-00002-of-00002.safetensors"
    if harm == "missing shard":
        second.unlink()
    elif harm == "truncated shard":
        second.write_bytes(second.read_bytes()[:-7])
    elif harm == "no index":
        index.write_text("[]")
    elif harm == "wrong index":
        content = json.loads(index.read_text())
        content["weight_map"]["embed.weight"] = second.name
        index.write_text(json.dumps(content))
    elif harm in ("nothing there", "only pickles", "an adapter"):
        inner.rename(folders / "elsewhere")
        if harm == "only pickles":
            inner.mkdir()
            (inner / "pytorch_model.bin").touch()
        if harm == "an adapter":
            split_folder(inner, noisy(tensors(), 1), 1, stem="adapter_model")
    elif harm == "nested index":
        index.write_text(NESTED)
    elif harm == "nested config":
        (inner / "config.json").write_text(NESTED)
    elif harm == "no object":
        (inner / "config.json").write_text("[1]")
    elif harm == "quantised":
        set_config(inner, quantization_config={"bits": 4})
    import re

    found = problems(folders)
    assert any(re.fullmatch(wanted, problem) for problem in found), found


def test_inputs_without_floating_point_elements_are_refused(tmp_path: Path) -> None:
    for name in ("base", "inner", "outer"):
        split_folder(tmp_path / name, {"w": torch.empty(0, 3), "positions": torch.arange(3)}, 1)
    assert problems(tmp_path) == ["BASE has no floating-point element: there is nothing to fuse"]


def test_the_fused_file_is_the_one_that_transformers_loads(folders: Path) -> None:
    """A single file has precedence over an old index."""
    save_file(tensors(), folders / "base" / "model.safetensors")
    opened = open_checkpoint(folders / "base", "BASE", found := [])
    assert opened is not None
    assert [path.name for path in opened.files if path.suffix == ".safetensors"] == ["model.safetensors"]
    assert found == []


def test_adapters_must_have_the_same_scaling(tmp_path: Path) -> None:
    for name, alpha in (("base", 16), ("inner", 16), ("outer", 32)):
        split_folder(tmp_path / name, noisy(tensors(), 1), 1, stem="adapter_model")
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"r": 8, "lora_alpha": alpha}))
    assert problems(tmp_path) == ["OUTER: lora_alpha is 32 in its config; in BASE it is 16"]


def test_importance_must_fit(tmp_path: Path) -> None:
    triple = Triple(tmp_path)
    triple.inner_scores.pop("layer.1.bias")
    triple.inner_scores["layer.0.norm"] = torch.ones(31)
    triple.inner_scores["positions"] = torch.ones(20)
    triple.save("inner_scores")
    with pytest.raises(PreflightError) as caught:
        preflight(triple.request(importance=True))
    assert caught.value.problems == [
        "--inner-importance lacks scores of 'layer.1.bias'",
        "--inner-importance has scores of 'positions', but BASE has no such floating-point tensor",
        "--inner-importance: 'layer.0.norm' is F32 [31]; scores must be floating-point of shape [32]",
    ]
    triple.inner_scores = scores(triple.base, 3)
    triple.save("inner_scores")
    for method, wanted in (("ties", "importance is used by recurrent_kif only"), (None, "belong together")):
        request = triple.request(importance=True, method=method or "recurrent_kif")
        if method is None:
            request = Request(
                request.base,
                request.models,
                request.out,
                request.method,
                request.inner_importance,
            )
        with pytest.raises(PreflightError, match=wanted):
            preflight(request)


def test_an_unusable_output_folder_is_refused(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folders / "file").touch()
    assert problems(folders, out=folders / "file") == [f"--out: {folders / 'file'} is a file"]
    assert problems(folders, out=folders / "file" / "x") == [f"--out: {folders / 'file'} is not a folder"]
    assert f"--out: {folders / 'base'} is BASE" in problems(folders, out=folders / "base")
    (folders / "link").symlink_to(folders / "elsewhere")
    (problem,) = problems(folders, out=folders / "link")
    assert "is a link or a mount point" in problem
    usage = planning.shutil.disk_usage(folders)
    monkeypatch.setattr(planning.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    (problem,) = problems(folders)
    assert "0.00 GB are free" in problem


def test_too_little_memory_is_refused_with_the_minimum(folders: Path) -> None:
    (problem,) = problems(folders, max_memory=50 << 20)
    assert problem.startswith("--max-memory: 50 MiB is too little")
    needed = int(problem.split()[-2])
    assert 100 < needed < 1000
    request = Request(
        folders / "base",
        (folders / "inner", folders / "outer"),
        folders / "out",
        make_method("recurrent_kif", {}),
        max_memory=(needed + 40) << 20,
    )
    assert preflight(request).memory <= request.max_memory
