"""A fusion on disk has the bits of a fusion in memory, for any files and chunks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import Triple, floats, load_folder, same, split_folder

import rkif
from rkif.checkpoint import preflight as planning
from rkif.checkpoint.fuse import fuse_checkpoints
from rkif.checkpoint.manifest import content_digest, read_manifest
from rkif.checkpoint.preflight import preflight
from rkif.checkpoint.request import Request


@pytest.fixture
def triple(tmp_path: Path) -> Triple:
    return Triple(tmp_path)


@pytest.fixture(params=[None, 256, 8192], ids=["one chunk", "chunks of 256 B", "chunks of 8 KiB"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the size of chunks: with 256 bytes of the widest input, tensors of 64 elements stay whole."""
    if request.param is not None:
        monkeypatch.setattr(planning, "MAX_SLOT", request.param)
        monkeypatch.setattr(planning, "MIN_SLOT", 64)
        monkeypatch.setattr(planning, "TILE", 48)
    return request.param


def in_memory(triple: Triple, importance: bool, **settings: Any) -> rkif.fusion.FusionResult:
    base, inner, outer = floats(triple.base), floats(triple.inner), floats(triple.outer)
    sides = (triple.inner_scores, triple.outer_scores) if importance else ()
    return rkif.fuse(base, inner, outer, *sides, **settings)


@pytest.mark.parametrize("importance", [True, False], ids=["importance", "magnitudes"])
@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"rule": "release", "density": 0.7}, {"outer_from": "base"}, {"density": 1}, {"density": 0}],
    ids=str,
)
def test_the_output_has_the_bits_of_a_fusion_in_memory(
    triple: Triple, chunks: Any, importance: bool, scope: str, settings: dict[str, Any]
) -> None:
    summary = triple.fuse(importance=importance, scope=scope, **settings)
    expected = in_memory(triple, importance, scope=scope, **settings)
    same(load_folder(triple.folder / "out"), expected.params | {"positions": triple.base["positions"]})
    report = expected.report.to_dict()
    assert summary.report["counts"] == report["counts"]
    assert summary.report["numel"] == report["numel"]
    for name, norm in report["norms"].items():
        assert summary.report["norms"][name] == pytest.approx(norm, rel=1e-5)
    for side, thresholds in enumerate(report["thresholds"]):
        found = summary.report["thresholds"][side]
        if scope == "global":
            assert found == (thresholds if settings.get("density") not in (0, 1) else None)
        elif settings.get("density") not in (0, 1):
            assert {name: found[name] for name in thresholds if found[name] is not None} == {
                name: value for name, value in thresholds.items() if value != torch.inf
            }


def test_folders_shards_and_files_may_be_mixed(triple: Triple) -> None:
    split_folder(triple.folder / "B", triple.base, 3)
    split_folder(triple.folder / "O", dict(reversed(triple.outer.items())), 2)
    out = triple.folder / "out"
    plan = preflight(
        Request(
            triple.folder / "B",
            (triple.path("inner"), triple.folder / "O"),
            out,
            triple.request().method,
            max_shard_size=20_000,
        )
    )
    summary = fuse_checkpoints(plan)
    assert summary.files > 1
    expected = in_memory(triple, False).params | {"positions": triple.base["positions"]}
    same(load_folder(out), expected)


def test_dtypes_may_differ_between_the_inputs(triple: Triple) -> None:
    triple.inner["layer.0.weight"] = triple.inner["layer.0.weight"].float() * 1.001
    triple.outer["layer.0.norm"] = triple.outer["layer.0.norm"].half()
    for name in ("inner", "outer"):
        triple.save(name)
    triple.fuse()
    got = load_folder(triple.folder / "out")
    same(floats(got), in_memory(triple, False).params)
    assert got["layer.0.weight"].dtype == torch.bfloat16


def test_digests_do_not_depend_on_chunks_and_files(triple: Triple, monkeypatch: pytest.MonkeyPatch) -> None:
    triple.fuse()
    first = read_manifest(triple.folder / "out")
    monkeypatch.setattr(planning, "MAX_SLOT", 320)
    monkeypatch.setattr(planning, "MIN_SLOT", 64)
    triple.fuse(out=triple.folder / "again", max_shard_size=9_000)
    second = read_manifest(triple.folder / "again")
    for key in ("inputs", "content_sha256", "report"):
        assert first[key] == second[key]
    assert len(second["files"]) > len(first["files"])


