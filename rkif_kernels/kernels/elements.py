"""Helpers inside kernels: reaching a tensor through the pointer table, and the one rounding at a store."""

import triton
import triton.language as tl


@triton.jit
def load_row(pointers_ptr, role, tensor, n_tensors, DTYPE: tl.constexpr):
    """The typed base pointer of ``tensor`` in ``role``; any pointer where the role is not there (None)."""
    if DTYPE is None:
        return pointers_ptr
    else:
        address = tl.load(pointers_ptr + role * n_tensors + tensor)
        # The alignment must be declared on the typed pointer: on the integer it is lost, and accesses fall
        # to 32 bits. The table only takes addresses that keep the promise.
        return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def load_float32(row_ptr, offsets, mask):
    """Elements of a row in float32; 0 beyond the mask."""
    return tl.load(row_ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def round_to(value, DTYPE: tl.constexpr, ROUND_BF16: tl.constexpr):
    """A float32 value rounded to nearest even in ``DTYPE``.

    Triton's interpreter truncates float32 to bfloat16, so there (ROUND_BF16) the rounding is done on the
    bits: adding half a unit, less the tie that goes to even, carries into the upper half exactly when the
    value is to be rounded up. Compiled code has an instruction for it.
    """
    if ROUND_BF16 and DTYPE == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = tl.where(value == value, rounded.to(tl.float32, bitcast=True), value)
    return value.to(DTYPE)
