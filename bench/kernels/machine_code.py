"""The machine code in cubins, disassembled by the CUDA tools in Triton's wheel, and its loops."""

from __future__ import annotations

import itertools
import re
import struct
import subprocess
import tempfile
from collections import Counter, deque
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import triton

INSTRUCTION = 16  # bytes, from sm_70 on
LOAD, STORE = "LDG", "STG"  # of global memory
BRANCHES, ENDS = ("BRA", "JMP"), ("BRX", "EXIT", "KILL", "RET")
SHF_EXECINSTR = 4  # of a section of an ELF file: it holds instructions


def disassemble(cubins: Sequence[bytes], arch: int) -> list[str]:
    """The instructions of each cubin, one per line.

    One call of the disassembler takes all cubins, because its start takes most of its time.
    """
    codes = [_machine_code(cubin) for cubin in cubins]
    # From sm_90 on Triton compiles for architecture-specific features.
    options = ("--no-dataflow", "--binary", f"SM{arch}{'a' if arch >= 90 else ''}")
    text = cuda_tool("nvdisasm", b"".join(codes), *options)
    lines = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/.*$", text, re.MULTILINE)
    if len(lines) * INSTRUCTION != sum(map(len, codes)):
        raise RuntimeError(f"{len(lines)} instructions disassembled of {sum(map(len, codes))} bytes of code")
    instructions = iter(lines)
    return ["\n".join(itertools.islice(instructions, len(code) // INSTRUCTION)) for code in codes]


def _machine_code(cubin: bytes) -> bytes:
    """The executable sections of a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count = struct.unpack_from("<HH", cubin, 0x3A)
    code = b""
    for section in range(count):
        _, _, flags, _, start, length = struct.unpack_from("<IIQQQQ", cubin, table + section * size)
        if flags & SHF_EXECINSTR:
            code += cubin[start : start + length]
    return code


def cuda_tool(name: str, content: bytes, *options: str) -> str:
    """The output of a CUDA tool in Triton's wheel for a file with this content."""
    binary = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(content)
        file.flush()
        done = subprocess.run([binary, *options, file.name], capture_output=True, text=True, check=True)
    return done.stdout


class Instruction(NamedTuple):
    """Attributes:
    operation: with its modifiers, as in ``LDG.E.128``.
    following: indices of the instructions that may come next.
    """

    operation: str
    following: tuple[int, ...]

    def is_kind(self, *kinds: str) -> bool:
        """Whether it is one of these operations, with any modifiers."""
        return self.operation.partition(".")[0] in kinds

    @property
    def bits(self) -> int:
        """Number of bits that a thread moves by this load or store."""
        width = re.search(r"\.[US]?(8|16|64|128|256)\b", self.operation)
        return int(width[1]) if width else 32


@dataclass(frozen=True)
class Loop:
    """A loop over blocks.

    Attributes:
        bulk: instructions that an iteration over a whole block may execute, in the order of the code; both
            branches of a condition, such as an addition by some threads only.
        loads_after_store: loads of the bulk after a store, which wait for memory once more.
        body: every instruction of the loop, including the paths for tails.
    """

    bulk: tuple[Instruction, ...]
    loads_after_store: int
    body: tuple[Instruction, ...]

    def bits(self, kind: str, widths: Container[int]) -> int:
        """Number of bits that a thread moves in one iteration by accesses of this kind and these widths."""
        return sum(each.bits for each in self.bulk if each.is_kind(kind) and each.bits in widths)

    def count(self, *kinds: str) -> int:
        """Number of instructions of these kinds in the body."""
        return sum(each.is_kind(*kinds) for each in self.body)


def parse(text: str) -> list[Instruction]:
    """The instructions of one kernel, from lines of :func:`disassemble`.

    Raises:
        RuntimeError: a branch's target is not an instruction.
    """
    lines = re.findall(r"/\*([0-9a-f]+)\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)([^;]*)", text)
    places = {int(address, 16): index for index, (address, *_) in enumerate(lines)}
    instructions = []
    for index, (_, predicate, operation, operands) in enumerate(lines):
        kind = operation.partition(".")[0]
        # The predicate of a branch may be among the operands.
        conditional = bool(predicate) or (kind == "BRA" and re.search(r"\bU?P\d", operands) is not None)
        following = []
        if kind in BRANCHES:
            target = int(re.findall(r"0x([0-9a-f]+)", operands)[-1], 16)
            if target not in places:
                raise RuntimeError(f"{operation}{operands} leads to no instruction")
            following.append(places[target])
        if (conditional or kind not in (*BRANCHES, *ENDS)) and index + 1 < len(lines):
            following.append(index + 1)
        instructions.append(Instruction(operation, tuple(following)))
    return instructions


def bulk_loop(code: Sequence[Instruction], loads: Counter[int], stores: Counter[int]) -> Loop | None:
    """The innermost loop with these global accesses, and the fewest others; None if there is none.

    Args:
        code: of one kernel.
        loads, stores: width in bits -> number of accesses of a thread for a whole block.
    """
    wanted = Counter({(LOAD, bits): n for bits, n in loads.items()})
    wanted += Counter({(STORE, bits): n for bits, n in stores.items()})
    if not wanted:
        return None
    rarest = min(wanted, key=lambda access: sum(_access(each) == access for each in code))
    cycles = (_cycle(code, index) for index, each in enumerate(code) if _access(each) == rarest)
    fitting = [cycle for cycle in cycles if wanted <= Counter(_access(code[index]) for index in cycle)]
    if not fitting:
        return None
    # Loops over samples or bins may have these accesses, too, and others.
    cycle = min(fitting, key=lambda cycle: (sum(_access(code[i]) is not None for i in cycle), len(cycle)))
    after = {index: each.following for index, each in enumerate(code)}
    before: dict[int, list[int]] = {}
    for index, each in enumerate(code):
        for following in each.following:
            before.setdefault(following, []).append(index)
    header = _header(after, cycle)
    last = cycle[cycle.index(header) - 1]
    body = _reached(before, [last], without=header) | {header}
    accesses = [index for index in cycle if _access(code[index]) in wanted]
    behind, ahead = (_reached(edges, accesses, without=header) for edges in (after, before))
    bulk = (behind & body) | ahead | {header}
    stored = _reached(after, [index for index in bulk if code[index].is_kind(STORE)], without=header)
    return Loop(
        tuple(code[index] for index in sorted(bulk) if not code[index].is_kind("NOP")),
        sum(code[index].is_kind(LOAD) for index in stored & bulk),
        tuple(code[index] for index in sorted(body)),
    )


def _access(instruction: Instruction) -> tuple[str, int] | None:
    kind = instruction.operation.partition(".")[0]
    return (kind, instruction.bits) if kind in (LOAD, STORE) else None


def _cycle(code: Sequence[Instruction], start: int) -> list[int]:
    """The shortest cycle through an instruction; empty if there is none."""
    came_from = dict.fromkeys(code[start].following, start)
    queue = deque(came_from)
    while queue and start not in came_from:
        index = queue.popleft()
        for following in code[index].following:
            if following not in came_from:
                came_from[following] = index
                queue.append(following)
    if start not in came_from:
        return []
    cycle = [start]
    while came_from[cycle[-1]] != start:
        cycle.append(came_from[cycle[-1]])
    return cycle[:1] + cycle[:0:-1]


def _header(after: Mapping[int, Sequence[int]], cycle: Sequence[int]) -> int:
    """The entry of a loop: every path from the start to the cycle goes through it.

    Raises:
        RuntimeError: the loop has several entries.
    """
    for index in sorted(cycle):
        if index == 0 or not _reached(after, [0], without=index) & set(cycle):
            return index
    raise RuntimeError("a loop has more than one entry")


def _reached(edges: Mapping[int, Sequence[int]], starts: Sequence[int], *, without: int) -> set[int]:
    """The starts and all instructions that are reachable from them without passing through ``without``."""
    seen, waiting = set(starts), list(starts)
    while waiting:
        for index in edges.get(waiting.pop(), ()):
            if index != without and index not in seen:
                seen.add(index)
                waiting.append(index)
    return seen
