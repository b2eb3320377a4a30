"""What the rooms that work on whole rows of tokens share: tiles, vectors of one sample, sums over tokens."""

from __future__ import annotations

from functools import cache

from ._triton import tl, triton
from .op import Plan, Spec, Target, cdiv, next_power_of_2, spec, wide


@triton.jit
def load_vector(ptr, at, cols, WIDTH: tl.constexpr, PRESENT: tl.constexpr, ABSENT: tl.constexpr):
    """One row [COLS] in float32, or the constant that stands for an absent vector."""
    if PRESENT:
        return tl.load(ptr + at + cols, mask=cols < WIDTH, other=0.0).to(tl.float32)
    else:
        return tl.full(cols.shape, ABSENT, tl.float32)


@triton.jit
def sum_chunks(part_ptr, out_ptr, n, cols, CHUNKS, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """out[n, cols] = the sum of part[n, :, cols] over the chunks, in a fixed order."""
    total = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, CHUNKS, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows < CHUNKS)[:, None] & (cols < WIDTH)[None, :]
        total += tl.load(part_ptr + (n * CHUNKS + rows)[:, None] * WIDTH + cols[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + n * WIDTH + cols, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=cols < WIDTH)


@triton.jit(do_not_specialize=["CHUNKS"])
def sum_chunks_kernel(
    part_ptr,  # (N, CHUNKS, D) float32
    out_ptr,  # (N, D)
    CHUNKS,
    WIDTH: tl.constexpr,  # D
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Grid (N * cdiv(D, COLS),)."""
    column_blocks: tl.constexpr = (WIDTH + COLS - 1) // COLS
    cols = tl.program_id(0) % column_blocks * COLS + tl.arange(0, COLS)
    sum_chunks(part_ptr, out_ptr, (tl.program_id(0) // column_blocks).to(tl.int64), cols, CHUNKS, WIDTH, ROWS, COLS)


@triton.jit(do_not_specialize=["CHUNKS"])
def sum_pair_kernel(
    a_ptr,  # (N, CHUNKS, D) float32
    b_ptr,  # (N, CHUNKS, D) float32
    a_out_ptr,  # (N, D)
    b_out_ptr,  # (N, D)
    CHUNKS,
    WIDTH: tl.constexpr,  # D
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Grid (2 * N * cdiv(D, COLS),): even programs serve a, odd ones b."""
    column_blocks: tl.constexpr = (WIDTH + COLS - 1) // COLS
    i = tl.program_id(0) // 2
    cols = i % column_blocks * COLS + tl.arange(0, COLS)
    n = (i // column_blocks).to(tl.int64)
    if tl.program_id(0) % 2 == 0:
        sum_chunks(a_ptr, a_out_ptr, n, cols, CHUNKS, WIDTH, ROWS, COLS)
    else:
        sum_chunks(b_ptr, b_out_ptr, n, cols, CHUNKS, WIDTH, ROWS, COLS)


def tile(width: int) -> dict[str, int]:
    """Whole rows in registers: about 4096 elements a program, so that narrow rows share one."""
    cols = next_power_of_2(width)
    return dict(ROWS=max(1, 4096 // cols), COLS=cols)


def warps(t: dict[str, int]) -> int:
    """32 elements a thread, at most 16 warps."""
    return max(1, min(16, t["ROWS"] * t["COLS"] // 1024))


def split(target: Target, samples: int, blocks: int) -> tuple[int, int]:
    """Chunks per sample and blocks per chunk: programs to fill the GPU four times over, and no more partial sums than that."""
    blocks = max(1, blocks)  # sums over no token are written too: zeros
    per_chunk = cdiv(blocks, min(blocks, cdiv(4 * target.sms, max(1, samples))))
    return cdiv(blocks, per_chunk), per_chunk


def sum_tile(width: int) -> dict[str, int]:
    """Many chunks and few columns a program, since a sum over chunks has few columns to share out."""
    return dict(ROWS=64, COLS=min(32, next_power_of_2(width)))


@cache
def sum_chunks_plan(part: Spec, out: Spec) -> Plan:
    N, chunks, D = part.shape
    t = sum_tile(D)
    return Plan(
        sum_chunks_kernel, grid=(N * cdiv(D, t["COLS"]),), outs=(out,), ints=dict(CHUNKS=chunks), meta=dict(WIDTH=D, **t), warps=4
    )


@cache
def sum_pair_plan(part: Spec, a: Spec, b: Spec) -> Plan:
    N, chunks, D = part.shape
    t = sum_tile(D)
    return Plan(
        sum_pair_kernel,
        grid=(2 * N * cdiv(D, t["COLS"]),),
        outs=(a, b),
        ints=dict(CHUNKS=chunks),
        meta=dict(WIDTH=D, **t),
        warps=4,
    )


def gradient_spec(v, row: int | None) -> Spec:
    """The gradient of a packed (B, M, D) operand is its row's, (B, D); any other's has the operand's shape."""
    return spec(v) if row is None else Spec((v.shape[0], v.shape[2]), spec(v).dtype)


def per_sample(v, row: int | None):
    """(B, D), (B, 1, D) or row of (B, M, D) -> (B, 1, D), wide."""
    v = wide(v)
    return v[:, row : row + 1] if row is not None else v.reshape(v.shape[0], 1, v.shape[-1])
