"""The states after a run's rounds, kept within a budget of disk space."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from rkif.continual.rundir.state import RunState, read_state, state_bytes, write_state


class RoundStates:
    """Run states on disk, by the number of the round before them; 0 is the state before the first round.

    If the files exceed ``budget`` bytes, :func:`next_to_drop` chooses which to delete, so that the gaps
    between states grow with their age. A state larger than the budget is not written.

    Args:
        run: the run's folder. The states are in ``run/snapshots``, which the first state creates.
        budget: bytes. With 0, no state is written; states that were kept can be read.
    """

    def __init__(self, run: Path, budget: int = 0) -> None:
        self.folder = run / "snapshots"
        self.budget = budget

    def write(self, number: int, state: RunState, record: Callable[[str], object] | None = None) -> None:
        """Write the state after round ``number``, replacing an earlier one of that round.

        Args:
            number: number of the round.
            state: the state.
            record: called with the file's SHA-256 before the file is renamed; not called if no file is
                written.
        """
        if state_bytes(state) > self.budget:
            return
        self.folder.mkdir(exist_ok=True)
        write_state(self.path(number), state, record)
        sizes = {n: self.path(n).stat().st_size for n in self.rounds()}
        while sum(sizes.values()) > self.budget:
            dropped = next_to_drop(sorted(sizes))
            self.path(dropped).unlink()
            del sizes[dropped]

    def read(self, number: int) -> RunState:
        """Read the state after round ``number``.

        Raises:
            ValueError: the state was not kept, or its file is damaged.
        """
        if number not in self.rounds():
            kept = ", ".join(map(str, self.rounds())) or "none"
            raise ValueError(f"the state after round {number} was not kept; kept states: {kept}")
        return read_state(self.path(number))

    def rounds(self) -> list[int]:
        """The rounds whose state is kept, ascending. Files of other names are ignored."""
        names = (path.name for path in self.folder.glob("*.safetensors"))
        return sorted(
            int(name.split(".")[0]) for name in names if re.fullmatch(r"\d{6,}\.safetensors", name, re.A)
        )

    def later_than(self, number: int) -> list[Path]:
        """The files of the states of later rounds.

        Raises:
            ValueError: one of them is not a file.
        """
        paths = [self.path(later) for later in self.rounds() if later > number]
        for path in paths:
            if not path.is_file():
                raise ValueError(f"{path} is damaged: it is not a file")
        return paths

    def path(self, number: int) -> Path:
        """The file of the state after round ``number``."""
        return self.folder / f"{number:06d}.safetensors"


def next_to_drop(numbers: Sequence[int]) -> int:
    """The round whose state to delete, chosen from ascending rounds.

    Its neighbours have the smallest distance relative to its age; of two equal ones, it is the earlier. The
    newest is deleted only if it is the only one. So the gaps grow with age.
    """
    if len(numbers) == 1:
        return numbers[0]
    newest = numbers[-1]
    before = [-1, *numbers]
    gaps = {
        number: (numbers[place + 1] - before[place]) / (newest - number)
        for place, number in enumerate(numbers[:-1])
    }
    return min(gaps, key=lambda number: (gaps[number], number))
