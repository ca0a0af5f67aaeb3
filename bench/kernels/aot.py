"""Kernels compiled ahead of time, for targets that need not be there: what the compiler made of them.

Memory-bound kernels live from wide accesses and from registers that do not spill. Both are decided when a
kernel is compiled, so both can be checked on a machine without a GPU.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.kernels.machine_code import cuda_tool, disassemble
from rkif_kernels.backends.triton.adamw import _adamw_kernel
from rkif_kernels.backends.triton.bracket import _count_sample_kernel, _sample_kernel
from rkif_kernels.backends.triton.count import _count_kernel, _invalid_kernel
from rkif_kernels.backends.triton.fuse import INNER_SCORE, _fuse_kernel
from rkif_kernels.backends.triton.importance import _update_importance_kernel
from rkif_kernels.backends.triton.launch import BRACKETING, FUSE, FUSE_PASS_REGISTERS, STREAM, LaunchConfig
from rkif_kernels.backends.triton.radix import DIGITS, _histogram_kernel, _pick_kernel
from rkif_kernels.backends.triton.single_pass import _bracketed_fuse_kernel, _finish_kernel
from rkif_kernels.backends.triton.thresholds import _bracketed_scores_kernel
from rkif_kernels.backends.triton.undecided import _list_kernel, _narrow_kernel
from rkif_kernels.types import AdamWConstants

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
PARAMETERS = ("fp32", "bf16", "fp16")
STATES = ("fp32", "bf16")
# Cases that one process compiles one after another, and has disassembled together.
GROUP = 18
# Forms of scores: their name, how many streams they read, and whether they are distances.
SCORES = (("S*U", 2, False), ("S", 1, False), ("|a-b|", 2, True))


@dataclass(frozen=True)
class Case:
    """One kernel with its dtypes.

    Attributes:
        name: as it is shown.
        kernel: the Triton function.
        constants: its constexpr arguments.
        loads, stores: dtypes of the streams of its bulk path, each read or written once; none for kernels
            that touch a few elements only.
        config: how it is launched.
        divides: whether it takes quotients or roots, whose correct rounding is made of fused multiply-adds.
    """

    name: str
    kernel: Any
    constants: dict[str, Any]
    loads: tuple[str, ...] = ()
    stores: tuple[str, ...] = ()
    config: LaunchConfig = STREAM
    divides: bool = False

    @property
    def bytes_an_element(self) -> int:
        """The minimum that the operation has to move."""
        return sum(BYTES[dtype] for dtype in (*self.loads, *self.stores))


@dataclass(frozen=True)
class Compiled:
    """What the compiler made.

    Attributes:
        minimum: bytes an element that the operation has to move.
        registers: a thread's.
        spills, stack: bytes a thread keeps in memory for want of registers, or otherwise.
        shared: bytes of shared memory a program.
        loads, stores: number of global accesses in the code by their width in bits. Those of tails, lists
            and tables are among them.
    """

    case: str
    target: str
    minimum: int
    registers: int
    spills: int
    stack: int
    shared: int
    loads: Counter[int]
    stores: Counter[int]
    problems: tuple[str, ...]


def _update_case(
    param: str, state: str, *, grad: str | None = None, uncertain: bool = True,
    order: str = "first", missing: bool = False,
) -> Case:  # fmt: skip
    gradient = None if missing else grad or param
    gradients = () if gradient is None else (gradient,)
    states = (state,) * (1 + uncertain)
    return Case(
        f"update_importance {order} {param}, {gradient or 'no gradient'}, "
        f"{'S, U' if uncertain else 'S'} {state}",
        _update_importance_kernel,
        {"DTYPES": (param, gradient, state, state if uncertain else None), "ORDER": order},
        (param, *gradients, *states),
        states,
    )


def _adamw_case(
    param: str, state: str, *, grad: str | None = None, importance: bool = True,
    uncertain: bool = True, order: str = "first",
) -> Case:  # fmt: skip
    followed = (state,) * (1 + uncertain) if importance else ()
    sensitivity, uncertainty = (*followed, None, None)[:2]
    written = (param, state, state, *followed)
    return Case(
        f"adamw {order} {param}, {grad or param}, moments {state}, "
        f"{('S, U' if uncertain else 'S') if importance else 'no importance'}",
        _adamw_kernel,
        {"DTYPES": (param, grad or param, state, state, sensitivity, uncertainty), "ORDER": order},
        (grad or param, *written),
        written,
        divides=True,
    )


def _fuse_case(
    kernel: Any, param: str, state: str, *, out: str | None = None, uncertain: bool = True,
    from_inner: bool = True,
) -> Case:  # fmt: skip
    scores = (state,) * (1 + uncertain)
    names = {_fuse_kernel: "fuse", _bracketed_fuse_kernel: "bracketed fuse", _finish_kernel: "finish"}
    name = names[kernel]
    return Case(
        f"{name} {param}{f' into {out}' if out else ''}, {'S*U' if uncertain else 'S'} {state}"
        f"{'' if from_inner else ', from base'}",
        kernel,
        {
            "DTYPES": (out or param, param, param, param, *(state, state if uncertain else None) * 2),
            "OUTER_FROM_INNER": from_inner,
        },
        (param, param, param, *scores, *scores),
        (out or param,),
        replace(FUSE, max_registers=FUSE_PASS_REGISTERS) if kernel is _bracketed_fuse_kernel else FUSE,
    )


def cases() -> Iterator[Case]:
    """Every kernel: all dtypes of parameters and state, and every variant of each once."""
    f32, bf16, f16 = PARAMETERS
    for param, state, uncertain in itertools.product(PARAMETERS, STATES, (True, False)):
        yield _update_case(param, state, uncertain=uncertain)
        yield _fuse_case(_fuse_kernel, param, state, uncertain=uncertain)
        yield _fuse_case(_bracketed_fuse_kernel, param, state, uncertain=uncertain)
        yield _fuse_case(_finish_kernel, param, state, uncertain=uncertain)
    for param, state in itertools.product(PARAMETERS, STATES):
        yield _adamw_case(param, state)
    yield _adamw_case(f32, f32, importance=False)
    yield _adamw_case(f32, f32, uncertain=False)
    yield _adamw_case(f32, f32, order="mixed")
    yield _adamw_case(bf16, f32, grad=f32)
    for param, order in itertools.product((f32, bf16), ("second", "mixed")):
        yield _update_case(param, f32, order=order)
    for param in PARAMETERS:
        yield _update_case(param, f32, missing=True)
    for param, grad in ((bf16, f32), (f32, bf16), (f16, f32)):
        yield _update_case(param, f32, grad=grad)
    for kernel in (_fuse_kernel, _bracketed_fuse_kernel):
        yield _fuse_case(kernel, f32, f32, from_inner=False)
        for param, out in ((bf16, f32), (f32, bf16), (f16, f32)):
            yield _fuse_case(kernel, param, f32, out=out)
    # Selection is launched by itself and by the single pass, which has a configuration of its own.
    for config in (STREAM, FUSE):
        yield from _selection_cases(config)
    for dtype, (kind, streams, distance) in itertools.product(PARAMETERS, SCORES):
        yield from _bracket_cases(dtype, kind, streams, distance)
    for dtype, (kind, streams, distance) in itertools.product(PARAMETERS, SCORES):
        roles = {"DTYPES": (dtype, dtype if streams == 2 else None), "DISTANCE": distance}
        yield Case(f"count {kind} {dtype}", _count_kernel, roles, (dtype,) * streams)
    for dtype in PARAMETERS:
        distances = {"DISTANCES": (True, True)}
        case = _fuse_case(_fuse_kernel, dtype, dtype)
        # The scores' four streams are those of the parameters, from the cache.
        yield replace(
            case,
            name=f"fuse by magnitudes {dtype}",
            constants=case.constants | distances,
            loads=(dtype,) * 3,
        )
    for dtype in PARAMETERS:
        yield Case(f"all valid {dtype}", _invalid_kernel, {"DTYPES": (dtype,)}, (dtype,))


def _bracket_cases(dtype: str, kind: str, streams: int, distance: bool) -> Iterator[Case]:
    """What finds thresholds by brackets, of scores alone and of both sides of a fusion."""
    parts = dtype, dtype if streams == 2 else None
    alone = {"DTYPES": parts, "ROLE": 0, "SIDES": 1, "DISTANCE": distance}
    yield Case(
        f"bracketed scores {kind} {dtype}", _bracketed_scores_kernel, alone, (dtype,) * streams, config=FUSE
    )
    forms = {"": alone}
    if not distance:
        both = (dtype,) * INNER_SCORE + parts * 2
        forms[" of both sides"] = alone | {"DTYPES": both, "ROLE": INNER_SCORE, "SIDES": 2}
    for suffix, constants in forms.items():
        for name, kernel in (
            ("sample", _sample_kernel),
            ("count sample", _count_sample_kernel),
            ("list", _list_kernel),
            ("narrow", _narrow_kernel),
        ):
            yield Case(f"{name} {kind} {dtype}{suffix}", kernel, constants, config=FUSE)


def _selection_cases(config: LaunchConfig) -> Iterator[Case]:
    name = f"by {config.block}"
    for state, (kind, streams, distance), (shift, bits) in itertools.product(STATES, SCORES, DIGITS):
        yield Case(
            f"histogram {kind} {state} bits {shift}+{bits}, {name}",
            _histogram_kernel,
            {
                "DTYPES": (state, state if streams == 2 else None),
                "DISTANCE": distance,
                "SHIFT": shift,
                "BITS": bits,
            },
            (state,) * streams,
            config=config,
        )
    for shift, bits in DIGITS:
        digit = {"SHIFT": shift, "BITS": bits}
        yield Case(
            f"pick bits {shift}+{bits}, {name}", _pick_kernel, digit | {"LAST": shift == 0}, config=config
        )


# Constants that are the same for every case, where a kernel has them.
COMMON = {
    "ROUND_BF16": False,
    "DISTANCES": (False, False),
    "STEP": 0,
    "FIRST": True,
    "RUN": BRACKETING.run,
    "SAMPLES": BRACKETING.first_samples,
}


def compile_cases(cases: Sequence[Case], target: str) -> list[Compiled]:
    """Compile cases for one target and look at the outcome of each."""
    compiled = [_compile(case, target) for case in cases]
    if target.startswith("gfx"):
        found = [
            _inspect_amd(case, target, made.asm["amdgcn"], made.metadata.shared)
            for case, made in zip(cases, compiled, strict=True)
        ]
    else:
        texts = disassemble([made.asm["cubin"] for made in compiled], TARGETS[target].arch)
        found = [
            _inspect_nvidia(case, target, made.asm["ptx"], made.asm["cubin"], sass)
            for case, made, sass in zip(cases, compiled, texts, strict=True)
        ]
    return [
        replace(result, problems=result.problems + _specialised(case))
        for case, result in zip(cases, found, strict=True)
    ]


def _constants(case: Case) -> dict[str, Any]:
    values = {**COMMON, "BLOCK": case.config.block, "TILES": case.config.tiles, **case.constants}
    return {name: value for name, value in values.items() if name in case.kernel.arg_names}


def _signature(case: Case) -> dict[str, str | tuple[str, ...]]:
    constants = _constants(case)
    return {name: _argument_type(name, constants) for name in case.kernel.arg_names}


def _compile(case: Case, target: str) -> Any:
    # What a launch finds out by itself: PyTorch's memory, and the tables in it, begin on 16 bytes.
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(case.kernel.arg_names)
        if name.endswith("_ptr")
    }
    source = ASTSource(case.kernel, _signature(case), constexprs=_constants(case), attrs=attributes)
    return triton.compile(source, target=TARGETS[target], options=case.config.options)


def _specialised(case: Case) -> tuple[str, ...]:
    signature = _signature(case)
    return tuple(
        f"is compiled anew for every kind of {parameter.name}"
        for parameter in case.kernel.params
        if signature[parameter.name] in ("i32", "i64") and not parameter.do_not_specialize
    )


def check(console: Console, targets: Sequence[str] = tuple(TARGETS)) -> bool:
    """Compile everything, print the table; returns whether every bulk access is wide and nothing spills."""
    table = Table(
        title="kernels compiled ahead of time",
        caption="Loads, stores: accesses in the code x their bits. Bulk streams need the 128-bit ones (64 "
        "where a thread has four 16-bit elements); narrower ones are of tails, lists and tables. "
        "Minimum: bytes an element that the operation has to move.",
    )
    headings = ("kernel", "target", "minimum", "registers", "spills", "stack", "shared", "loads", "stores")
    for heading in headings:
        table.add_column(heading, no_wrap=True)
    failures = []
    with ProcessPoolExecutor() as pool:
        groups = zip(*_groups(targets), strict=True)
        for made in itertools.chain.from_iterable(pool.map(compile_group, *groups)):
            case = made.case
            failures += [f"{case} on {made.target}: {problem}" for problem in made.problems]
            figures = (made.minimum or "-", made.registers, made.spills, made.stack, made.shared)
            widths = (_widths(made.loads), _widths(made.stores))
            style = "red" if made.problems else None
            table.add_row(case, made.target, *map(str, figures), *widths, style=style)
    console.print(table)
    for failure in failures:
        console.print(f"[red]{failure}")
    console.print(f"{table.row_count} kernels compiled, {len(failures)} problems")
    return not failures


def _groups(targets: Sequence[str]) -> list[tuple[int, str]]:
    return [(first, target) for first in range(0, len(list(cases())), GROUP) for target in targets]


def compile_group(first: int, target: str) -> list[Compiled]:
    """:func:`compile_cases` for another process, where Triton's functions cannot be sent to."""
    return compile_cases(list(itertools.islice(cases(), first, first + GROUP)), target)


