"""A folder's signature in the format of OpenSSF Model Signing, version 1.0.

``model.sig`` is a Sigstore bundle with a DSSE envelope around an in-toto Statement. The Statement has the
SHA-256 of every file. Its predicate may have further fields, which other verifiers ignore: rkif adds the head
of a run's ledger. The library model-signing cannot write further fields, so rkif writes the envelope itself.
The library can verify it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import Field, model_validator

from rkif.attest.head import LedgerHead
from rkif.attest.keys import SigningKey, VerifyingKey
from rkif.attest.statement import (
    PAYLOAD_TYPE,
    Content,
    Sha256Hex,
    make_statement,
    parse_statement,
    resource,
)
from rkif.files import file_sha256, parse_json, validated, write_text

SIGNATURE = "model.sig"  # in the signed folder
PREDICATE_TYPE = "https://model_signing/signature/v1.0"
BUNDLE_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
# Limits of a signature's size: a constant, and for each file a path of 4096 bytes, JSON-escaped, in base64.
MAX_BYTES, MAX_BYTES_PER_FILE = 2**20, 2**15
# Files of git, which model-signing does not sign by default either, and the signature itself.
IGNORED = (".git", ".gitattributes", ".github", ".gitignore", SIGNATURE)


class _Signature(Content):
    sig: str


class _Envelope(Content):
    payload: str
    payload_type: Literal["application/vnd.in-toto+json"]
    signatures: Annotated[list[_Signature], Field(min_length=1, max_length=1)]


class _PublicKey(Content):
    hint: str


class _Material(Content):
    public_key: _PublicKey


class _Bundle(Content):
    media_type: Literal["application/vnd.dev.sigstore.bundle.v0.3+json"]
    verification_material: _Material
    dsse_envelope: _Envelope


class _Serialization(Content):
    method: str
    hash_type: str = Field(alias="hash_type")
    ignore_paths: list[str] = Field([], alias="ignore_paths")


class _Resource(Content):
    name: str
    algorithm: Literal["sha256"]
    digest: Sha256Hex


class Signed(Content):
    """The predicate of a signature.

    Attributes:
        serialization: how the digests were computed.
        resources: the files with their digests.
        ledger: the head of the run's ledger when it was signed; None for a folder without a ledger.
    """

    serialization: _Serialization
    resources: list[_Resource]
    ledger: LedgerHead | None = None

    @model_validator(mode="after")
    def _names(self) -> Signed:
        if len({one.name for one in self.resources}) < len(self.resources):
            raise ValueError("resources: a name is listed twice")
        return self

    @property
    def left_out(self) -> list[str]:
        """Paths in the folder that the signer left out, without those that rkif leaves out as well."""
        return sorted(set(self.serialization.ignore_paths) - set(IGNORED))


def sign_folder(folder: Path, key: Path, ledger: LedgerHead | None) -> int:
    """Sign every file of a folder; write ``model.sig``, which replaces an earlier one.

    Args:
        folder: the folder.
        key: PEM file of a private key.
        ledger: the head to sign with the files.

    Returns:
        The number of signed files.

    Raises:
        ValueError: the key cannot be used or is in the folder, or an entry is neither a file nor a folder.
        ImportError: cryptography is not installed.
    """
    signing_key = SigningKey(key)
    if key.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"--key: {key} is in {folder}, so it would be published with it; move it elsewhere")
    digests = _file_digests(folder, IGNORED)
    predicate = {
        "serialization": {
            "method": "files",
            "hash_type": "sha256",
            "allow_symlinks": False,
            "ignore_paths": list(IGNORED),
        },
        "resources": [
            {"name": name, "algorithm": "sha256", "digest": digest} for name, digest in digests.items()
        ],
    } | ({} if ledger is None else {"ledger": ledger.model_dump()})
    subject = resource(folder.resolve().name, _root_digest(list(digests.values())))
    payload = json.dumps(make_statement([subject], PREDICATE_TYPE, predicate)).encode()
    bundle = {
        "mediaType": BUNDLE_TYPE,
        "verificationMaterial": {"publicKey": {"hint": signing_key.fingerprint}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": _base64(payload),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [{"sig": _base64(signing_key.sign(_pre_authentication(payload))), "keyid": ""}],
        },
    }
    write_text(folder / SIGNATURE, json.dumps(bundle) + "\n")
    return len(digests)


def read_signature(folder: Path, key: Path) -> Signed:
    """Verify the signature of a folder with a key, and return its predicate. Files are not compared.

    Args:
        folder: the folder.
        key: PEM file of a public key.

    Raises:
        ValueError: there is no signature, it is too large for this folder, it is damaged, or it is of another
            key.
        ImportError: cryptography is not installed.
    """
    verifying_key, path = VerifyingKey(key), folder / SIGNATURE
    if not path.is_file():
        raise ValueError(f"{folder} has no {SIGNATURE}: it is not signed")
    bundle = validated(_Bundle, parse_json(_read(path), path), path)
    payload = _from_base64(bundle.dsse_envelope.payload, path)
    signature = _from_base64(bundle.dsse_envelope.signatures[0].sig, path)
    if bundle.verification_material.public_key.hint != verifying_key.fingerprint:
        raise ValueError(f"{path} is not of the key {key}: it names another key")
    if not verifying_key.accepts(signature, _pre_authentication(payload)):
        raise ValueError(
            f"{path} is damaged, or not of the key {key}: the signature does not fit its content"
        )
    statement = parse_statement(payload, PREDICATE_TYPE, path)
    signed = validated(Signed, statement.predicate, path)
    form = (signed.serialization.method, signed.serialization.hash_type)
    if form != ("files", "sha256"):
        raise ValueError(
            f"{path} has digests of {form[0]} by {form[1]}; rkif verifies those of files by sha256"
        )
    root = _root_digest([one.digest for one in signed.resources])
    if [one.digest.get("sha256") for one in statement.subject] != [root]:
        raise ValueError(f"{path} is damaged: the digest of its subject is not that of its files")
    return signed


def _read(path: Path) -> bytes:
    """The content of a signature file. It is not trusted, so its size is limited before it is parsed."""
    files = sum(entry.is_file() for entry in _entries(path.parent))
    limit = MAX_BYTES + files * MAX_BYTES_PER_FILE
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{path} has more than {limit:,} bytes, the limit for a folder of {files} files")
    return content


def compare_files(folder: Path, signed: Signed) -> list[str]:
    """The differences between the files of a folder and its signature, one line each.

    Raises:
        ValueError: an entry of the folder is neither a file nor a folder.
    """
    present = _file_digests(folder, (*IGNORED, *signed.serialization.ignore_paths))
    expected = {one.name: one.digest for one in signed.resources}
    problems = []
    for name in sorted(expected.keys() | present.keys()):
        if name not in present:
            problems.append(f"{name} is missing, but it was signed")
        elif name not in expected:
            problems.append(f"{name} was not there when the folder was signed")
        elif present[name] != expected[name]:
            problems.append(f"{name} was changed after it was signed")
    return problems


def _file_digests(folder: Path, ignored: Sequence[str]) -> dict[str, str]:
    """Path in the folder -> SHA-256 of every file, in the order of the paths."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    digests = {}
    for path in sorted(_entries(folder)):
        name = PurePosixPath(path.relative_to(folder))
        if any(name.is_relative_to(one) for one in ignored):
            continue
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path} is a link or a special file, which a signature cannot cover")
        if path.is_file():
            digests[str(name)] = file_sha256(path)
    return digests


def _entries(folder: Path) -> Iterator[Path]:
    """All entries of a folder tree, links not followed; unlike in rglob, an unreadable folder is an error."""

    def fail(error: OSError) -> None:
        raise error

    for parent, folders, files in os.walk(folder, onerror=fail):
        yield from (Path(parent, name) for name in (*folders, *files))


def _root_digest(digests: Sequence[str]) -> str:
    """SHA-256 over the bytes of digests, in their order."""
    return hashlib.sha256(b"".join(map(bytes.fromhex, digests))).hexdigest()


def _pre_authentication(payload: bytes) -> bytes:
    """The bytes that DSSE signs: the payload with its type and both lengths."""
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(payload), payload)


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _from_base64(text: str, path: Path) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise ValueError(f"{path} is damaged: it holds text that is not base64") from None
