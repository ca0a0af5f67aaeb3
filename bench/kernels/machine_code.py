"""The machine code in cubins, as text, by the CUDA tools that Triton's wheel contains."""

from __future__ import annotations

import itertools
import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import triton

INSTRUCTION = 16  # bytes, from sm_70 on
SHF_EXECINSTR = 4  # of a section of an ELF file: it holds instructions


def disassemble(cubins: Sequence[bytes], arch: int) -> list[str]:
    """The instructions of each cubin, one a line.

    All cubins go to one call of the disassembler, because its start takes most of its time.
    """
    codes = [_machine_code(cubin) for cubin in cubins]
    # Triton compiles for the features of just this architecture where there are such.
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
    """What a CUDA tool that Triton's wheel brings along says of a file with this content."""
    binary = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(content)
        file.flush()
        done = subprocess.run([binary, *options, file.name], capture_output=True, text=True, check=True)
    return done.stdout
