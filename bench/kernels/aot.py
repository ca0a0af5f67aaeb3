"""Ahead-of-time compilation for GPUs that need not be present, and checks of the machine code.

A memory-bound kernel needs wide accesses, no register spills, and few instructions per element. The compiler
decides all three, so they are checked on a machine without a GPU.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.kernels.cases import BYTES, Case, cases
from bench.kernels.machine_code import Loop, bulk_loop, cuda_tool, disassemble, parse
from bench.kernels.prediction import PREDICTED, VARIANTS, blocks_per_sm, predicted_share
from bench.kernels.prediction import table as predictions

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# First version of Triton for a target. Earlier versions contract multiply-adds although contraction is
# disabled.
SINCE = {"sm_100": (3, 7)}
# Number of cases that one process compiles in sequence and disassembles together.
GROUP = 18
BARRIERS, ATOMICS = ("BAR",), ("ATOM", "ATOMG", "ATOMS", "RED", "REDG", "REDS", "REDUX")
# Bytes of stack outside of the bulk loop. ptxas saves one or two registers of some kernels once, so that one
# more program fits on a multiprocessor.
MAX_STACK = 8


class Row(NamedTuple):
    """Properties of one compiled kernel. None: it has no bulk loop, or the target's code is not analysed.

    Attributes:
        kernel, variant, target: what was compiled.
        triton: version of the compiler.
        bytes_per_element: minimum that the operation has to move.
        registers: per thread.
        spills: number of accesses to spilled registers (NVIDIA), or of spilled registers (AMD).
        shared: bytes of shared memory per program.
        blocks_per_sm: number of programs that a multiprocessor holds at once.
        instructions_per_element: instructions of a thread in one iteration of the bulk loop over a whole
            block, per element of the thread. Conditional instructions count as executed.
        loads_after_store: loads of the bulk loop after its first store.
        barriers_in_loop, atomics_in_loop: in the whole loop, including the paths for tails.
        predicted_share: share of a copy's speed on an H100, see :mod:`bench.kernels.prediction`.
    """

    kernel: str
    variant: str
    target: str
    triton: str
    bytes_per_element: int | None
    registers: int
    spills: int
    shared: int
    blocks_per_sm: int | None
    instructions_per_element: float | None = None
    loads_after_store: int | None = None
    barriers_in_loop: int | None = None
    atomics_in_loop: int | None = None
    predicted_share: float | None = None


@dataclass(frozen=True)
class Compiled:
    """The properties of a compiled kernel, and its problems.

    Attributes:
        loads, stores: width in bits -> number of global accesses in the code, including those of tails,
            lists and tables.
    """

    row: Row
    loads: Counter[int]
    stores: Counter[int]
    problems: tuple[str, ...]


class Selection(NamedTuple):
    """What is compiled: kernels by name, and cases whose dtypes are all among ``dtypes``. Empty: all."""

    kernels: Sequence[str] = ()
    dtypes: Sequence[str] = ()

    def cases(self, target: str) -> list[Case]:
        return [
            case
            for case in cases(target)
            if (not self.kernels or case.kernel in self.kernels)
            and (not self.dtypes or case.dtypes <= set(self.dtypes))
        ]


def check(console: Console, targets: Sequence[str], selection: Selection) -> tuple[list[Row], bool]:
    """Compile the selected kernels for the targets (none: all) and print tables.

    Returns:
        The rows, and whether there are no problems.

    Raises:
        ValueError: a target, a kernel or a dtype is unknown.
    """
    named = list(dict.fromkeys(case.kernel for case in cases(PREDICTED)))
    options = (
        ("--target", targets, TARGETS),
        ("--kernel", selection.kernels, named),
        ("--dtype", selection.dtypes, BYTES),
    )
    for option, given, known in options:
        if unknown := set(given) - set(known):
            raise ValueError(f"{option} must be one of {', '.join(known)}; got {', '.join(sorted(unknown))}")
    compiled = []
    for target in targets or TARGETS:
        if _version() < SINCE.get(target, (0, 0)):
            console.print(f"{target} is skipped: triton {triton.__version__} contracts multiply-adds for it")
        else:
            compiled += _compile_all(target, selection)
    console.print(_table(compiled))
    failures = [
        f"{made.row.kernel} {made.row.variant} on {made.row.target}: {problem}"
        for made in compiled
        for problem in made.problems
    ]
    for failure in failures:
        console.print(failure, style="red", markup=False)
    rows = [made.row for made in compiled]
    rates = {
        row.kernel: row.instructions_per_element or 0.0
        for row in rows
        if row.target == PREDICTED and VARIANTS.get(row.kernel) == row.variant
    }
    if rates.keys() == VARIANTS.keys():
        console.print(predictions(rates))
    console.print(f"{len(rows)} kernels compiled by triton {triton.__version__}, {len(failures)} problems")
    return rows, not failures


def _version() -> tuple[int, ...]:
    return tuple(map(int, triton.__version__.split(".")[:2]))


def _table(compiled: Sequence[Compiled]) -> Table:
    table = Table(
        title=f"kernels compiled ahead of time by triton {triton.__version__}",
        caption="Bytes: minimum per element. Instructions: of a thread per element in the bulk loop. Late: "
        "loads of the loop after a store. Of a copy: predicted. Loads, stores: number x width in bits. Bulk "
        "streams need 128 bits (64 where a thread has four 16-bit elements); tails, lists and tables use "
        "narrower accesses.",
    )
    headings = ("kernel", "target", "bytes", "registers", "spills", "shared", "blocks an SM", "instructions")
    for heading in (*headings, "late", "barriers", "atomics", "of a copy", "loads", "stores"):
        table.add_column(heading, no_wrap=True)
    for made in compiled:
        kernel, variant, target, _, *figures, share = made.row
        cells = ["-" if figure is None else str(figure) for figure in figures]
        cells += ["-" if share is None else f"{share:.0%}", _widths(made.loads), _widths(made.stores)]
        table.add_row(f"{kernel} {variant}", target, *cells, style="red" if made.problems else None)
    return table


def _compile_all(target: str, selection: Selection) -> list[Compiled]:
    firsts = range(0, len(selection.cases(target)), GROUP)
    with ProcessPoolExecutor() as pool:
        groups = pool.map(compile_group, firsts, itertools.repeat(target), itertools.repeat(selection))
        return list(itertools.chain.from_iterable(groups))


def compile_group(first: int, target: str, selection: Selection) -> list[Compiled]:
    """:func:`compile_cases` for another process: Triton's functions cannot be pickled, an index can."""
    return compile_cases(selection.cases(target)[first : first + GROUP], target)