def _widths(accesses: Counter[int]) -> str:
    return " ".join(f"{number}x{bits}" for bits, number in sorted(accesses.items(), reverse=True)) or "-"


# Number of floats in the arguments that are tuples.
TUPLES = {"weights": 8, "smoothing": 4, "constants": len(AdamWConstants._fields)}


def _argument_type(name: str, constants: dict[str, Any]) -> str | tuple[str, ...]:
    if name in constants:
        return "constexpr"
    words = {"chunk_tensors_ptr", "indices_ptr", "prefixes_ptr", "samples_ptr"}
    float_pointers = {"values_ptr", "found_ptr"}
    if name in words:
        return "*i32"
    if name in float_pointers or name.endswith("thresholds_ptr"):
        return "*fp32"
    if name.endswith("_ptr"):
        return "*fp64" if name.endswith("norms_ptr") else "*i64"
    if name in ("start", "numel", "capacity", "k"):
        return "i64"
    if name in TUPLES:
        return ("fp32",) * TUPLES[name]
    return "fp32" if name in ("fraction", "spread") else "i32"


def _expected(dtypes: tuple[str, ...], elements: int) -> Counter[int]:
    """Accesses a thread needs for its elements of a block: 128 bits wide, or less where they are fewer."""
    needed: Counter[int] = Counter()
    for dtype in dtypes:
        share = elements * BYTES[dtype] * 8
        needed[min(share, 128)] += max(share // 128, 1)
    return needed


def _inspect_nvidia(case: Case, target: str, ptx: str, cubin: bytes, sass: str) -> Compiled:
    loads, stores = (_ptx_widths(ptx, kind) for kind in ("ld", "st"))
    resources = cuda_tool("cuobjdump", cubin, "--dump-resource-usage")
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED):(\d+)", resources)}
    spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    problems = _narrow(case, loads, stores, threads=32 * case.config.num_warps)
    if usage["STACK"] or spills:
        problems.append(f"{usage['STACK']} bytes of stack, {spills} accesses to it: registers spill")
    # ptxas divides by fused multiply-adds, so where there are quotients its input is looked at instead.
    where, code = ("PTX", ptx) if case.divides else ("machine code", sass)
    for contracted in set(re.findall(r"\b(FFMA[\w.]*|fma\.[\w.]*|\w+\.(?:FTZ|ftz)[\w.]*)", code)):
        problems.append(f"{contracted} in the {where}: not the arithmetic that was written")
    return Compiled(
        case.name,
        target,
        case.bytes_an_element,
        usage["REG"],
        spills,
        usage["STACK"],
        usage["SHARED"],
        loads,
        stores,
        tuple(problems),
    )


