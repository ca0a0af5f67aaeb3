"""The ledger's chain: records are read as written, and every change is found."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkif.ledger.chain import START, Ledger, LedgerError, canonical, digest, read_ledger

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
RECORDS = st.dictionaries(
    st.text().filter(lambda key: key not in ("seq", "previous", "hash")), VALUES, max_size=4
)


@given(contents=st.lists(RECORDS, min_size=1, max_size=6), again=st.integers(0, 6))
def test_records_are_read_as_written(
    tmp_path_factory: pytest.TempPathFactory, contents: Any, again: int
) -> None:
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    ledger = Ledger(path)
    for place, content in enumerate(contents):
        if place == again:
            ledger = Ledger(path)  # closed and opened again
        ledger.append(content)
    records = list(read_ledger(path))
    assert records == ledger.records == Ledger(path).records
    previous = START
    for seq, (record, content) in enumerate(zip(records, contents, strict=True)):
        assert {
            key: value for key, value in record.items() if key not in ("seq", "previous", "hash")
        } == content
        assert (record["seq"], record["previous"]) == (seq, previous)
        previous = record["hash"]
    assert ledger.head == previous
    assert len(path.read_bytes().splitlines()) == len(contents)  # one line per record, for any text


def written(folder: Path, count: int = 3) -> Path:
    ledger = Ledger(folder / "ledger.jsonl")
    for number in range(count):
        ledger.append({"round": number, "norm": 0.1 * number, "verdict": "keep"})
    return ledger.path


def test_every_flipped_bit_is_found_and_named(tmp_path: Path) -> None:
    content = written(tmp_path).read_bytes()
    path = tmp_path / "changed.jsonl"
    ends = [i for i, byte in enumerate(content) if byte == ord("\n")]
    for at in range(0, len(content), 3):
        for bit in (0, 3, 6):
            path.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
            with pytest.raises(LedgerError) as caught:
                list(read_ledger(path))
            bad = sum(end < at for end in ends)
            assert f"record {bad}" in str(caught.value), (at, bit)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[1:], "record 0 has seq 1"),
        (lambda lines: [lines[0], lines[2]], "record 1 has seq 2"),
        (lambda lines: [lines[1], lines[0], lines[2]], "record 0 has seq 1"),
        (lambda lines: [*lines, lines[2]], "record 3 has seq 2"),
        (lambda lines: [lines[0], b"[]", lines[2]], "record 1 lacks one of the keys"),
        (lambda lines: [lines[0], b"{}", lines[2]], "record 1 lacks one of the keys"),
        (lambda lines: [lines[0], b"", lines[2]], "record 1 is not JSON"),
        (lambda lines: [lines[0], lines[1].replace(b":", b": ", 1), lines[2]], "record 1 was rewritten"),
    ],
)
def test_removed_moved_and_rewritten_lines_are_found(tmp_path: Path, change: Any, message: str) -> None:
    path = written(tmp_path)
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"".join(line + b"\n" for line in change(lines)))
    with pytest.raises(LedgerError, match=message):
        list(read_ledger(path))
    with pytest.raises(LedgerError, match=message):
        Ledger(path)  # no further record is appended


def test_a_rewritten_record_breaks_the_chain(tmp_path: Path) -> None:
    path = written(tmp_path)
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    del lines[1]["hash"]
    lines[1]["verdict"] = "undo"
    lines[1]["hash"] = digest(lines[1])
    path.write_bytes(b"".join(canonical(line) + b"\n" for line in lines))
    with pytest.raises(LedgerError, match="record 2 does not follow"):
        list(read_ledger(path))


def test_an_incomplete_line_is_moved_and_the_ledger_continues(tmp_path: Path) -> None:
    whole = written(tmp_path).read_bytes()
    for cut in range(whole.rindex(b"\n", 0, -1) + 2, len(whole)):
        path = tmp_path / f"{cut}" / "ledger.jsonl"
        path.parent.mkdir()
        path.write_bytes(whole[:cut])
        with pytest.raises(LedgerError, match="record 2 is incomplete"):
            list(read_ledger(path))
        ledger = Ledger(path)
        start = whole.rindex(b"\n", 0, -1) + 1
        assert ledger.torn == cut - start
        assert path.with_name("ledger.jsonl.torn").read_bytes() == whole[start:cut] + b"\n"
        assert len(ledger.records) == 2
        ledger.append({"round": 2, "norm": 0.2, "verdict": "keep"})
        assert path.read_bytes() == whole
        assert Ledger(path).torn == 0


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    """Else a ledger from elsewhere could append its unfinished line to any file of the user."""
    victim = tmp_path / "victim"
    victim.write_text("another's file\n")
    path = written(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole + b"a command")
    (tmp_path / "ledger.jsonl.torn").symlink_to(victim)
    with pytest.raises(OSError, match=r"ledger\.jsonl\.torn"):
        Ledger(path)
    assert path.read_bytes() == whole + b"a command"
    (tmp_path / "link.jsonl").symlink_to(victim)
    with pytest.raises(LedgerError, match=r"link\.jsonl is a link"):
        Ledger(tmp_path / "link.jsonl")
    assert victim.read_text() == "another's file\n"


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path)
    first, second = Ledger(path), Ledger(path)
    first.append({"round": 3})
    whole = path.read_bytes()
    for _ in range(2):
        with pytest.raises(LedgerError, match=r"ledger\.jsonl was changed by another process"):
            second.append({"round": 3})
    assert path.read_bytes() == whole
    path.unlink()
    with pytest.raises(FileNotFoundError):
        first.append({"round": 4})
    assert not path.exists()


def test_a_record_that_cannot_be_written_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path)
    whole, ledger, write = path.read_bytes(), Ledger(path), os.write

    def fill(descriptor: int, content: bytes) -> int:
        if len(content) < 50:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, content[:50])

    with monkeypatch.context() as full:
        full.setattr(os, "write", fill)
        with pytest.raises(OSError, match="No space left on device"):
            ledger.append({"round": 3})
    assert path.read_bytes() == whole
    ledger.append({"round": 3})
    assert [record["seq"] for record in read_ledger(path)] == [0, 1, 2, 3]


@pytest.mark.parametrize("value", [True, 1.0])
def test_a_place_in_the_chain_is_an_integer(tmp_path: Path, value: Any) -> None:
    path = written(tmp_path, 2)
    first, second = (json.loads(line) for line in path.read_bytes().splitlines())
    del second["hash"]
    second["seq"] = value
    second["hash"] = digest(second)
    path.write_bytes(canonical(first) + b"\n" + canonical(second) + b"\n")
    with pytest.raises(LedgerError, match=f"record 1 has seq {value}"):
        list(read_ledger(path))


def test_invalid_records_are_refused(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    with pytest.raises(ValueError, match="'hash' is a key that the ledger itself writes"):
        ledger.append({"hash": "x"})
    with pytest.raises(ValueError, match="not JSON compliant"):
        ledger.append({"norm": float("nan")})
    assert not ledger.path.exists()
    assert ledger.head == START
