"""The head of a ledger, in the form of a C2SP checkpoint (c2sp.org/tlog-checkpoint) without signatures.

A checkpoint is a text of three lines: the log's name, the number of its entries, and its root hash in base64.
For a ledger, the hash is that of the last record. It depends on all records, but it is not a Merkle root, so
there are no proofs of inclusion.
"""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from rkif.attest.statement import Sha256Hex
from rkif.files import read_text


class LedgerHead(BaseModel):
    """The state of a ledger.

    Attributes:
        origin: the ledger's name.
        records: number of records.
        hash: hash of the last record, in hexadecimal digits.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    origin: str
    records: Annotated[int, Field(ge=1)]
    hash: Sha256Hex

    @property
    def root(self) -> str:
        """The hash in base64."""
        return base64.b64encode(bytes.fromhex(self.hash)).decode()

    def to_checkpoint(self) -> str:
        """The text of the checkpoint, with the empty line that signatures would follow."""
        return f"{self.origin}\n{self.records}\n{self.root}\n\n"


def read_checkpoint_note(path: Path) -> LedgerHead:
    """Read a head from a checkpoint, as :meth:`LedgerHead.to_checkpoint` forms it; ignore signatures.

    Raises:
        ValueError: the file holds no checkpoint.
        OSError: it cannot be read.
    """
    lines = read_text(path).split("\n")
    if len(lines) < 4 or not lines[0] or not re.fullmatch(r"[1-9][0-9]{0,17}", lines[1]):
        raise ValueError(f"{path} holds no head: its lines are not origin, number of records and hash")
    try:
        root = base64.b64decode(lines[2], validate=True)
    except ValueError:
        root = b""
    if len(root) != 32:
        raise ValueError(f"{path} holds no head: its third line is not a SHA-256 in base64")
    return LedgerHead(origin=lines[0], records=int(lines[1]), hash=root.hex())