def _ptx_widths(ptx: str, kind: str) -> Counter[int]:
    """Global accesses of a kind by width in bits: the vector's length times the element's size."""
    found = re.findall(rf"\b{kind}\.global(?:\.[a-z]\w*(?:::\w+)?)*?(?:\.v(\d))?\.[bfsu](\d+)\b", ptx)
    return Counter(int(length or 1) * int(bits) for length, bits in found)


def _inspect_amd(case: Case, target: str, assembly: str, shared: int) -> Compiled:
    loads, stores = (_amd_widths(assembly, kind) for kind in ("load", "store"))
    registers, spills, stack = (
        int(re.findall(rf"\.{key}:\s*(\d+)", assembly)[0])
        for key in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    )
    problems = _narrow(case, loads, stores, threads=64 * case.config.num_warps)
    if spills or stack:
        problems.append(f"{spills} registers spill, {stack} bytes of stack")
    # A quotient is made of them too, and nothing tells those from a contraction.
    fused = re.findall(r"\b(v_(?:pk_)?fma[ck]?_f32\w*|v_mad_f32\w*)", "" if case.divides else assembly)
    for contracted in set(fused):
        problems.append(f"{contracted} in the machine code: not the arithmetic that was written")
    return Compiled(
        case.name,
        target,
        case.bytes_an_element,
        registers,
        spills,
        stack,
        shared,
        loads,
        stores,
        tuple(problems),
    )


def _amd_widths(assembly: str, kind: str) -> Counter[int]:
    found = re.findall(rf"\b(?:global|buffer|flat)_{kind}_(\w+?)(?:_d16\w*)?\b", assembly)
    bits = {
        "dwordx4": 128,
        "dwordx3": 96,
        "dwordx2": 64,
        "dword": 32,
        "short": 16,
        "ushort": 16,
        "sshort": 16,
    }
    return Counter(bits.get(width, 8) for width in found)


def _narrow(case: Case, loads: Counter[int], stores: Counter[int], *, threads: int) -> list[str]:
    problems = []
    for kind, found, dtypes in (("loads", loads, case.loads), ("stores", stores, case.stores)):
        expected = _expected(dtypes, case.config.block // threads)
        for bits, needed in expected.items():
            if found[bits] < needed:
                problems.append(f"{found[bits]} {kind} of {bits} bits where a block needs {needed}")
    return problems