def _widths(accesses: Counter[int]) -> str:
    return " ".join(f"{number}x{bits}" for bits, number in sorted(accesses.items(), reverse=True)) or "-"


def compile_cases(cases: Sequence[Case], target: str) -> list[Compiled]:
    """Compile cases for one target and inspect each result."""
    compiled = [_compile(case, target) for case in cases]
    if target.startswith("gfx"):
        inspected = [
            _inspect_amd(case, target, made.asm["amdgcn"], made.metadata.shared)
            for case, made in zip(cases, compiled, strict=True)
        ]
    else:
        texts = disassemble([made.asm["cubin"] for made in compiled], TARGETS[target].arch)
        inspected = [
            _inspect_nvidia(case, target, made, sass)
            for case, made, sass in zip(cases, compiled, texts, strict=True)
        ]
    return [
        replace(result, problems=result.problems + _specialised(case))
        for case, result in zip(cases, inspected, strict=True)
    ]


def _compile(case: Case, target: str) -> Any:
    # A launch finds this alignment itself: PyTorch aligns all memory, including the tables, to 16 bytes.
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(case.function.arg_names)
        if name.endswith("_ptr")
    }
    source = ASTSource(case.function, case.signature, constexprs=case.all_constants, attrs=attributes)
    return triton.compile(source, target=TARGETS[target], options=case.config.options)


def _specialised(case: Case) -> tuple[str, ...]:
    return tuple(
        f"is recompiled for special values of {parameter.name}"
        for parameter in case.function.params
        if case.signature[parameter.name] in ("i32", "i64") and not parameter.do_not_specialize
    )


def _inspect_nvidia(case: Case, target: str, made: Any, sass: str) -> Compiled:
    ptx, shared = made.asm["ptx"], made.metadata.shared
    loads, stores = (_ptx_widths(ptx, kind) for kind in ("ld", "st"))
    resources = cuda_tool("cuobjdump", made.asm["cubin"], "--dump-resource-usage")
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", resources)}
    spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    problems = _narrow(case, loads, stores, threads=32 * case.config.num_warps)
    # ptxas implements division by fused multiply-adds, so kernels with quotients are checked in PTX.
    where, code = ("PTX", ptx) if case.divides else ("machine code", sass)
    for contracted in set(re.findall(r"\b(FFMA[\w.]*|fma\.[\w.]*|\w+\.(?:FTZ|ftz)[\w.]*)", code)):
        problems.append(f"{contracted} in the {where}: not the arithmetic that was written")
    loop = bulk_loop(parse(sass), *_expected(case, threads=32 * case.config.num_warps))
    inside = 0 if loop is None else loop.count("LDL", "STL")
    if usage["STACK"] > MAX_STACK or inside:
        problems.append(
            f"{usage['STACK']} bytes of stack, {spills} accesses to it, {inside} in the loop: registers spill"
        )
    row = _row(case, target, usage["REG"], spills, shared, loop)
    return Compiled(row, loads, stores, (*problems, *_over_limits(case, row)))


