"""What the rooms of the norm family share: tiles of whole rows, norms of them, and sums over tokens in a fixed order.

A program of a backward kernel walks one chunk of one sample's tokens and keeps the sums of its columns in registers; it
writes them once, as partial sums, and a small second kernel adds the chunks up. Where a sample is one chunk there is nothing
to add, and the first kernel writes the gradient itself.
"""

from __future__ import annotations

from typing import NamedTuple

from . import tuned
from ._triton import tl, triton
from .op import Plan, Spec, Target, cdiv, next_power_of_2, remembered, row_stride, spec


@triton.jit
def load_vector(ptr, at, cols, WIDTH: tl.constexpr, PRESENT: tl.constexpr, ABSENT: tl.constexpr):
    """One row [COLS] in float32, or the constant that stands for an absent vector."""
    if PRESENT:
        return tl.load(ptr + at + cols, mask=cols < WIDTH, other=0.0).to(tl.float32)
    else:
        return tl.full(cols.shape, ABSENT, tl.float32)


@triton.jit
def load_tile(ptr, at, inside):
    return tl.load(ptr + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def affine(y, factor, addend):
    """factor * y + addend, rounded once; factor and addend are tiles, or one row."""
    return tl.fma(y, tl.broadcast_to(factor, y.shape), tl.broadcast_to(addend, y.shape))


@triton.jit
def row_sums(a, b):
    """The row sums of two tiles [ROWS, COLS], taken together: one exchange between warps instead of two."""
    return tl.split(tl.sum(tl.join(a, b), 1))


@triton.jit
def halves(x):
    """Even and odd columns of a tile [ROWS, COLS]: neighbours are in one thread, so nothing moves."""
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@triton.jit
def products(a, b):
    """a * b of two tiles [ROWS, COLS], every four neighbours already added up: [ROWS, COLS / 4].

    A sum of products costs a thread one instruction an element this way and two by tl.sum(a * b), since nothing is fused
    that is not written as fused.
    """
    a_even, a_odd = halves(a)
    b_even, b_odd = halves(b)
    a0, a2 = halves(a_even)
    a1, a3 = halves(a_odd)
    b0, b2 = halves(b_even)
    b1, b3 = halves(b_odd)
    return tl.fma(a0, b0, tl.fma(a1, b1, tl.fma(a2, b2, a3 * b3)))


TINY: tl.constexpr = tl.constexpr(2.0**-100)  # a mean square below has lost terms to underflow, unless eps outweighs it
LIFT: tl.constexpr = tl.constexpr(2.0**99)  # brings the squares of any float32 below sqrt(TINY) into range


@triton.jit
def lift_of(mean_square):
    """What rows are multiplied by before their norm is taken, 1 or LIFT. An EPS of TINY or more outweighs all that need it."""
    lift = tl.full(mean_square.shape, 1.0, tl.float32)
    return tl.where(mean_square < TINY, LIFT, lift)


@triton.jit
def reciprocal_root(mean_square, lift, EPS: tl.constexpr):
    """The norm's factor for lifted rows; 0 for a row of zeros where EPS is 0."""
    total = mean_square + EPS
    if EPS < TINY:
        total = tl.where(lift > 1.0, EPS * (LIFT * LIFT) + mean_square, total)
        return tl.where(total < 2.0**-120, 0.0, tl.rsqrt(total))  # the smallest float32, lifted, has more
    else:
        return tl.rsqrt(total)


@triton.jit
def mean_of_squares(x, WIDTH: tl.constexpr):
    return tl.sum(products(x, x), 1) * (1.0 / WIDTH)


@triton.jit
def rms_normalize(x, WIDTH: tl.constexpr, EPS: tl.constexpr):
    """x * rstd of the rows of a float32 tile that is 0 outside, and rstd [ROWS]."""
    mean_square = mean_of_squares(x, WIDTH)
    if EPS < TINY:
        lift = lift_of(mean_square)
        x *= lift[:, None]
        rstd = reciprocal_root(mean_of_squares(x, WIDTH), lift, EPS)
        return x * rstd[:, None], rstd * lift
    else:
        rstd = reciprocal_root(mean_square, 1.0, EPS)
        return x * rstd[:, None], rstd


@triton.jit
def centered(x, mean, inside, WIDTH: tl.constexpr):
    """x - mean of the rows of a tile that is 0 outside, as is the result: rows outside have mean 0, columns need a mask."""
    x -= mean[:, None]
    if x.shape[1] != WIDTH:
        x = tl.where(inside, x, 0.0)
    return x


@triton.jit
def from_first(x, inside, WIDTH: tl.constexpr, EPS: tl.constexpr):
    """A tile less the first number of each row, where EPS is so small that the mean's rounding would show: of equal numbers
    nothing is left."""
    if EPS < TINY:
        first = tl.arange(0, x.shape[1])[None, :] == 0
        x = centered(x, tl.sum(tl.where(first, x, 0.0), 1), inside, WIDTH)
    return x


@triton.jit
def normalize(x, inside, WIDTH: tl.constexpr, EPS: tl.constexpr, CENTER: tl.constexpr):
    """norm(x) of the rows of a float32 tile [ROWS, COLS] that is 0 outside, and rstd [ROWS]."""
    if CENTER:
        x = from_first(x, inside, WIDTH, EPS)
        x = centered(x, tl.sum(x, 1) * (1.0 / WIDTH), inside, WIDTH)
    return rms_normalize(x, WIDTH, EPS)


@triton.jit
def norm_backward(x, g, more, inside, WIDTH: tl.constexpr, EPS: tl.constexpr, CENTER: tl.constexpr):
    """n = norm(x) and more + dx for the gradient g of n: dx = rstd * (g - [center] mean(g) - n * mean(g * n)).

    mean(g * n) is rstd * mean(g * x), so the sums need not wait for rstd. Both tiles are 0 outside.
    """
    if CENTER:
        x = from_first(x, inside, WIDTH, EPS)
        sum_x, sum_g = row_sums(x, g)
        x = centered(x, sum_x * (1.0 / WIDTH), inside, WIDTH)
    lift = tl.full((x.shape[0],), 1.0, tl.float32)
    if EPS < TINY:
        lift = lift_of(mean_of_squares(x, WIDTH))
        x *= lift[:, None]
    squares, gx = row_sums(products(x, x), products(g, x))
    rstd = reciprocal_root(squares * (1.0 / WIDTH), lift, EPS)
    n = x * rstd[:, None]
    dx = tl.fma(-n, tl.broadcast_to((gx * rstd * (1.0 / WIDTH))[:, None], g.shape), g)
    if EPS < TINY:
        rstd *= lift
    if CENTER:
        more -= (sum_g * (1.0 / WIDTH) * rstd)[:, None]
    return n, affine(dx, rstd[:, None], more)


@triton.jit
def store_sums(part_ptr, line, sums, cols, WIDTH: tl.constexpr):
    """Row `line` of the partial sums (or of the gradient itself): the sum over the rows of a tile [ROWS, COLS]."""
    tl.store(part_ptr + line * WIDTH + cols, tl.sum(sums, 0).to(part_ptr.dtype.element_ty), mask=cols < WIDTH)


@triton.jit
def row_and_columns(program, WIDTH: tl.constexpr, COLS: tl.constexpr):
    """What a program that sums COLS columns of one row works on: programs are counted over the columns of a row, then rows."""
    column_blocks: tl.constexpr = (WIDTH + COLS - 1) // COLS
    return (program // column_blocks).to(tl.int64), program % column_blocks * COLS + tl.arange(0, COLS)


@triton.jit
def sum_chunks(part_ptr, out_ptr, n, cols, CHUNKS, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """out[n, cols] = the sum of part[n, :, cols] over the chunks, in a fixed order."""
    total = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, CHUNKS, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows < CHUNKS)[:, None] & (cols < WIDTH)[None, :]
        total += tl.load(part_ptr + (n * CHUNKS + rows)[:, None] * WIDTH + cols[None, :], mask=inside, other=0.0)
    store_sums(out_ptr, n, total, cols, WIDTH)


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
    n, cols = row_and_columns(tl.program_id(0), WIDTH, COLS)
    sum_chunks(part_ptr, out_ptr, n, cols, CHUNKS, WIDTH, ROWS, COLS)


class Config(NamedTuple):
    """How a kernel of whole rows is launched: rows in a tile, warps, stages of its loads, programs that share the GPU's SMs."""

    rows: int
    warps: int
    stages: int = 1
    per_sm: int = 4


ALL = 1024  # programs per SM that no shape comes near: every block of tokens has a program of its own
TUNABLE = ("adaln_fwd", "adaln_bwd", "gated_residual_norm_adaln_fwd", "gated_residual_norm_adaln_bwd")
UNSTAGED_BYTES = 32 * 1024  # of shared memory, left to exchanges between warps
SUM_WARPS = 4  # of the kernels that add chunks up


def config(kernel: str, variant: str | None, streams: tuple[Spec, ...], target: Target) -> Config:
    """The measured config of a kernel for rows as wide as those of its streams, else the rule that most measured ones follow:
    16 elements a thread of a backward kernel and 32 of another, 16 warps an SM. Fewer stages where they would not fit shared
    memory.

    streams: the arrays of tokens that the kernel reads, of which staged loads keep tiles in shared memory; the dtype of the first
    is the one that configs are measured for. A variant is the norm, "layer" or "rms", or "post" where a second one is in front of
    it. Modulation per token takes the rule (variant None): it needs more registers than what was measured.
    """
    cols = next_power_of_2(streams[0].shape[-1])
    rows = max(1, 2048 // cols)
    warps = max(1, min(32, rows * cols // (512 if kernel.endswith("bwd") else 1024)))
    c = Config(rows, warps, 3, max(1, 16 // warps))
    measured = variant and tuned.lookup(tuned.Key(f"{kernel}-{variant}", cols, streams[0].dtype, target.arch))
    if measured:
        c = Config(measured.tile["ROWS"], measured.warps, measured.stages, measured.tile["PER_SM"])
    stage = c.rows * cols * sum(4 if x.dtype == "float32" else 2 for x in streams)
    return c._replace(stages=max(1, min(c.stages, 1 + (target.shared - UNSTAGED_BYTES) // stage)))


def candidates(key: tuned.Key) -> list[tuple[dict[str, int], int, int]]:
    """What tuning should try: 8 to 64 elements a thread, staged loads, 8 to 32 warps an SM or a program for every tile."""
    kernel, _, variant = key.kernel.partition("-")
    if kernel not in TUNABLE or not variant:
        return []
    rows = sorted({max(1, size // key.width) for size in (512, 1024, 2048, 4096, 8192)})
    tiles = [(r, w) for r in rows for w in (1, 2, 4, 8, 16) if 8 <= r * key.width // (32 * w) <= 64]
    shares = lambda w: sorted({max(1, k // w) for k in (8, 12, 16, 32)}) + [ALL]
    return [(dict(ROWS=r, PER_SM=n), w, stages) for r, w in tiles for stages in (1, 2, 3, 4, 5) for n in shares(w)]


def tile(width: int, config: Config) -> dict[str, int]:
    return dict(ROWS=config.rows, COLS=next_power_of_2(width))


def split(target: Target, samples: int, blocks: int, c: Config, sums: bool = False) -> tuple[int, int]:
    """Chunks per sample and blocks per chunk: about `per_sm` programs for every SM, and no more partial sums than that.

    Where a kernel sums over tokens, short samples that fill the GPU by themselves stay whole if a program has the warps for
    it: nothing is left to add up then.
    """
    blocks = max(1, blocks)  # sums over no token are written too: zeros
    whole = sums and c.warps >= 4 and blocks <= 16 and 4 * samples >= 3 * target.sms
    chunks = 1 if whole else max(1, min(blocks, c.per_sm * target.sms // max(1, samples)))
    per_chunk = cdiv(blocks, chunks)
    return cdiv(blocks, per_chunk), per_chunk


def sum_tile(shared: bool, sums: int) -> dict[str, int]:
    """Tile of a kernel that adds the chunks of each sample up, and, where samples share a vector, of all samples: many at once,
    in few columns, as a thousand short samples are a thousand partial sums, and only columns are left to share out."""
    return dict(ROWS=16, COLS=8 if shared else 32, SHARED_ROWS=256 if sums == 1 else 64)


@remembered
def sum_chunks_plan(part: Spec, out: Spec) -> Plan:
    N, chunks, D = part.shape
    cols = min(32, next_power_of_2(D))
    return Plan(
        sum_chunks_kernel,
        grid=(N * cdiv(D, cols),),
        outs=(out,),
        ints=dict(CHUNKS=chunks),
        meta=dict(WIDTH=D, ROWS=16, COLS=cols),
        warps=SUM_WARPS,
    )


def row_meta(name: str, v, row: int | None) -> dict[str, int]:
    """Where one sample's row of a vector lies, for a kernel: elements between two samples' rows, and before the first one's.

    v is (B, D) or (B, 1, D), or a packed (B, M, D) of which `row` is read; None if it is absent.
    """
    stride = 0 if v is None else row_stride(v, 1 if row is None else 2)
    return {f"{name}_STRIDE": stride, f"{name}_AT": 0 if row is None else row * v.shape[2]}


def gradient_spec(v, row: int | None) -> Spec:
    """The gradient of a packed (B, M, D) operand is its row's, (B, D); any other's has the operand's shape."""
    return spec(v) if row is None else Spec((v.shape[0], v.shape[2]), spec(v).dtype)


def per_sample(v, row: int | None):
    """(B, D), (B, 1, D) or row of (B, M, D) -> (B, 1, D)."""
    return v[:, row : row + 1] if row is not None else v.reshape(v.shape[0], 1, v.shape[-1])
