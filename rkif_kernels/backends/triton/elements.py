"""Functions for kernels: access to tensors through the pointer table, scores, counts, and rounding."""

from functools import partial

import triton
import triton.language as tl

# Decorator of launched kernels. By default Triton compiles separate kernels for integers that are 1 or
# divisible by 16. These integers differ between models, and the specialisation makes no access wider.
kernel = partial(
    triton.jit,
    do_not_specialize=(
        *("n_tensors", "inner_stride", "outer_stride"),
        *("groups_a_tensor", "padded_groups", "span", "low", "shift", "bins"),
        *("first_place", "capacity", "first_row", "rows", "chunks", "first_program", "all_programs"),
    ),
)


@triton.jit
def load_row(pointers_ptr, ROLE: tl.constexpr, tensor, n_tensors, DTYPES: tl.constexpr):
    """The typed address of ``tensor`` in a role; an unused pointer if the role's dtype is None."""
    DTYPE: tl.constexpr = DTYPES[ROLE]
    if DTYPE is None:
        return pointers_ptr
    else:
        address = tl.load(pointers_ptr + ROLE * n_tensors + tensor)
        # The alignment must be declared on the typed pointer: on the integer it is lost, and accesses shrink
        # to 32 bits. All addresses in the table have this alignment.
        return tl.multiple_of(address.to(tl.pointer_type(tl.dtype(DTYPE))), 16)


@triton.jit
def load_chunk(numels_ptr, chunk_tensors_ptr, chunk_starts_ptr, chunk, BLOCK: tl.constexpr):
    """The tensor of a chunk, the chunk's first element in it, and the tensor's number of elements."""
    tensor = tl.load(chunk_tensors_ptr + chunk)
    start = tl.multiple_of(tl.load(chunk_starts_ptr + chunk), BLOCK)
    return tensor, start, tl.load(numels_ptr + tensor)


@triton.jit
def load_rows(pointers_ptr, tensor, n_tensors, DTYPES: tl.constexpr):
    """The base pointers of a tensor in every role of a fusion, in the order of ROLES."""
    return (
        load_row(pointers_ptr, 0, tensor, n_tensors, DTYPES),
        load_row(pointers_ptr, 1, tensor, n_tensors, DTYPES),
        load_row(pointers_ptr, 2, tensor, n_tensors, DTYPES),
        load_row(pointers_ptr, 3, tensor, n_tensors, DTYPES),
        load_row(pointers_ptr, 4, tensor, n_tensors, DTYPES),
        load_row(pointers_ptr, 5, tensor, n_tensors, DTYPES),
        load_row(pointers_ptr, 6, tensor, n_tensors, DTYPES),
        load_row(pointers_ptr, 7, tensor, n_tensors, DTYPES),
    )


@triton.jit
def tile_mask(offsets, numel, FULL: tl.constexpr):
    """The mask of the elements of a block that are within the tensor.

    The mask of a FULL block is constant, because a mask that depends on the size would narrow every access to
    one element.
    """
    if FULL:
        return tl.zeros_like(offsets) == 0
    else:
        return offsets < numel


@triton.jit
def load_float32(row_ptr, offsets, mask):
    """Elements of a row in float32; 0 beyond the mask."""
    return tl.load(row_ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_raw_score(s_ptr, u_ptr, offsets, mask, UNCERTAINTY: tl.constexpr, DISTANCE: tl.constexpr):
    """Raw scores, NaN and negative ones included: S, S*U with UNCERTAINTY, |S-U| with DISTANCE."""
    score = load_float32(s_ptr, offsets, mask)
    if DISTANCE:
        score = tl.abs(score - load_float32(u_ptr, offsets, mask))
    elif UNCERTAINTY:
        score *= load_float32(u_ptr, offsets, mask)
    return score


@triton.jit
def load_score(s_ptr, u_ptr, offsets, mask, UNCERTAINTY: tl.constexpr, DISTANCE: tl.constexpr = False):
    """Scores; values that are not positive, NaN and negative zero included, are replaced by zero."""
    score = load_raw_score(s_ptr, u_ptr, offsets, mask, UNCERTAINTY, DISTANCE)
    return tl.where(score > 0, score, 0.0)


@triton.jit
def lane_sums(values, BLOCK: tl.constexpr):
    """Sums of four neighbours (a lane). One thread holds all four, so threads exchange no values."""
    return tl.sum(tl.reshape(values, (BLOCK // 4, 4)), axis=1)


@triton.jit
def squared_lanes(vector, BLOCK: tl.constexpr):
    """Sums of squares of four neighbours, in float64."""
    wide = vector.to(tl.float64)
    return lane_sums(wide * wide, BLOCK)


@triton.jit
def pack_counts(a, b, c, d, BLOCK: tl.constexpr):
    """For each lane, the numbers of elements that meet four conditions, packed into 8 bits each."""
    low = a.to(tl.int32) | (b.to(tl.int32) << 8)
    return lane_sums(low | (c.to(tl.int32) << 16) | (d.to(tl.int32) << 24), BLOCK)


@triton.jit
def add_counts(counts_ptr, lanes, FIELDS: tl.constexpr = 4):
    """Add a program's packed counts to FIELDS counters in memory."""
    for field in tl.static_range(FIELDS):
        total = tl.sum((lanes >> (8 * field)) & 0xFF)
        if total > 0:
            tl.atomic_add(counts_ptr + field, total.to(tl.int64), sem="relaxed")


@triton.jit
def gather_float32(pointers_ptr, ROLE: tl.constexpr, tensors, n_tensors, offsets, mask, DTYPES: tl.constexpr):
    """Elements of several tensors in float32; 0 beyond the mask."""
    DTYPE: tl.constexpr = DTYPES[ROLE]
    addresses = tl.load(pointers_ptr + ROLE * n_tensors + tensors, mask=mask, other=0)
    values = tl.load(addresses.to(tl.pointer_type(tl.dtype(DTYPE))) + offsets, mask=mask, other=0.0)
    return values.to(tl.float32)


@triton.jit
def find_tensor(firsts_ptr, n_tensors, positions, mask):
    """The tensor that holds each position, by bisection of the tensors' first positions."""
    low = tl.zeros_like(positions)
    high = low + n_tensors
    width = n_tensors
    while width > 0:
        middle = (low + high) // 2
        begins = tl.load(firsts_ptr + middle, mask=mask, other=0)
        low = tl.where(begins <= positions, middle, low)
        high = tl.where(begins <= positions, high, middle)
        width = width // 2
    return low


@triton.jit
def round_to(value, DTYPES: tl.constexpr, ROLE: tl.constexpr, ROUND_BF16: tl.constexpr):
    """A float32 value rounded to nearest even in the dtype of a role.

    Compiled code uses an instruction. Triton's interpreter truncates float32 to bfloat16, so with ROUND_BF16
    the bits are rounded here: adding 0x7FFF and the lowest remaining bit carries into the upper half exactly
    if the value is rounded up.
    """
    DTYPE: tl.constexpr = DTYPES[ROLE]
    if ROUND_BF16 and DTYPE == "bf16":
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = tl.where(value == value, rounded.to(tl.float32, bitcast=True), value)
    return value.to(tl.dtype(DTYPE))
