"""``rkif fuse`` and ``rkif verify`` as a user sees them: output, errors and exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoint_files import Triple
from command import Rkif
from safetensors.torch import load_file, save_file


@pytest.fixture
def triple(tmp_path: Path) -> Triple:
    return Triple(tmp_path)


def paths(triple: Triple) -> list[Path]:
    return [triple.path(name) for name in ("base", "inner", "outer")]


def test_verify_accepts_an_output_and_finds_a_changed_byte(rkif: Rkif, triple: Triple) -> None:
    out = triple.folder / "out"
    status, output, errors = rkif(
        "fuse", *paths(triple), "--out", out, "--density", 0.3, "--max-memory", "2GiB"
    )
    assert (status, errors) == (0, "")
    assert "density 0.3" in output
    assert "selected by" in output
    status, output, _ = rkif("verify", out)
    assert status == 0
    assert "are unchanged" in output
    file = out / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    status, _, errors = rkif("verify", out)
    assert status == 1
    assert errors.startswith(f"rkif: error: {out}: model.safetensors: 'layer.")


def test_fuse_prints_json(rkif: Rkif, triple: Triple) -> None:
    out = triple.folder / "out"
    status, output, _ = rkif(
        "fuse", *paths(triple), "--out", out, "--json", "--method", "ties", "--weight", "0.4,0.6"
    )
    assert status == 0
    summary = json.loads(output)
    assert summary["out"] == str(out)
    assert summary["settings"]["weight"] == [0.4, 0.6]
    assert sum(summary["report"]["counts"].values()) == summary["report"]["numel"]
    assert summary["cpu_seconds"] > 0


def test_hashes_are_not_broken_at_80_columns(
    rkif: Rkif, triple: Triple, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = triple.folder / "out"
    printed = rkif("fuse", *paths(triple), "--out", out)[1]
    verified = rkif("verify", out)[1]
    sha256 = json.loads((out / "rkif-manifest.json").read_text())["content_sha256"]
    for text in (printed, verified):
        assert f"SHA-256 {sha256}" in text.splitlines()


def test_resuming_a_complete_output_says_so(rkif: Rkif, triple: Triple) -> None:
    arguments = ("fuse", *paths(triple), "--out", triple.folder / "out", "--resume")
    assert "already complete" not in rkif(*arguments)[1]
    status, output, _ = rkif(*arguments)
    assert status == 0
    assert " ".join(output.split()).startswith(f"{triple.folder / 'out'} is already complete")
    assert "MB/s" not in output
    assert "memory" not in output


def test_the_output_begins_with_text(rkif: Rkif, triple: Triple) -> None:
    out = triple.folder / "out"
    assert rkif("fuse", *paths(triple), "--out", out)[1].splitlines()[0].strip()
    assert rkif("verify", out)[1].splitlines()[0].strip()


def test_a_file_of_another_kind_is_named(rkif: Rkif, triple: Triple) -> None:
    config = triple.folder / "config.json"
    config.write_text('{"model_type": "llama"}')
    status, _, errors = rkif("fuse", config, *paths(triple)[1:], "--out", triple.folder / "out")
    reason = "cannot be read: it is not a .safetensors file; give one, or a folder"
    assert (status, errors) == (1, f"rkif: error: BASE: {config} {reason}\n")


@pytest.mark.parametrize("argument", [0, 1])
def test_an_unsupported_dtype_is_one_line(rkif: Rkif, triple: Triple, argument: int) -> None:
    inputs = paths(triple)
    save_file({n: t.double() for n, t in load_file(inputs[argument]).items()}, inputs[argument])
    status, _, errors = rkif("fuse", *inputs, "--out", triple.folder / "out")
    assert (status, errors.count("\n")) == (1, 1)
    assert errors.startswith(f"rkif: error: {('BASE', 'INNER')[argument]}: 'embed.weight', ")
    assert "of dtype F64, which cannot be fused; F32, BF16, F16 can" in errors


@pytest.mark.parametrize("json_", [True, False])
@pytest.mark.parametrize("way", ["same file", "same bytes"])
@pytest.mark.parametrize(
    ("first", "second", "options", "meaning"),
    [
        ("inner", "outer", [], "the task vector OUTER - INNER is zero"),
        ("inner", "outer", ["--outer-from", "base"], "their task vectors are equal"),
        ("base", "inner", [], "the task vector INNER - BASE is zero"),
        (
            "base",
            "outer",
            [],
            "the outer task vector, OUTER - INNER, is the inner one with the opposite sign",
        ),
        ("base", "outer", ["--method", "ties"], "the task vector OUTER - BASE is zero"),
    ],
)
def test_identical_inputs_cause_a_note(
    rkif: Rkif,
    triple: Triple,
    first: str,
    second: str,
    options: list[str],
    meaning: str,
    way: str,
    json_: bool,
) -> None:
    content = triple.path(first).read_bytes()
    triple.path(second).unlink()
    if way == "same file":
        triple.path(second).symlink_to(triple.path(first))
    else:
        triple.path(second).write_bytes(content)
    note = f"{second.upper()} and {first.upper()} are identical: {meaning}"
    status, output, _ = rkif(
        "fuse", *paths(triple), "--out", triple.folder / "out", *options, *(["--json"] if json_ else [])
    )
    assert status == 0
    if json_:
        assert json.loads(output)["notes"] == [note]
    else:
        assert " ".join(output.split()).count(f"note: {note}") == 1


@pytest.mark.parametrize("json_", [True, False])
def test_a_dry_run_writes_nothing(rkif: Rkif, triple: Triple, json_: bool) -> None:
    before = sorted(triple.folder.iterdir())
    options = ["--json"] if json_ else []
    status, output, _ = rkif(
        "fuse", *paths(triple), "--out", triple.folder / "a" / "b", "--dry-run", *options
    )
    assert status == 0
    assert sorted(triple.folder.iterdir()) == before
    if json_:
        plan = json.loads(output)
        assert plan["problems"] == []
        assert plan["memory"] <= 2 << 30
    else:
        assert "no problem found" in output


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--density", "2"], "density must be in [0, 1]; got 2.0"),
        (["--method", "merge"], "--method must be one of recurrent_kif, linear"),
        (["--method", "dare_tiess"], "; got 'dare_tiess'; did you mean 'dare_ties'?"),
        (["--method", "dare"], "; got 'dare'; did you mean 'dare_linear' or 'dare_ties'?\n"),
        (["--method", "x"], "; got 'x'\n"),
        (["--method", "linear", "--density", "0.5"], "density is not a setting of linear"),
        (["--max-memory", "much"], "--max-memory must be a size such as 2GiB or 500MB; got 'much'"),
        (["--max-memory", "1MiB"], "--max-memory: 1 MiB is too little"),
        (["--max-memory", "2"], "--max-memory needs a unit, such as 2GiB or 500MB; got '2'"),
        (["--method", "ties", "--weight", "1;2"], "--weight must be numbers with commas between them"),
        (
            ["--method", "ties", "--weight", "1,2,3"],
            "weight must have 2 numbers, one for each model after BASE; got (1.0, 2.0, 3.0)",
        ),
        (["--device", "tpu"], "--device must be auto, cpu or cuda; got 'tpu'"),
        (["--inner-importance", "nowhere"], "--outer-importance belong together"),
    ],
)
def test_invalid_options_are_one_clear_line(
    rkif: Rkif, triple: Triple, arguments: list[str], error: str
) -> None:
    status, output, errors = rkif("fuse", *paths(triple), "--out", triple.folder / "out", *arguments)
    assert (status, output) == (1, "")
    last = errors.strip().splitlines()[-1]
    assert last.startswith("rkif: error: ")
    assert error in errors
    assert not (triple.folder / "out").exists()


def test_all_problems_are_listed(rkif: Rkif, triple: Triple) -> None:
    triple.inner.pop("layer.1.bias")
    triple.save("inner")
    triple.path("outer").unlink()
    status, output, errors = rkif("fuse", *paths(triple), "--out", triple.folder / "out", "--json")
    assert status == 1
    listed = [line.removeprefix("- ") for line in errors.splitlines() if line.startswith("- ")]
    assert listed == json.loads(output)["problems"]
    assert len(listed) == 2
    assert errors.splitlines()[-1].startswith("rkif: error: 2 problems; the first: ")


def test_verify_refuses_a_folder_without_manifest(rkif: Rkif, tmp_path: Path) -> None:
    status, _, errors = rkif("verify", tmp_path)
    assert status == 1
    assert (
        errors
        == f"rkif: error: {tmp_path} has no rkif-manifest.json: it is not a finished output of rkif fuse\n"
    )
