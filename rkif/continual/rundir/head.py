"""The head of a run's ledger, and its comparison with an earlier head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rkif.attest.head import LedgerHead
from rkif.ledger.chain import LedgerError, LedgerRecord


def head_of(records: Sequence[LedgerRecord]) -> LedgerHead:
    """The head of a ledger with at least one record. Its origin has 16 digits of the first record's hash."""
    return LedgerHead(
        origin=f"rkif.ledger/{records[0]['hash'][:16]}", records=len(records), hash=records[-1]["hash"]
    )


def require_head(records: Sequence[LedgerRecord], head: LedgerHead, ledger: Path, noted: object) -> None:
    """Check that records continue an earlier head.

    Args:
        records: at least one record, in an unbroken chain.
        head: the earlier head.
        ledger: the file of the records, for messages.
        noted: the source of the earlier head, for messages.

    Raises:
        LedgerError: the ledger is that of another run, was rewritten, or lacks records.
    """
    origin = head_of(records).origin
    if origin != head.origin:
        raise LedgerError(
            f"{ledger}: record 0 is not that of {noted}: the ledger was rewritten, or is that of another run"
        )
    if len(records) < head.records:
        raise LedgerError(
            f"{ledger}: record {len(records)} is missing: {noted} has a head of {head.records} records"
        )
    hash_ = records[head.records - 1]["hash"]
    if hash_ != head.hash:
        raise LedgerError(
            f"{ledger}: record {head.records - 1} was rewritten: its hash is {hash_}; {noted} has {head.hash}"
        )