def _row(case: Case, target: str, registers: int, spills: int, shared: int, loop: Loop | None = None) -> Row:
    figures: dict[str, Any] = {}
    if loop is not None:
        instructions = round(len(loop.bulk) / _elements(case, loop), 1)
        figures = {
            "instructions_per_element": instructions,
            "loads_after_store": loop.loads_after_store,
            "barriers_in_loop": loop.count(*BARRIERS),
            "atomics_in_loop": loop.count(*ATOMICS),
        }
        if target == PREDICTED:
            figures["predicted_share"] = predicted_share(case.bytes_per_element, instructions)
    return Row(
        kernel=case.kernel,
        variant=case.variant,
        target=target,
        triton=triton.__version__,
        bytes_per_element=case.bytes_per_element or None,
        registers=registers,
        spills=spills,
        shared=shared,
        blocks_per_sm=blocks_per_sm(target, registers, shared, case.config.num_warps),
        **figures,
    )


def _elements(case: Case, loop: Loop) -> float:
    """Number of elements per thread and iteration, from the bits stored, or loaded if none are stored."""
    kind, dtypes = ("STG", case.stores) if case.stores else ("LDG", case.loads)
    widths = _expected(case, threads=32 * case.config.num_warps)[kind == "STG"]
    return loop.bits(kind, widths) / 8 / sum(BYTES[dtype] for dtype in dtypes)


def _over_limits(case: Case, row: Row) -> Iterator[str]:
    """Yield each limit of the case that the row exceeds. Figures that are unknown for a target pass."""
    limits = case.limits
    if limits is None:
        return
    if row.instructions_per_element is None:
        yield "no loop with the bulk accesses is found"
        return
    if row.blocks_per_sm is not None and row.blocks_per_sm < limits.blocks_per_sm:
        yield f"{row.blocks_per_sm} programs a multiprocessor; the limit is {limits.blocks_per_sm}"
    for field in ("instructions_per_element", "loads_after_store", "barriers_in_loop", "atomics_in_loop"):
        figure, limit = getattr(row, field), getattr(limits, field)
        if figure > limit:
            yield f"{figure} {field.replace('_', ' ')}; the limit is {limit}"


def _ptx_widths(ptx: str, kind: str) -> Counter[int]:
    """Width in bits (vector length times element size) -> number of global accesses of a kind."""
    accesses = re.findall(rf"\b{kind}\.global(?:\.[a-z]\w*(?:::\w+)?)*?(?:\.v(\d))?\.[bfsu](\d+)\b", ptx)
    return Counter(int(length or 1) * int(bits) for length, bits in accesses)


def _inspect_amd(case: Case, target: str, assembly: str, shared: int) -> Compiled:
    loads, stores = (_amd_widths(assembly, kind) for kind in ("load", "store"))
    registers, spills, stack = (
        int(re.findall(rf"\.{key}:\s*(\d+)", assembly)[0])
        for key in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    )
    problems = _narrow(case, loads, stores, threads=64 * case.config.num_warps)
    if spills or stack:
        problems.append(f"{spills} registers spill, {stack} bytes of stack")
    # Quotients use fused multiply-adds too, and cannot be told from contractions.
    fused = re.findall(r"\b(v_(?:pk_)?fma[ck]?_f32\w*|v_mad_f32\w*)", "" if case.divides else assembly)
    for contracted in set(fused):
        problems.append(f"{contracted} in the machine code: not the arithmetic that was written")
    row = _row(case, target, registers, spills, shared)
    return Compiled(row, loads, stores, tuple(problems))


def _amd_widths(assembly: str, kind: str) -> Counter[int]:
    accesses = re.findall(rf"\b(?:global|buffer|flat)_{kind}_(\w+?)(?:_d16\w*)?\b", assembly)
    bits = {
        "dwordx4": 128,
        "dwordx3": 96,
        "dwordx2": 64,
        "dword": 32,
        "short": 16,
        "ushort": 16,
        "sshort": 16,
    }
    return Counter(bits.get(width, 8) for width in accesses)


def _narrow(case: Case, loads: Counter[int], stores: Counter[int], *, threads: int) -> list[str]:
    problems = []
    kinds = (("loads", loads), ("stores", stores))
    for (kind, accesses), expected in zip(kinds, _expected(case, threads=threads), strict=True):
        for bits, needed in expected.items():
            if accesses[bits] < needed:
                problems.append(f"{accesses[bits]} {kind} of {bits} bits where a block needs {needed}")
    return problems


def _expected(case: Case, *, threads: int) -> tuple[Counter[int], Counter[int]]:
    """Loads and stores that a thread needs for its elements of a block, each of up to 128 bits."""
    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    for needed, dtypes in ((loads, case.loads), (stores, case.stores)):
        for dtype in dtypes:
            share = case.config.block // threads * BYTES[dtype] * 8
            needed[min(share, 128)] += max(share // 128, 1)
    return loads, stores