def test_the_content_digest_of_an_output_is_that_of_an_input(triple: Triple) -> None:
    """A model card can be traced: if an output is fused again, its digest appears as that of an input."""
    triple.fuse()
    made = read_manifest(triple.folder / "out")["content_sha256"]
    request = triple.request(out=triple.folder / "next")
    fuse_checkpoints(preflight(Request(triple.folder / "out", request.models, request.out, request.method)))
    assert read_manifest(request.out)["inputs"]["BASE"]["content_sha256"] == made
    assert content_digest({}) != made


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("which", ["base", "inner", "outer", "inner_scores", "outer_scores"])
@pytest.mark.parametrize("density", [0.2, 1], ids=["scanned", "not scanned"])
def test_a_nonfinite_value_is_named_and_nothing_is_published(
    triple: Triple, chunks: Any, which: str, value: float, density: float
) -> None:
    getattr(triple, which)["layer.1.weight"].view(-1)[777] = value
    triple.save(which)
    with pytest.raises(ValueError, match=r"'layer.1.weight', element 777") as caught:
        triple.fuse(importance=which.endswith("scores"), density=density)
    assert str(triple.path(which)) in str(caught.value)
    assert not (triple.folder / "out").exists()
    assert not (triple.folder / "out.partial").exists()


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_negative_importance_is_refused(triple: Triple, chunks: Any, scope: str) -> None:
    triple.outer_scores["layer.2.scalar"].fill_(-0.5)
    triple.save("outer_scores")
    with pytest.raises(ValueError, match=r"--outer-importance: .*-0.5 in 'layer.2.scalar'"):
        triple.fuse(importance=True, scope=scope)
    assert not (triple.folder / "out").exists()


def test_a_result_that_overflows_its_dtype_is_refused(triple: Triple) -> None:
    for name, value in (("base", 6e4), ("inner", 6.5e4), ("outer", 6.5e4)):
        getattr(triple, name)["layer.1.weight"].fill_(value)
        triple.save(name)
    with pytest.raises(ValueError, match=r"'layer.1.weight'.* exceeds the range of its dtype"):
        triple.fuse(outer_from="base", density=1)
    assert not (triple.folder / "out").exists()


def test_copied_tensors_must_be_equal(triple: Triple) -> None:
    triple.outer["positions"][3] = 7
    triple.save("outer")
    with pytest.raises(
        ValueError, match="'positions' is I64, which is copied, not fused, but OUTER has other"
    ):
        triple.fuse()
    assert not (triple.folder / "out").exists()


@pytest.mark.parametrize("name", ["all equal", "all zero", "95 % zeros"])
def test_elements_tied_at_the_threshold_are_not_selected(triple: Triple, chunks: Any, name: str) -> None:
    """With bfloat16, millions of magnitudes may equal the threshold; here all or nearly all do."""
    for end in (triple.inner, triple.outer):
        for key, value in triple.base.items():
            if value.is_floating_point():
                generator = torch.Generator().manual_seed(len(key))
                step = {"all equal": 0.5, "all zero": 0.0, "95 % zeros": 0.5}[name] * torch.ones_like(value)
                if name == "95 % zeros":
                    step *= torch.rand(value.shape, generator=generator) > 0.95
                end[key] = value + step
    triple.base = {key: torch.zeros_like(value) for key, value in triple.base.items()} | {
        "positions": triple.base["positions"]
    }
    for which in ("base", "inner", "outer"):
        triple.save(which)
    triple.fuse()
    same(floats(load_folder(triple.folder / "out")), in_memory(triple, False).params)


def test_a_bad_sample_costs_only_another_pass(triple: Triple, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rkif.checkpoint.scan.guess_thresholds", lambda *_: ((5.0, 6.0), (0.0, 1e-9)))
    triple.fuse()
    same(floats(load_folder(triple.folder / "out")), in_memory(triple, False).params)


@pytest.mark.gpu
@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("method", ["recurrent_kif", "ties", "dare_ties"])
def test_a_gpu_gives_the_bytes_of_the_cpu(triple: Triple, chunks: Any, method: str, scope: str) -> None:
    """Pinned, double-buffered transfers and Triton kernels give the bytes of the CPU."""
    settings = {} if method == "dare_ties" else {"scope": scope}
    triple.fuse(method=method, **settings)
    there = triple.request(method=method, out=triple.folder / "there", **settings)
    fuse_checkpoints(preflight(replace(there, device=torch.device("cuda"))))
    got, expected = load_folder(triple.folder / "there"), load_folder(triple.folder / "out")
    if method == "recurrent_kif":
        same(got, expected)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value)
