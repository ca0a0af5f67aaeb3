"""The kernels that are compiled ahead of time, with dtypes, constants and limits."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from rkif_kernels.backends.triton.adamw import _adamw_kernel
from rkif_kernels.backends.triton.bracket import _count_sample_kernel, _sample_kernel
from rkif_kernels.backends.triton.count import _count_kernel, _invalid_kernel
from rkif_kernels.backends.triton.fuse import INNER_SCORE, _fuse_kernel
from rkif_kernels.backends.triton.groups import COUNTED_BLOCKS, PIECE
from rkif_kernels.backends.triton.importance import _update_importance_kernel
from rkif_kernels.backends.triton.launch import LaunchConfig
from rkif_kernels.backends.triton.launches import (
    ANY,
    default,
    default_bracketing,
    rows,
    triton_version,
)
from rkif_kernels.backends.triton.radix import DIGITS, _histogram_kernel, _pick_kernel
from rkif_kernels.backends.triton.single_pass import _bracketed_fuse_kernel, _finish_kernel
from rkif_kernels.backends.triton.thresholds import _bracketed_scores_kernel
from rkif_kernels.backends.triton.undecided import _list_kernel, _narrow_kernel
from rkif_kernels.backends.triton.whole import _whole_kernel
from rkif_kernels.types import AdamWConstants

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
PARAMETERS = ("fp32", "bf16", "fp16")
STATES = ("fp32", "bf16")
# Forms of scores: name, number of streams that are read, and whether they are distances.
SCORES = (("S*U", 2, False), ("S", 1, False), ("|a-b|", 2, True))


@dataclass(frozen=True)
class Limits:
    """Limits of a kernel's bulk loop, for every NVIDIA target and every version of Triton.

    Attributes:
        instructions_per_element, loads_after_store, barriers_in_loop, atomics_in_loop: maximum.
        blocks_per_sm: minimum number of programs on a multiprocessor.
    """

    instructions_per_element: float
    blocks_per_sm: int
    loads_after_store: int = 0
    barriers_in_loop: int = 0
    atomics_in_loop: int = 0


# About a tenth above the maximum over all variants of a kernel under triton 3.6 and 3.9.
LIMITS = {
    "observe": Limits(29, 5),
    "adamw": Limits(84, 2),
    "fuse": Limits(71, 6),
    "bracketed fuse": Limits(100, 4),  # the goal for float32, on sm_90
    "finish": Limits(69, 4),  # the number of programs per multiprocessor that are launched
    "histogram": Limits(107, 7, barriers_in_loop=6, atomics_in_loop=16),
    "bracketed scores": Limits(33, 9),
    "both bracketed scores": Limits(60, 5),
    "count": Limits(84, 5, barriers_in_loop=4, atomics_in_loop=8),
    "all valid": Limits(7.2, 16),
}
# With streams of both 16 and 32 bits and eight elements per thread, values move between threads.
LIMITS_OF_MIXED = {
    "observe": Limits(30, 4, barriers_in_loop=8),
    "adamw": Limits(84, 2, barriers_in_loop=16),
}


@dataclass(frozen=True)
class Case:
    """One kernel with its dtypes.

    Attributes:
        kernel: its name; the key in :data:`LIMITS` if it has limits.
        variant: name of the case; unique for the kernel.
        function: the Triton function.
        constants: its constexpr arguments.
        loads, stores: dtypes of the streams of its bulk path, each read or written once; empty for kernels
            that access few elements.
        op: the operation in ``launches.json`` whose launch configurations it uses.
        config: its launch configuration.
        divides: whether it has quotients or roots, whose correct rounding uses fused multiply-adds.
        index: type of arguments that are numbers of elements: Triton passes values below 2^31 as i32.
    """

    kernel: str
    variant: str
    function: Any
    constants: dict[str, Any]
    loads: tuple[str, ...] = ()
    stores: tuple[str, ...] = ()
    op: str = ANY
    config: LaunchConfig = default(ANY).launch
    divides: bool = False
    index: str = "i64"

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.variant}"

    @property
    def dtypes(self) -> set[str]:
        """The dtypes that the variant names."""
        return set(re.findall(rf"\b({'|'.join(BYTES)})\b", self.variant))

    @property
    def bytes_per_element(self) -> int:
        """Minimum that the operation has to move."""
        return sum(BYTES[dtype] for dtype in (*self.loads, *self.stores))

    @property
    def limits(self) -> Limits | None:
        mixed = len({BYTES[dtype] for dtype in (*self.loads, *self.stores)}) > 1
        return (LIMITS_OF_MIXED if mixed else LIMITS).get(self.kernel, LIMITS.get(self.kernel))

    @property
    def all_constants(self) -> dict[str, Any]:
        values = {**COMMON, "BLOCK": self.config.block, "TILES": self.config.tiles, **self.constants}
        return {name: value for name, value in values.items() if name in self.function.arg_names}

    @property
    def signature(self) -> dict[str, str | tuple[str, ...]]:
        """The type of each argument."""
        constants = self.all_constants
        return {
            name: "constexpr" if name in constants else _argument_type(name, self.index)
            for name in self.function.arg_names
        }


# Constants that are the same in every case whose kernel has them.
COMMON = {
    "ROUND_BF16": False,
    "DISTANCES": (False, False),
    "STEP": 0,
    "RUN": default_bracketing().run,
    "SAMPLES": default_bracketing().first_samples,
    "BLOCKS": COUNTED_BLOCKS,
    "PIECE": PIECE,
}
# Number of floats in the arguments that are tuples.
TUPLES = {"weights": 8, "smoothing": 4, "constants": len(AdamWConstants._fields)}


def _argument_type(name: str, index: str) -> str | tuple[str, ...]:
    words = {
        "chunk_tensors_ptr",
        "piece_parts_ptr",
        "block_parts_ptr",
        "tensors_ptr",
        "indices_ptr",
        "prefix_ptr",
        "samples_ptr",
    }
    float_pointers = {"values_ptr", "found_ptr"}
    if name in words:
        return "*i32"
    if name in float_pointers or name.endswith("thresholds_ptr"):
        return "*fp32"
    if name.endswith("_ptr"):
        return "*fp64" if name.endswith("norms_ptr") else "*i64"
    if name == "capacity":
        return index
    return ("fp32",) * TUPLES[name] if name in TUPLES else "i32"


def cases(target: str) -> Iterator[Case]:
    """Yield every kernel with each launch configuration that a call on the target may have.

    These are the default and those measured on the target with the installed version of Triton.
    """
    for case in _cases(target):
        usual = default(case.op).launch
        others = {
            row.launch: None
            for row in rows()
            if row.op == case.op and row.architecture == target and row.triton in (ANY, triton_version())
        }
        for config in {usual: None} | others:
            label = "" if config == usual else f", {config.label}"
            # The register limit applies only to kernels that pass over all elements.
            held = config if case.loads else replace(config, max_registers=None)
            yield replace(case, variant=case.variant + label, config=held)


def _cases(target: str) -> Iterator[Case]:
    """Yield every kernel with all dtypes of parameters and state, and every other variant once.

    For sm_90, some kernels are repeated with the indices of models below 2^31 elements.
    """
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
    yield from _selection_cases()
    for dtype, (kind, streams, distance) in itertools.product(PARAMETERS, SCORES):
        yield from _bracket_cases(dtype, kind, streams, distance)
    for dtype, (kind, streams, distance) in itertools.product(PARAMETERS, SCORES):
        roles = {"DTYPES": (dtype, dtype if streams == 2 else None), "DISTANCE": distance}
        yield Case("count", f"{kind} {dtype}", _count_kernel, roles, (dtype,) * streams, op="count")
    for dtype in PARAMETERS:
        distances = {"DISTANCES": (True, True)}
        case = _fuse_case(_fuse_kernel, dtype, dtype)
        # The scores read the parameters again, from the cache.
        yield replace(
            case,
            variant=f"{dtype}, magnitudes",
            constants=case.constants | distances,
            loads=(dtype,) * 3,
        )
    for dtype in PARAMETERS:
        yield Case("all valid", dtype, _invalid_kernel, {"DTYPES": (dtype,)}, (dtype,), op="valid")
    if target == "sm_90":
        indexed = (
            *(_fuse_case(kernel, f32, f32) for kernel in (_bracketed_fuse_kernel, _finish_kernel)),
            *_bracket_cases(f32, *SCORES[0]),
        )
        for case in indexed:
            yield replace(case, variant=f"{case.variant}, i32", index="i32")


def _update_case(
    param: str, state: str, *, grad: str | None = None, uncertain: bool = True,
    order: str = "first", missing: bool = False,
) -> Case:  # fmt: skip
    gradient = None if missing else grad or param
    gradients = () if gradient is None else (gradient,)
    states = (state,) * (1 + uncertain)
    return Case(
        "observe",
        f"{order} {param}, {gradient or 'no gradient'}, {'S, U' if uncertain else 'S'} {state}",
        _update_importance_kernel,
        {"DTYPES": (param, gradient, state, state if uncertain else None), "ORDER": order},
        (param, *gradients, *states),
        states,
        op="observe",
    )


def _adamw_case(
    param: str, state: str, *, grad: str | None = None, importance: bool = True,
    uncertain: bool = True, order: str = "first",
) -> Case:  # fmt: skip
    followed = (state,) * (1 + uncertain) if importance else ()
    sensitivity, uncertainty = (*followed, None, None)[:2]
    written = (param, state, state, *followed)
    return Case(
        "adamw",
        f"{order} {param}, {grad or param}, moments {state}, "
        f"{('S, U' if uncertain else 'S') if importance else 'no importance'}",
        _adamw_kernel,
        {"DTYPES": (param, grad or param, state, state, sensitivity, uncertainty), "ORDER": order},
        (grad or param, *written),
        written,
        op="adamw",
        divides=True,
    )


def _fuse_case(
    kernel: Any, param: str, state: str, *, out: str | None = None, uncertain: bool = True,
    from_inner: bool = True,
) -> Case:  # fmt: skip
    scores = (state,) * (1 + uncertain)
    names = {_fuse_kernel: "fuse", _bracketed_fuse_kernel: "bracketed fuse", _finish_kernel: "finish"}
    return Case(
        names[kernel],
        f"{param}{f' into {out}' if out else ''}, {'S*U' if uncertain else 'S'} {state}"
        f"{'' if from_inner else ', from base'}",
        kernel,
        {
            "DTYPES": (out or param, param, param, param, *(state, state if uncertain else None) * 2),
            "OUTER_FROM_INNER": from_inner,
        },
        (param, param, param, *scores, *scores),
        (out or param,),
        op="merge" if kernel is _fuse_kernel else "fuse",
    )


def _bracket_cases(dtype: str, kind: str, streams: int, distance: bool) -> Iterator[Case]:
    """Yield the kernels that find thresholds by brackets: of one side, of both, and of both in a fusion."""
    parts = dtype, dtype if streams == 2 else None
    alone = {"DTYPES": parts, "ROLE": 0, "SIDES": 1, "DISTANCE": distance, "FUSED": False}
    name = f"{kind} {dtype}"
    pair = alone | {"DTYPES": parts * 2, "SIDES": 2}
    for kernel, function, op in (
        ("bracketed scores", _bracketed_scores_kernel, "threshold"),
        ("whole", _whole_kernel, "whole"),
    ):
        yield Case(kernel, name, function, alone, (dtype,) * streams, op=op)
        yield Case(f"both {kernel}", name, function, pair, (dtype,) * (2 * streams), op=op)
    forms = {"": alone, " of both sides": pair}
    if not distance:
        both = (dtype,) * INNER_SCORE + parts * 2
        forms[" of a fusion"] = alone | {"DTYPES": both, "ROLE": INNER_SCORE, "SIDES": 2, "FUSED": True}
    for suffix, constants in forms.items():
        for kernel, function in (
            ("sample", _sample_kernel),
            ("count sample", _count_sample_kernel),
            ("list", _list_kernel),
            ("narrow", _narrow_kernel),
        ):
            op = "fuse" if constants["FUSED"] else "threshold"
            yield Case(kernel, f"{name}{suffix}", function, constants, op=op)


def _selection_cases() -> Iterator[Case]:
    for state, (kind, streams, distance), (shift, bits) in itertools.product(STATES, SCORES, DIGITS):
        yield Case(
            "histogram",
            f"{kind} {state} bits {shift}+{bits}",
            _histogram_kernel,
            {
                "DTYPES": (state, state if streams == 2 else None),
                "DISTANCE": distance,
                "SHIFT": shift,
                "BITS": bits,
            },
            (state,) * streams,
            op="radix",
        )
    for shift, bits in DIGITS:
        digit = {"SHIFT": shift, "BITS": bits, "LAST": shift == 0}
        yield Case("pick", f"bits {shift}+{bits}", _pick_kernel, digit, op="radix")
