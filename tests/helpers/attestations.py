"""Shared by the tests of signatures, heads and test results."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import Rkif


def write_keys(folder: Path, name: str = "key", curve: str = "SECP256R1") -> tuple[Path, Path]:
    """A new private and public key in PEM."""
    pytest.importorskip("cryptography")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(getattr(ec, curve)())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    (folder / f"{name}.pem").write_bytes(private)
    (folder / f"{name}.pub").write_bytes(public)
    return folder / f"{name}.pem", folder / f"{name}.pub"


def refused(rkif: Rkif, *arguments: object) -> str:
    status, output, errors = rkif(*arguments)
    assert (status, output) == (1, "")
    assert errors.splitlines()[-1].startswith("rkif: error: ")
    return errors
