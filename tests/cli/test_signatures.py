"""Signatures of runs, outputs and other folders; OpenSSF Model Signing verifies them, too."""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attestations import refused, write_keys
from command import Rkif
from run_inputs import rewrite_ledger

from rkif.attest.keys import SigningKey, VerifyingKey


def model_signing(*arguments: object) -> tuple[int, str]:
    """Run the command line of OpenSSF Model Signing; returns its status and output."""
    pytest.importorskip("model_signing")
    done = subprocess.run(
        [sys.executable, "-m", "model_signing", *map(str, arguments)], capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def signed_statement(folder: Path) -> dict[str, Any]:
    bundle = json.loads((folder / "model.sig").read_text())
    statement: dict[str, Any] = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    return statement


@pytest.mark.parametrize("curve", ["SECP256R1", "SECP384R1", "SECP521R1"])
def test_model_signing_accepts_a_signature_of_rkif(
    rkif: Rkif, folder: Path, tmp_path: Path, curve: str
) -> None:
    key, public = write_keys(tmp_path, curve=curve)
    assert rkif("sign", folder, "--key", key) == (0, f"{folder / 'model.sig'}: 5 files are signed\n", "")
    check = ("verify", "key", folder, "--public_key", public, "--signature", folder / "model.sig")
    assert model_signing(*check) == (0, "Verification succeeded\n")
    assert rkif("verify", folder, "--key", public)[0] == 0


def test_rkif_accepts_a_signature_of_model_signing_and_finds_changes(
    rkif: Rkif, folder: Path, keys: tuple[Path, Path]
) -> None:
    signed = model_signing(
        "sign", "key", folder, "--private_key", keys[0], "--signature", folder / "model.sig"
    )
    assert signed == (0, "Signing succeeded\n")
    assert rkif("verify", folder, "--key", keys[1]) == (
        0,
        f"{folder}: 5 files are as signed\n",
        "",
    )
    (folder / ".hidden").unlink()
    assert ".hidden is missing, but it was signed" in refused(rkif, "verify", folder, "--key", keys[1])


def test_a_signed_run_has_its_ledgers_head(
    rkif: Rkif, run: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    status, output, _ = rkif("sign", run, "--key", keys[0])
    files = [path for path in run.rglob("*") if path.is_file() and path.name != "model.sig"]
    assert (status, output) == (0, f"{run / 'model.sig'}: {len(files)} files are signed\n")
    statement = signed_statement(run)
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    digests = {one["name"]: one["digest"] for one in statement["predicate"]["resources"]}
    assert digests == {
        path.relative_to(run).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }
    origin, records, root, *_ = rkif("log", run, "--head")[1].split("\n")
    head = base64.b64decode(root).hex()
    assert statement["predicate"]["ledger"] == {"origin": origin, "records": int(records), "hash": head}
    shutil.move(run, tmp_path / "elsewhere")
    status, output, errors = rkif("verify", tmp_path / "elsewhere", "--key", keys[1])
    assert (status, errors) == (0, "")
    assert f"{len(files)} files are as signed; the ledger has {records} records" in output
    assert head in output
    moved = tmp_path / "elsewhere"
    check = ("verify", "key", moved, "--public_key", keys[1], "--signature", moved / "model.sig")
    assert model_signing(*check) == (0, "Verification succeeded\n")
    (moved / "metrics.json").write_text("{}")
    status, output = model_signing(*check)
    assert status == 1
    assert re.search(r"Hash mismatch for \W+metrics.json", output)


def test_signing_and_verifying_print_json(
    rkif: Rkif, run: Path, folder: Path, keys: tuple[Path, Path]
) -> None:
    head = json.loads(rkif("log", run, "--head", "--json")[1])
    checked = json.loads(rkif("verify", run, "--json")[1])
    assert (checked["records"], checked["hash"]) == (head["records"], head["hash"])
    signed = json.loads(rkif("sign", run, "--key", keys[0], "--json")[1])
    assert signed["signature"] == str(run / "model.sig")
    verified = json.loads(rkif("verify", run, "--key", keys[1], "--json")[1])
    assert (verified["files"], verified["ledger"]) == (signed["files"], head)
    assert "; to check its signature, give --key" in rkif("verify", run)[1]
    manifest = json.loads((folder / "rkif-manifest.json").read_text())
    assert json.loads(rkif("verify", folder, "--json")[1]) == {
        "files": len(manifest["files"]),
        "tensors": len(manifest["tensors"]),
        "content_sha256": manifest["content_sha256"],
    }


def test_a_ledger_that_differs_from_the_signed_head_is_found(
    rkif: Rkif, run: Path, keys: tuple[Path, Path]
) -> None:
    assert rkif("sign", run, "--key", keys[0])[0] == 0
    ledger = run / "ledger.jsonl"
    content = ledger.read_bytes()
    lines = content.splitlines(keepends=True)

    rewrite_ledger(ledger, lambda record: record.update(time="2020-01-01T00:00:00+00:00"), len(lines) - 1)
    errors = refused(rkif, "verify", run, "--key", keys[1])
    assert "- ledger.jsonl was changed after it was signed\n" in errors
    assert f"record {len(lines) - 1} was rewritten: its hash is " in errors

    ledger.write_bytes(content.replace(b'"event"', b'"evil"', 1))
    assert "record 0 was changed" in refused(rkif, "verify", run, "--key", keys[1])
    ledger.write_bytes(b"".join(lines[:-1]))
    assert f"record {len(lines) - 1} is missing" in refused(rkif, "verify", run, "--key", keys[1])
    ledger.write_bytes(b"")
    assert "holds no record" in refused(rkif, "verify", run, "--key", keys[1])
    ledger.unlink()
    assert "ledger.jsonl is missing, but it was signed" in refused(rkif, "verify", run, "--key", keys[1])

    ledger.write_bytes(content)
    from rkif.ledger.chain import Ledger

    Ledger(ledger).append({"event": "measured", "files": {}})
    assert f"error: {run}/ledger.jsonl: 1 record was added after it was signed" in refused(
        rkif, "verify", run, "--key", keys[1]
    )


def test_a_ledger_outside_of_a_run_is_signed_with_its_head(
    rkif: Rkif, original: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    lines = (original / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "ledger.jsonl").write_bytes(b"".join(lines[:2]) + b"torn")
    assert "record 2 is incomplete" in refused(rkif, "sign", folder, "--key", keys[0])
    (folder / "ledger.jsonl").write_bytes(b"".join(lines[:2]))
    assert rkif("sign", folder, "--key", keys[0])[0] == 0
    assert signed_statement(folder)["predicate"]["ledger"]["hash"] == json.loads(lines[1])["hash"]
    assert "the ledger has 2 records" in rkif("verify", folder, "--key", keys[1])[1]


def garble(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    bundle = json.loads(path.read_text())
    edit(bundle)
    path.write_text(json.dumps(bundle))


def change_payload(bundle: dict[str, Any]) -> None:
    payload = base64.b64decode(bundle["dsseEnvelope"]["payload"]).replace(b"README.md", b"README.md2")
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()


SIGNATURE_CHANGES: list[tuple[Callable[[Path], object], str]] = [
    (lambda path: path.unlink(), "has no model.sig: it is not signed"),
    (lambda path: path.write_text(""), "model.sig is damaged"),
    (
        lambda path: os.truncate(path, 2**36),  # a sparse file, which does not fit into memory
        "model.sig has more than 1,277,952 bytes, the limit for a folder of 7 files",
    ),
    (lambda path: path.write_bytes(path.read_bytes()[:-9]), "model.sig is damaged"),
    (lambda path: path.write_bytes(b"\xff\x00"), "model.sig is damaged"),
    (lambda path: path.write_text("[]"), "model.sig is damaged: it does not hold an object"),
    (lambda path: path.write_text("{}"), "it lacks 'mediaType'"),
    (lambda path: garble(path, lambda b: b["dsseEnvelope"].update(payloadType="x")), "payloadType"),
    (lambda path: garble(path, lambda b: b["dsseEnvelope"].update(payload="?")), "text that is not base64"),
    (lambda path: garble(path, lambda b: b["dsseEnvelope"].update(signatures=[])), "signatures"),
    (lambda path: garble(path, change_payload), "the signature does not fit its content"),
    (
        lambda path: garble(path, lambda b: b["dsseEnvelope"]["signatures"][0].update(sig="AAAA")),
        "the signature does not fit its content",
    ),
]


@pytest.mark.parametrize(("change", "message"), SIGNATURE_CHANGES)
def test_a_missing_or_damaged_signature_is_one_clear_line(
    rkif: Rkif, folder: Path, keys: tuple[Path, Path], change: Callable[[Path], object], message: str
) -> None:
    assert rkif("sign", folder, "--key", keys[0])[0] == 0
    change(folder / "model.sig")
    errors = refused(rkif, "verify", folder, "--key", keys[1])
    assert errors.count("\n") == 1
    assert message in errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out: (out / "README.md").write_text("x"), "README.md was changed after it was signed"),
        (
            lambda out: (out / "rkif-manifest.json").unlink(),
            "rkif-manifest.json is missing, but it was signed",
        ),
        (lambda out: (out / ".new").write_text("x"), ".new was not there when the folder was signed"),
        (lambda out: (out / "new").symlink_to("README.md"), "new is a link or a special file"),
    ],
)
def test_a_changed_removed_or_added_file_is_one_clear_line(
    rkif: Rkif,
    folder: Path,
    keys: tuple[Path, Path],
    change: Callable[[Path], object],
    message: str,
) -> None:
    assert rkif("sign", folder, "--key", keys[0])[0] == 0
    change(folder)
    errors = refused(rkif, "verify", folder, "--key", keys[1])
    assert errors.count("\n") == 1
    assert message in errors


def sign_again(folder: Path, key: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Replace the signature by one of an edited predicate, with the digest that its subject must have.

    If ``edit`` returns a digest, the subject gets that one.
    """
    statement = signed_statement(folder)
    other = edit(statement["predicate"])
    digests = [bytes.fromhex(one["digest"]) for one in statement["predicate"]["resources"]]
    statement["subject"][0]["digest"]["sha256"] = other or hashlib.sha256(b"".join(digests)).hexdigest()
    payload, kind = json.dumps(statement).encode(), b"application/vnd.in-toto+json"
    message = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
    envelope = {
        "payload": base64.b64encode(payload).decode(),
        "signatures": [{"sig": base64.b64encode(SigningKey(key).sign(message)).decode()}],
    }
    garble(folder / "model.sig", lambda bundle: bundle["dsseEnvelope"].update(envelope))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda p: p["resources"].append(p["resources"][0]), "a name is listed twice"),
        (
            lambda p: p["resources"].insert(0, p["resources"][0] | {"digest": "0" * 64}),
            "a name is listed twice",
        ),
        (lambda p: p["resources"][0].update(algorithm="blake3"), "resources.0.algorithm: "),
        (lambda p: p["resources"][0].update(digest="00"), "resources.0.digest: "),
        (lambda p: p["resources"].append(p["resources"][0] | {"name": "../x"}), "../x is missing"),
        (lambda p: "0" * 64, "the digest of its subject is not that of its files"),
        (lambda p: p["serialization"].update(hash_type="blake3"), "has digests of files by blake3"),
        (
            lambda p: p.update(ledger={"origin": "x", "records": 1, "hash": "0" * 64}),
            "ledger.jsonl is missing, but its head was signed",
        ),
    ],
)
def test_a_signature_of_other_content_is_refused(
    rkif: Rkif,
    folder: Path,
    keys: tuple[Path, Path],
    edit: Callable[[dict[str, Any]], object],
    message: str,
) -> None:
    assert rkif("sign", folder, "--key", keys[0])[0] == 0
    sign_again(folder, keys[0], lambda predicate: None)
    assert rkif("verify", folder, "--key", keys[1])[0] == 0
    sign_again(folder, keys[0], edit)
    errors = refused(rkif, "verify", folder, "--key", keys[1])
    assert errors.count("\n") == 1
    assert message in errors


def test_files_that_the_signer_left_out_are_listed(rkif: Rkif, folder: Path, keys: tuple[Path, Path]) -> None:
    signed = ("--private_key", keys[0], "--signature", folder / "model.sig")
    ignored = ("--ignore-paths", folder / "README.md")
    assert model_signing("sign", "key", folder, *signed, *ignored)[0] == 0
    (folder / "README.md").write_text("x")
    expected = f"{folder}: 4 files are as signed; the signer left out README.md\n"
    assert rkif("verify", folder, "--key", keys[1]) == (0, expected, "")


def test_a_folder_that_cannot_be_read_is_an_error(
    rkif: Rkif, folder: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert rkif("sign", folder, "--key", keys[0])[0] == 0
    (folder / "locked").mkdir()
    scan = os.scandir

    def scandir(path: Any) -> Any:
        if Path(path) == folder / "locked":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    expected = f"rkif: error: Permission denied: {folder / 'locked'}\n"
    assert refused(rkif, "verify", folder, "--key", keys[1]) == expected


def test_all_differences_are_listed(rkif: Rkif, folder: Path, keys: tuple[Path, Path]) -> None:
    assert rkif("sign", folder, "--key", keys[0])[0] == 0
    (folder / "README.md").write_text("x")
    (folder / "more").write_text("x")
    errors = refused(rkif, "verify", folder, "--key", keys[1])
    assert errors.splitlines() == [
        "- README.md was changed after it was signed",
        f"rkif: error: {folder}: more was not there when the folder was signed",
    ]


def test_gits_files_and_a_second_signature_change_nothing(
    rkif: Rkif, folder: Path, keys: tuple[Path, Path]
) -> None:
    for _ in range(2):
        assert rkif("sign", folder, "--key", keys[0])[0] == 0
        (folder / ".git" / "HEAD").write_text("other")
        (folder / ".gitignore").write_text("x")
        assert rkif("verify", folder, "--key", keys[1])[0] == 0
    assert rkif("verify", folder)[0] == 0  # against the manifest


def test_another_key_is_refused(rkif: Rkif, folder: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    _, other = write_keys(tmp_path, "other")
    assert rkif("sign", folder, "--key", keys[0])[0] == 0
    assert "it names another key" in refused(rkif, "verify", folder, "--key", other)
    hint = VerifyingKey(other).fingerprint
    garble(folder / "model.sig", lambda b: b["verificationMaterial"]["publicKey"].update(hint=hint))
    assert "or not of the key" in refused(rkif, "verify", folder, "--key", other)


def test_keys_that_cannot_be_used_are_one_clear_line(
    rkif: Rkif, folder: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ed25519

    private, public = keys
    key = serialization.load_pem_private_key(private.read_bytes(), None)
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    locked, other = tmp_path / "locked.pem", tmp_path / "ed25519.pem"
    locked.write_bytes(key.private_bytes(pem, pkcs8, serialization.BestAvailableEncryption(b"word")))
    other.write_bytes(
        ed25519.Ed25519PrivateKey.generate().private_bytes(pem, pkcs8, serialization.NoEncryption())
    )
    koblitz, _ = write_keys(tmp_path, "koblitz", "SECP256K1")
    shutil.copy(private, folder / "key.pem")
    for path, message in {
        locked: f"--key: {locked} needs a password",
        other: "holds a key of another kind; it must be on P-256, P-384 or P-521",
        koblitz: "holds a key on the curve secp256k1; it must be on P-256, P-384 or P-521",
        public: f"--key: {public} holds no private key in PEM",
        tmp_path / "none": f"No such file or directory: {tmp_path / 'none'}",
    }.items():
        errors = refused(rkif, "sign", tmp_path, "--key", path)
        assert errors.count("\n") == 1
        assert message in errors
        assert not (tmp_path / "model.sig").exists()
    assert "key.pem was added" in refused(rkif, "sign", folder, "--key", folder / "key.pem")
    assert "so it would be published" in refused(rkif, "sign", tmp_path, "--key", private)
    (folder / "key.pem").unlink()
    assert rkif("sign", folder, "--key", private)[0] == 0
    assert "holds no public key" in refused(rkif, "verify", folder, "--key", private)


def test_a_damaged_folder_is_not_signed(
    rkif: Rkif, run: Path, folder: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    (run / "metrics.json").write_text((run / "metrics.json").read_text() + " ")
    assert "metrics.json is not the file that was written" in refused(rkif, "sign", run, "--key", keys[0])
    (folder / "README.md").write_text("x")
    assert "README.md has 1 bytes" in refused(rkif, "sign", folder, "--key", keys[0])
    assert f"no such folder: {tmp_path / 'none'}" in refused(
        rkif, "sign", tmp_path / "none", "--key", keys[0]
    )
    assert not list(tmp_path.rglob("model.sig"))


@pytest.mark.parametrize("name", ["ledger.jsonl", "config.yaml"])
def test_a_run_without_one_of_its_files_is_not_signed_as_another_folder(
    rkif: Rkif, run: Path, keys: tuple[Path, Path], name: str
) -> None:
    (run / name).unlink()
    assert name in refused(rkif, "sign", run, "--key", keys[0])
    assert not (run / "model.sig").exists()


def test_a_run_is_verified_by_its_ledger(rkif: Rkif, run: Path) -> None:
    assert rkif("verify", run) == rkif("log", run, "--verify")
    (run / "metrics.json").write_text((run / "metrics.json").read_text() + " ")
    assert "metrics.json" in refused(rkif, "verify", run)


def test_a_missing_package_is_named_with_its_extra(
    rkif: Rkif, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)
    for command in ("sign", "verify"):
        assert refused(rkif, command, folder, "--key", tmp_path / "key.pem") == (
            'rkif: error: signatures need cryptography: pip install ".[sign]" in the source folder of rkif\n'
        )
