"""``provenance.json`` of an output: SLSA provenance v1 of the inputs, settings, versions and times."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import Triple, files_of, split_folder
from command import Rkif


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def provenance(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "provenance.json").read_text())
    return content


def fuse(rkif: Rkif, folder: Path, out: Path, *options: object) -> dict[str, Any]:
    """The provenance of a fusion of the folders base, inner and outer."""
    inputs = [folder / name for name in ("base", "inner", "outer")]
    assert rkif("fuse", *inputs, "--out", out, *options)[0] == 0
    return provenance(out)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    triple = Triple(tmp_path)
    for name in ("base", "inner", "outer"):
        split_folder(tmp_path / name, getattr(triple, name), 2)
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    return tmp_path


def test_it_has_settings_versions_times_and_digests_of_all_inputs(rkif: Rkif, models: Path) -> None:
    scores = [models / f"{side}_scores.safetensors" for side in ("inner", "outer")]
    options = ("--inner-importance", scores[0], "--outer-importance", scores[1], "--density", 0.3)
    statement = fuse(rkif, models, models / "out", *options)
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["predicateType"] == "https://slsa.dev/provenance/v1"
    manifest = models / "out" / "rkif-manifest.json"
    assert statement["subject"] == [{"name": manifest.name, "digest": {"sha256": sha256(manifest)}}]

    definition = statement["predicate"]["buildDefinition"]
    assert definition["externalParameters"]["method"] == "recurrent_kif"
    assert definition["externalParameters"]["settings"]["density"] == 0.3
    weights = [models / name / f"model-0000{n}-of-00002.safetensors" for name in ("base",) for n in (1, 2)]
    weights += [models / name / path.name for name in ("inner", "outer") for path in weights]
    found = {
        (one["annotations"]["argument"], one["name"]): one["digest"]["sha256"]
        for one in definition["resolvedDependencies"]
    }
    assert found == {
        **{(path.parent.name.upper(), f"{path.parent.name}/{path.name}"): sha256(path) for path in weights},
        ("BASE", "base/tokenizer.json"): sha256(models / "base" / "tokenizer.json"),
        ("--inner-importance", scores[0].name): sha256(scores[0]),
        ("--outer-importance", scores[1].name): sha256(scores[1]),
    }

    details = statement["predicate"]["runDetails"]
    assert details["builder"]["version"]["rkif"] == importlib.metadata.version("rkif")
    times = [details["metadata"][name] for name in ("startedOn", "finishedOn")]
    started, finished = (datetime.strptime(time, "%Y-%m-%dT%H:%M:%SZ") for time in times)
    assert started <= finished
    assert str(models) not in json.dumps(statement)


def test_it_has_the_fields_of_slsa(rkif: Rkif, models: Path) -> None:
    pytest.importorskip("in_toto_attestation")
    from google.protobuf import json_format
    from in_toto_attestation.predicates.provenance.v1 import provenance_pb2

    statement = fuse(rkif, models, models / "out")
    json_format.ParseDict(statement["predicate"], provenance_pb2.Provenance())


def test_the_other_files_have_no_times_and_it_is_not_copied_from_a_base(rkif: Rkif, models: Path) -> None:
    fuse(rkif, models, models / "out")
    fuse(rkif, models, models / "again")
    assert files_of(models / "out") == files_of(models / "again")  # without provenance.json
    inputs = [models / name for name in ("out", "inner", "outer")]
    assert rkif("fuse", *inputs, "--out", models / "next")[0] == 0
    assert provenance(models / "next")["subject"] != provenance(models / "out")["subject"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s["subject"][0]["digest"].update(sha256="0" * 64), "provenance.json is of another output"),
        (lambda s: s["subject"][0].update(name="x"), "provenance.json is of another output"),
        (
            lambda s: s["subject"].append(s["subject"][0] | {"name": "y"}),
            "provenance.json is of another output",
        ),
        (lambda s: s.update(predicateType="x"), "with a predicate 'x'"),
        (lambda s: s.pop("predicate"), "provenance.json is damaged"),
        (lambda s: s.update(subject=[]), "provenance.json is damaged"),
    ],
)
def test_verify_refuses_the_provenance_of_another_output(
    rkif: Rkif, tmp_path: Path, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    Triple(tmp_path).fuse()
    out = tmp_path / "out"
    statement = provenance(out)
    edit(statement)
    (out / "provenance.json").write_text(json.dumps(statement))
    status, _, errors = rkif("verify", out)
    assert (status, errors.count("\n")) == (1, 1)
    assert message in errors


def test_verify_accepts_an_output_without_provenance(rkif: Rkif, tmp_path: Path) -> None:
    Triple(tmp_path).fuse()
    (tmp_path / "out" / "provenance.json").unlink()
    assert rkif("verify", tmp_path / "out")[0] == 0
