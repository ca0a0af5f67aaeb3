"""Kernels compiled ahead of time, for targets that need not be there: what the compiler made of them.

Memory-bound kernels live from wide accesses and from registers that do not spill. Both are decided when a
kernel is compiled, so both can be checked on a machine without a GPU.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rkif_kernels.kernels.fuse import _fuse_kernel
from rkif_kernels.kernels.importance import _update_importance_kernel
from rkif_kernels.kernels.select import DIGITS, _histogram_kernel
from rkif_kernels.launch import STREAM

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
BYTES = {tl.float32: 4, tl.bfloat16: 2, tl.float16: 2}
PARAMETERS = (tl.float32, tl.bfloat16, tl.float16)
STATES = (tl.float32, tl.bfloat16)


@dataclass(frozen=True)
class Case:
    """One kernel with its dtypes.

    Attributes:
        name: as it is shown.
        kernel: the Triton function.
        constants: its constexpr arguments.
        loads, stores: dtypes of the streams it must read and write once.
    """

    name: str
    kernel: Any
    constants: dict[str, Any]
    loads: tuple[tl.dtype, ...]
    stores: tuple[tl.dtype, ...]


@dataclass(frozen=True)
class Compiled:
    """What the compiler made: bytes a vector access moves, and how many of those a block takes."""

    case: Case
    target: str
    registers: int
    spills: int
    wide_loads: int
    wide_stores: int
    problems: tuple[str, ...]


def cases() -> Iterator[Case]:
    """Every kernel, in all dtypes of parameters and state, with and without uncertainties."""
    common = {"BLOCK": STREAM.block, "TILES": STREAM.tiles}
    for param, state, uncertain in itertools.product(PARAMETERS, STATES, (True, False)):
        extra = (state,) if uncertain else ()
        constants = {
            "PARAM": param,
            "GRAD": param,
            "SENSITIVITY": state,
            "UNCERTAINTY": state if uncertain else None,
            "ORDER": "first",
            "ROUND_BF16": False,
        }
        yield Case(
            f"update_importance {param} {'S, U' if uncertain else 'S'} {state}",
            _update_importance_kernel,
            common | constants,
            (param, param, state, *extra),
            (state, *extra),
        )
        constants = {
            **dict.fromkeys(("OUT", "BASE", "INNER", "OUTER"), param),
            **dict.fromkeys(("INNER_S", "OUTER_S"), state),
            **dict.fromkeys(("INNER_U", "OUTER_U"), state if uncertain else None),
            "OUTER_FROM_INNER": True,
            "ROUND_BF16": False,
        }
        yield Case(
            f"fuse {param} {'S*U' if uncertain else 'S'} {state}",
            _fuse_kernel,
            common | constants,
            (param, param, param, *((state, *extra) * 2)),
            (param,),
        )
    for state, uncertain, (shift, bits) in itertools.product(STATES, (True, False), DIGITS):
        extra = (state,) if uncertain else ()
        constants = {
            "SENSITIVITY": state,
            "UNCERTAINTY": state if uncertain else None,
            "SHIFT": shift,
            "BITS": bits,
        }
        yield Case(
            f"histogram {'S*U' if uncertain else 'S'} {state} bits {shift}+{bits}",
            _histogram_kernel,
            common | constants,
            (state, *extra),
            (),
        )


def compile_case(case: Case, target: str) -> Compiled:
    """Compile one case for one target and look at the outcome."""
    signature = {name: _argument_type(name, case.constants) for name in case.kernel.arg_names}
    source = ASTSource(case.kernel, signature, constexprs=case.constants)
    made = triton.compile(source, target=TARGETS[target], options=STREAM.options)
    if target.startswith("gfx"):
        return _inspect_amd(case, target, made.asm["amdgcn"])
    return _inspect_nvidia(case, target, made.asm["ptx"], made.asm["cubin"])


def check(console: Console) -> bool:
    """Compile everything, print the table; returns whether every access is wide and nothing spills."""
    table = Table(title="kernels compiled ahead of time", caption="wide: 16-byte accesses a block, bulk path")
    for heading in ("kernel", "target", "bytes/element", "registers", "spills", "wide loads", "wide stores"):
        table.add_column(heading, no_wrap=True)
    failures = []
    for case, target in itertools.product(cases(), TARGETS):
        made = compile_case(case, target)
        failures += [f"{case.name} on {target}: {problem}" for problem in made.problems]
        moved = sum(BYTES[dtype] for dtype in (*case.loads, *case.stores))
        figures = (moved, made.registers, made.spills, made.wide_loads, made.wide_stores)
        style = "red" if made.problems else None
        table.add_row(case.name, target, *map(str, figures), style=style)
    console.print(table)
    for failure in failures:
        console.print(f"[red]{failure}")
    return not failures


def _argument_type(name: str, constants: dict[str, Any]) -> str:
    if name in constants:
        return "constexpr"
    pointers = {
        "chunk_tensors_ptr": "*i32",
        "groups_ptr": "*i32",
        "prefixes_ptr": "*i32",
        "inner_thresholds_ptr": "*fp32",
        "outer_thresholds_ptr": "*fp32",
        "partial_norms_ptr": "*fp64",
    }
    if name.endswith("_ptr"):
        return pointers.get(name, "*i64")
    return "i32" if name == "n_tensors" else "fp32"


def _expected(dtypes: tuple[tl.dtype, ...], threads: int) -> int:
    """16-byte accesses a thread needs for one block of these streams."""
    return sum(STREAM.block * BYTES[dtype] // (threads * 16) for dtype in dtypes)


def _inspect_nvidia(case: Case, target: str, ptx: str, cubin: bytes) -> Compiled:
    loads = len(re.findall(r"\bld\.global[\w.]*\.v4\.[bfsu]32", ptx))
    stores = len(re.findall(r"\bst\.global[\w.]*\.v4\.[bfsu]32", ptx))
    usage = _resource_usage(cubin)
    problems = _narrow(case, loads, stores, threads=32 * STREAM.num_warps)
    if usage["STACK"]:
        problems.append(f"{usage['STACK']} bytes of stack: registers spill")
    sass = _tool("nvdisasm", cubin)
    for contracted in set(re.findall(r"\b(FFMA[\w.]*|\w+\.FTZ[\w.]*)", sass)):
        problems.append(f"{contracted} in the machine code: not the arithmetic that was written")
    return Compiled(case, target, usage["REG"], usage["STACK"], loads, stores, tuple(problems))


def _inspect_amd(case: Case, target: str, assembly: str) -> Compiled:
    loads = len(re.findall(r"\b(?:global|buffer|flat)_load_dwordx4\b", assembly))
    stores = len(re.findall(r"\b(?:global|buffer|flat)_store_dwordx4\b", assembly))
    registers = int(re.findall(r"\.vgpr_count:\s*(\d+)", assembly)[0])
    spills = int(re.findall(r"\.vgpr_spill_count:\s*(\d+)", assembly)[0])
    problems = _narrow(case, loads, stores, threads=64 * STREAM.num_warps)
    if spills:
        problems.append(f"{spills} registers spill")
    for contracted in set(re.findall(r"\b(v_(?:pk_)?fma[ck]?_f32\w*|v_mad_f32\w*)", assembly)):
        problems.append(f"{contracted} in the machine code: not the arithmetic that was written")
    return Compiled(case, target, registers, spills, loads, stores, tuple(problems))


def _narrow(case: Case, loads: int, stores: int, *, threads: int) -> list[str]:
    problems = []
    for kind, found, dtypes in (("loads", loads, case.loads), ("stores", stores, case.stores)):
        expected = _expected(dtypes, threads)
        if found < expected:
            problems.append(f"{found} {kind} of 16 bytes where a block needs {expected}")
    return problems


def _resource_usage(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [_binary("cuobjdump"), "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED):(\d+)", text)}


def _tool(name: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([_binary(name), file.name], capture_output=True, text=True, check=True).stdout


def _binary(name: str) -> str:
    """A CUDA tool that Triton's wheel brings along."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)
