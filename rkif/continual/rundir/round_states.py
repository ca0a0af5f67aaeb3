"""The states that a run can return to: one after every round, thinned to a budget of disk space."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rkif.continual.rundir.state import RunState, read_state, state_bytes, write_state


class RoundStates:
    """States by the number of rounds that had been fused by then.

    Where they would take more than ``budget`` bytes, some are given up: of all but the newest the one whose
    neighbours lie closest together for its age. So the gaps grow with the age, and what is left of a long run
    is dense at its end. A state that is larger than the budget by itself is not written.

    Args:
        folder: made by the first snapshot.
        budget: bytes; 0 for no snapshots.
    """

    def __init__(self, folder: Path, budget: int) -> None:
        self.folder = folder
        self.budget = budget

    def write(self, number: int, state: RunState) -> None:
        """Keep the state after ``number`` rounds, in place of what was kept under that number."""
        if state_bytes(state) > self.budget:
            return
        self.folder.mkdir(exist_ok=True)
        write_state(self._path(number), state)
        sizes = {n: self._path(n).stat().st_size for n in self.rounds()}
        while sum(sizes.values()) > self.budget:
            given_up = next_to_drop(sorted(sizes))
            self._path(given_up).unlink()
            del sizes[given_up]

    def read(self, number: int) -> RunState:
        """The state after ``number`` rounds.

        Raises:
            ValueError: it was not kept, or the file is damaged.
        """
        if number not in self.rounds():
            kept = ", ".join(map(str, self.rounds())) or "none"
            raise ValueError(f"the state after round {number} was not kept; there are: {kept}")
        return read_state(self._path(number))

    def rounds(self) -> list[int]:
        """What is there, in order."""
        return sorted(int(path.stem) for path in self.folder.glob("*.safetensors"))

    def discard_after(self, number: int) -> None:
        """Give up the states of later rounds."""
        for later in self.rounds():
            if later > number:
                self._path(later).unlink()

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"


def next_to_drop(numbers: Sequence[int]) -> int:
    """Of ascending numbers the one to give up: never the newest while there is another."""
    if len(numbers) == 1:
        return numbers[0]
    newest = numbers[-1]
    before = [-1, *numbers]
    gaps = {
        number: (numbers[place + 1] - before[place]) / (newest - number)
        for place, number in enumerate(numbers[:-1])
    }
    return min(gaps, key=lambda number: (gaps[number], number))
