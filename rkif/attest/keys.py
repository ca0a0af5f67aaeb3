"""Elliptic curve keys in PEM files, for ECDSA with the curve's hash. No network is used."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

HASH_OF_CURVE = {"secp256r1": "SHA256", "secp384r1": "SHA384", "secp521r1": "SHA512"}


class SigningKey:
    """A private key for signatures.

    Args:
        path: a PEM file without a password.

    Raises:
        ValueError: the file holds no private key on the curves P-256, P-384 and P-521, or needs a password.
        ImportError: cryptography is not installed.
    """

    def __init__(self, path: Path) -> None:
        serialization = _cryptography().hazmat.primitives.serialization
        try:
            self._key = serialization.load_pem_private_key(path.read_bytes(), None)
        except TypeError:
            raise ValueError(f"--key: {path} needs a password; give a key without one") from None
        except (ValueError, _cryptography().exceptions.UnsupportedAlgorithm):
            raise ValueError(f"--key: {path} holds no private key in PEM") from None
        self._algorithm = _algorithm(self._key, path)

    def sign(self, message: bytes) -> bytes:
        return bytes(self._key.sign(message, self._algorithm))

    @property
    def fingerprint(self) -> str:
        return _fingerprint(self._key.public_key())


class VerifyingKey:
    """A public key to verify signatures.

    Args:
        path: a PEM file.

    Raises:
        ValueError: the file holds no public key on the curves P-256, P-384 and P-521.
        ImportError: cryptography is not installed.
    """

    def __init__(self, path: Path) -> None:
        serialization = _cryptography().hazmat.primitives.serialization
        try:
            self._key = serialization.load_pem_public_key(path.read_bytes())
        except (ValueError, _cryptography().exceptions.UnsupportedAlgorithm):
            raise ValueError(f"--key: {path} holds no public key in PEM") from None
        self._algorithm = _algorithm(self._key, path)

    def accepts(self, signature: bytes, message: bytes) -> bool:
        """Whether ``signature`` is a signature of ``message`` by this key."""
        try:
            self._key.verify(signature, message, self._algorithm)
        except _cryptography().exceptions.InvalidSignature:
            return False
        return True

    @property
    def fingerprint(self) -> str:
        return _fingerprint(self._key)


def _algorithm(key: Any, path: Path) -> Any:
    """The curve's signature algorithm."""
    primitives = _cryptography().hazmat.primitives
    curve = getattr(getattr(key, "curve", None), "name", None)
    if curve not in HASH_OF_CURVE:
        kind = f"on the curve {curve}" if curve else "of another kind"
        raise ValueError(f"--key: {path} holds a key {kind}; it must be on P-256, P-384 or P-521")
    return primitives.asymmetric.ec.ECDSA(getattr(primitives.hashes, HASH_OF_CURVE[curve])())


def _fingerprint(public_key: Any) -> str:
    """SHA-256 of the public key in PEM, by which OpenSSF Model Signing identifies a key."""
    serialization = _cryptography().hazmat.primitives.serialization
    pem = public_key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(pem).hexdigest()


def _cryptography() -> Any:
    try:
        import cryptography.exceptions
        import cryptography.hazmat.primitives.asymmetric.ec
        import cryptography.hazmat.primitives.hashes
        import cryptography.hazmat.primitives.serialization
    except ImportError as error:
        raise ImportError(
            'signatures need cryptography: pip install ".[sign]" in the source folder of rkif'
        ) from error
    return cryptography
