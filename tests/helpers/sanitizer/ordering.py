"""Races between the programs of a launch, given the order that atomics establish.

Programs run in any order and at the same time. Two accesses of the same bytes by two programs race, unless
both are loads, both are atomic, or one precedes the other. Only atomics order programs: if an atomic of
program A releases an address and a later atomic of program B acquires this address, what A did before its
atomic precedes what B does after its own. Vector clocks compute this relation. ttsem runs programs one after
the other, so the order of the run is the modification order of every address. All accesses of one program
count as ordered: the barriers around its atomics are not checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from ttsem.memory import Memory
from ttsem.ops import OPS
from ttsem.pidraces import PidRace

Program = tuple[int, int, int]

# Values of the attributes `sem` and `scope` of Triton's atomic operations.
ACQUIRES, RELEASES = {2, 4}, {3, 4}  # acquire, release, acq_rel; 1 is relaxed
CTA = 2  # the scope of one program: it orders no other
LOAD, ATOMIC, STORE = range(3)
KINDS = {"r": LOAD, "a": ATOMIC, "w": STORE, "s": STORE}  # "s": a store of the bytes that are already there


@dataclass(frozen=True, eq=False)
class Segment:
    """The accesses of a program between two of its acquires or releases.

    Attributes:
        time: number of releases of the program before the segment.
        known: for other programs, the number of releases that precede the segment.
    """

    program: Program
    time: int
    known: Mapping[Program, int]

    def follows(self, other: Segment) -> bool:
        return self.program == other.program or self.known.get(other.program, 0) > other.time


class Clocks:
    """The vector clocks of programs that run one after the other, and of the addresses that they release."""

    def __init__(self) -> None:
        self._released: dict[int, dict[Program, int]] = {}

    def begin(self, program: Program) -> None:
        self.segment = Segment(program, 0, {})

    def acquire(self, addresses: Iterable[int]) -> None:
        now = self.segment
        known = _latest([now.known, *(self._released.get(address, {}) for address in addresses)])
        self.segment = Segment(now.program, now.time, known)

    def release(self, addresses: Iterable[int]) -> None:
        """An atomic that does not release an address keeps its clock: a release sequence continues."""
        now = self.segment
        self.segment = Segment(now.program, now.time + 1, now.known)
        precedes = {**now.known, now.program: now.time + 1}
        for address in addresses:
            self._released[address] = _latest([self._released.get(address, {}), precedes])

    def overwrite(self, addresses: np.ndarray[Any, Any]) -> None:
        """A store ends the release sequence of its addresses."""
        for address in np.intersect1d(addresses, list(self._released)).tolist():
            del self._released[address]


def _latest(clocks: Iterable[Mapping[Program, int]]) -> dict[Program, int]:
    joined: dict[Program, int] = {}
    for clock in clocks:
        joined |= {program: max(time, joined.get(program, 0)) for program, time in clock.items()}
    return joined


class OrderedMemory(Memory):
    """Memory that logs every access with its segment."""

    def __init__(self, *args: Any) -> None:
        self._clocks = Clocks()
        self.attributes: Mapping[str, Any] = {}  # of the current operation, if it is atomic
        super().__init__(*args)

    @property
    def agent(self) -> Segment:
        return self._clocks.segment

    @agent.setter
    def agent(self, program: Program) -> None:
        self._clocks.begin(program)

    def store(self, addrs: Any, values: Any, mask: Any) -> None:
        self._clocks.overwrite(_live(addrs, mask))
        super().store(addrs, values, mask)

    def atomic(self, kind: str, addrs: Any, values: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        semantics = self.attributes["sem"] if self.attributes["scope"] != CTA else None
        addresses = np.unique(_live(addrs, mask)).tolist()
        if semantics in ACQUIRES:
            self._clocks.acquire(addresses)
        old = super().atomic(kind, addrs, values, mask, *args, **kwargs)
        if semantics in RELEASES:
            self._clocks.release(addresses)
        return old


def _live(addrs: Any, mask: Any) -> np.ndarray[Any, Any]:
    addresses = np.asarray(addrs, dtype=np.int64)
    return addresses.reshape(-1) if mask is None else addresses[np.broadcast_to(mask, addresses.shape)]


def pass_attributes() -> None:
    """Pass the attributes of atomic operations to the memory; ttsem reads only the kind of operation."""

    def passing(handler: Any) -> Any:
        def handle(interp: Any, op: Any, args: Any) -> Any:
            interp.memory.attributes = op.attrs
            return handler(interp, op, args)

        return handle

    for name in ("tt.atomic_rmw", "tt.atomic_cas"):
        OPS[name] = passing(OPS[name])


def find_race(log: list[Any] | None) -> PidRace | None:
    """The first pair of accesses that race, of a log of :class:`OrderedMemory`."""
    if not log:
        return None
    address, entry = _granules(log)
    segments = list(dict.fromkeys(one[0] for one in log))  # in the order of the run
    places = {segment: place for place, segment in enumerate(segments)}
    programs = {program: place for place, program in enumerate(dict.fromkeys(s.program for s in segments))}
    segment = np.array([places[one[0]] for one in log])[entry]
    program = np.array([programs[one[0].program] for one in log])[entry]
    kind = np.array([KINDS[one[1]] for one in log])[entry]

    # One row for each kind of access of a segment to an address, in the order of address and run.
    order = np.lexsort((kind, segment, address))
    rows = address[order], segment[order], kind[order]
    new = np.concatenate(([True], np.any([row[1:] != row[:-1] for row in rows], axis=0)))
    order = order[new]
    address, segment, kind, program = address[order], segment[order], kind[order], program[order]

    for distance in range(1, len(order)):
        same = address[distance:] == address[:-distance]
        if not same.any():
            return None
        first, second = kind[:-distance], kind[distance:]
        conflict = same & (program[:-distance] != program[distance:]) & ((first != second) | (first == STORE))
        pairs = segment[:-distance] * len(segments) + segment[distance:]
        for pair in np.unique(pairs[conflict]).tolist():
            before, after = (segments[place] for place in divmod(pair, len(segments)))
            if not after.follows(before):
                at = int(np.flatnonzero(conflict & (pairs == pair))[0])
                return _race(log, entry[order[at]], entry[order[at + distance]], int(address[at]))
    return None


def _granules(log: list[Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The addresses of all accesses, and the index of each in the log, in units of the narrowest access."""
    width = min(one[4] for one in log)
    parts = [(one[3][:, None] // width + np.arange(one[4] // width)).reshape(-1) for one in log]
    return np.concatenate(parts) * width, np.repeat(np.arange(len(log)), [part.size for part in parts])


def _race(log: list[Any], first: int, second: int, address: int) -> PidRace:
    sides = [(log[index][0].program, log[index][1], log[index][2]) for index in (first, second)]
    kind = "write-write" if {KINDS[side[1]] for side in sides} == {STORE} else "read-write"
    return PidRace(kind, address, *sides, min(log[first][4], log[second][4]))
