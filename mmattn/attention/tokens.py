"""How the attention kernels find, load and mask tokens of several streams.

Tiles are powers of two wide, heads need not be: what stands for a head's columns [TOKENS, COLS] is a tuple of tiles as wide
as the powers of two that COLS is the sum of, the largest first: 96 = 64 + 32. WIDTH of them exist, the others read as 0.
"""

from __future__ import annotations

from .._triton import tl, triton
from ..dots import for_dot

INVERSE_FACTORIALS = tl.constexpr((1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0))
# What the backward is told of a row without any key in place of its log-sum-exp, which is minus infinity: finite, since JAX's
# debug_infs looks at residuals that no user has asked for, and so large that a score less it has P = 0.
EMPTY: tl.constexpr = tl.constexpr(2.0**127)


@triton.jit
def place(LENGTHS, SIZE: tl.constexpr, HEADS: tl.constexpr):
    """Sample, head and block of the program, of a grid of HEADS times all streams' blocks of SIZE tokens for each sample."""
    blocks = 0
    for t in tl.static_range(len(LENGTHS)):
        blocks += tl.cdiv(LENGTHS[t], SIZE)
    head = tl.program_id(0) // blocks % HEADS
    batch = (tl.program_id(0) // blocks // HEADS).to(tl.int64)
    return batch, head, tl.program_id(0) % blocks


@triton.jit
def stream_of(block, ptrs, LENGTHS, STRIDES_, SIZE: tl.constexpr):
    """Which stream a block of SIZE tokens, counted over all streams, belongs to: its number, pointer, length, row stride and
    the block's first token."""
    stream = 0
    ptr = ptrs[0]
    length = LENGTHS[0] + 0
    stride = STRIDES_[0] + 0
    first = block * SIZE
    before = tl.cdiv(LENGTHS[0], SIZE)
    for t in tl.static_range(1, len(ptrs)):
        if block >= before:
            stream = t
            ptr = ptrs[t]
            length = LENGTHS[t] + 0
            stride = STRIDES_[t] + 0
            first = (block - before) * SIZE
        before += tl.cdiv(LENGTHS[t], SIZE)
    return stream, ptr, length, stride, first


@triton.jit
def load_tokens(ptr, batch, tokens, length, stride, cols, WIDTH: tl.constexpr, keep, WHOLE: tl.constexpr):
    """Tile [tokens, cols] of one head; tokens that `keep` excludes read as 0, whatever they hold. WHOLE: none is excluded."""
    at = ptr + batch * length * stride + tokens[:, None] * stride + cols[None, :]
    if WHOLE and cols.shape[0] <= WIDTH:
        return tl.load(at)
    elif WHOLE:
        return tl.load(at, mask=(cols < WIDTH)[None, :], other=0.0)
    else:
        return tl.load(at, mask=keep[:, None] & (cols < WIDTH)[None, :], other=0.0)


@triton.constexpr_function
def pieces(COLS):
    """How many tiles COLS columns are."""
    return COLS.bit_count()


@triton.constexpr_function
def columns_before(COLS, i):
    """How many columns are in the tiles before tile i: the largest i powers of two of COLS."""
    rest = COLS
    for _ in range(i):
        rest -= 1 << rest.bit_length() - 1
    return COLS - rest


@triton.constexpr_function
def piece(COLS, i):
    """How many columns are in tile i."""
    return columns_before(COLS, i + 1) - columns_before(COLS, i)


@triton.jit
def load_head(
    ptr, batch, tokens, length, stride, keep, dtype: tl.constexpr, PRECISION: tl.constexpr,
    WIDTH: tl.constexpr, COLS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One head [TOKENS, COLS] in a dtype, as load_tokens reads it and dots take it."""
    tiles = ()
    for i in tl.static_range(pieces(COLS)):
        cols = tl.arange(0, piece(COLS, i))
        there = ptr + columns_before(COLS, i)
        tile = load_tokens(there, batch, tokens, length, stride, cols, WIDTH - columns_before(COLS, i), keep, WHOLE)
        tiles = tiles + (for_dot(tile.to(dtype), PRECISION),)
    return tiles


@triton.jit
def piece_of(batch, head, tokens, length, i: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, COLS: tl.constexpr):
    """Where tile i of one head of (B, L, HEADS, WIDTH) is, and what of it exists."""
    cols = columns_before(COLS, i) + tl.arange(0, piece(COLS, i))
    at = (batch * length + tokens)[:, None] * (HEADS * WIDTH) + head * WIDTH + cols[None, :]
    return at, (tokens < length)[:, None] & (cols < WIDTH)[None, :]


@triton.jit
def zero_head(TOKENS: tl.constexpr, COLS: tl.constexpr):
    """0 in [TOKENS, COLS], float32."""
    tiles = ()
    for i in tl.static_range(pieces(COLS)):
        tiles = tiles + (tl.zeros((TOKENS, piece(COLS, i)), tl.float32),)
    return tiles


@triton.jit
def silenced(x, keep):
    """x [TOKENS, COLS], 0 in the tokens that `keep` excludes."""
    tiles = ()
    for i in tl.static_range(len(x)):
        tiles = tiles + (tl.where(keep[:, None], x[i], 0.0),)
    return tiles


@triton.jit
def scaled(s, SCALE: tl.constexpr):
    """Scores times SCALE; at 1, where q has it in it already, no instruction."""
    return s if SCALE == 1.0 else s * SCALE


@triton.jit
def power(x, EXACT: tl.constexpr):
    """2^x by the GPU's own instruction; EXACT: e^x for x <= 88 within an ulp, on the FMA pipes.

    float32 shows the 2 ulp of that instruction, and the rounding of a scale that has log2(e) in it; 16 bits do not.
    """
    if EXACT:
        n = tl.floor(tl.fma(x, tl.full(x.shape, 1.4426950408889634, tl.float32), tl.full(x.shape, 0.5, tl.float32)))
        f = n * -0.693145751953125 + x  # ln 2 in two parts, the first of few bits, so that the product is exact
        f = n * -1.428606765330187e-06 + f  # in [-0.35, 0.35]; the Taylor series of e^f leaves out less than 2^-27
        y = tl.full(x.shape, 1.0 / 5040, tl.float32)
        for k in tl.static_range(7):
            y = tl.fma(f, y, tl.full(x.shape, INVERSE_FACTORIALS[k], tl.float32))
        two_to_n = ((tl.maximum(n, -126.0).to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
        return tl.where(x <= -87.0, 0.0, y * two_to_n)
    else:
        return tl.exp2(x)


@triton.jit
def tile_products(x, y, PRECISION: tl.constexpr, EXACT: tl.constexpr):
    """x y^T of tiles. EXACT: in parts of 16 columns, since rounding errors grow with the length of a sum; an fma adds them, as
    the compiler would make one chain of two dots and a sum."""
    if EXACT and x.shape[1] > 16:
        x_even, x_odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
        y_even, y_odd = tl.split(tl.reshape(y, (y.shape[0], y.shape[1] // 2, 2)))
        even = tile_products(x_even, y_even, PRECISION, EXACT)
        return tl.fma(even, tl.full(even.shape, 1.0, tl.float32), tile_products(x_odd, y_odd, PRECISION, EXACT))
    else:
        return tl.dot(x, tl.trans(y), input_precision=PRECISION)


@triton.jit
def products(x, y, PRECISION: tl.constexpr, EXACT: tl.constexpr):
    """x y^T of two heads' [ROWS, COLS]."""
    s = tile_products(x[0], y[0], PRECISION, EXACT)
    for i in tl.static_range(1, len(x)):
        s = tl.dot(x[i], tl.trans(y[i]), s, input_precision=PRECISION)
    return s


@triton.jit
def accumulate(acc, decay, a, b, PRECISION: tl.constexpr, EXACT: tl.constexpr):
    """acc * decay + a b for a head's acc and b. EXACT: the product is summed by itself, so that rounding errors add up over a
    block, not a sequence."""
    tiles = ()
    for i in tl.static_range(len(b)):
        if EXACT:
            tile = tl.fma(acc[i], tl.zeros_like(acc[i]) + decay, tl.dot(a, b[i], input_precision=PRECISION))
        else:
            tile = tl.dot(a, b[i], acc[i] * decay, input_precision=PRECISION)
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def pair_sum(x):
    """The sum of each row [ROWS, 1] of [ROWS, COLS], neighbours first."""
    if x.shape[1] == 1:
        return x
    else:
        a, b = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
        return pair_sum(a + b)


@triton.jit
def row_sum(total, decay, p, PRECISION: tl.constexpr, EXACT: tl.constexpr):
    """total * decay + the sum of p's rows, equal in all columns of `total` [QUERIES, 16], in an order that does not change.

    A reduction follows the layout of the tile, which the compiler chooses by what it knows of lengths, so it may differ between
    the frameworks. The tensor cores sum in their own order, as a product with ones; EXACT: pairs are added, then pairs of pairs.
    """
    if EXACT:
        return tl.fma(total, tl.zeros_like(total) + decay, tl.zeros_like(total) + pair_sum(p))
    else:
        return tl.dot(p, tl.full((p.shape[1], 16), 1.0, p.dtype), total * decay, input_precision=PRECISION)


@triton.jit
def kept(key_mask_ptr, batch, tokens, length, MASKED: tl.constexpr):
    """Which tokens of a stream exist and are not silenced by its key mask."""
    inside = tokens < length
    if MASKED:
        inside &= tl.load(key_mask_ptr + batch * length + tokens, mask=inside, other=0) != 0
    return inside


@triton.jit
def kept_range(key_mask_ptr, batch, length, KEY_MASKED: tl.constexpr):
    """How many tokens come before the first that does not count, how many up to the last that does, and how many count."""
    lead = length + 0
    last = length + 0
    count = length + 0
    if KEY_MASKED:
        leads = tl.zeros((1024,), tl.int32) + length
        lasts = tl.zeros((1024,), tl.int32)
        counts = tl.zeros((1024,), tl.int32)
        for start in tl.range(0, length, 1024, num_stages=1):
            token = start + tl.arange(0, 1024)
            keep = kept(key_mask_ptr, batch, token, length, True)
            leads = tl.where(keep | (token >= length), leads, tl.minimum(leads, token))
            lasts = tl.where(keep, token + 1, lasts)
            counts += keep.to(tl.int32)
        lead = tl.min(leads, 0)
        last = tl.max(lasts, 0)
        count = tl.sum(counts, 0)
    return lead, last, count


@triton.jit
def awake(keep, masked):
    """1; 0 where a block of a masked stream has no token that counts, so that its program has nothing to do."""
    some = 1
    if masked:
        some = tl.max(keep.to(tl.int32), 0)
    return some


@triton.jit
def allowed(mask_ptr, rows_ptr, cols_ptr, batch, i, t, query, key, length, CAUSAL: tl.constexpr, MASKED: tl.constexpr):
    """Whether query tokens of stream i may attend to key tokens of stream t; `query` and `key` broadcast to the tile.

    length is the first stream's. MASKED: 0 no mask, 1 a mask over the only stream, 2 a mask that is augmented to others.
    """
    valid = (query >= 0) & (key >= 0)
    if CAUSAL:
        valid &= (query >= key) | (i != t)
    if MASKED:
        own = (i == 0) & (t == 0)
        inside = (query < length) & (key < length)
        seen = tl.load(mask_ptr + batch * length * length + (query.to(tl.int64) * length + key), mask=inside & own, other=0) != 0
        if MASKED == 2:
            row = tl.load(rows_ptr + batch * length + query, mask=(query < length) & (i == 0), other=0) != 0
            col = tl.load(cols_ptr + batch * length + key, mask=(key < length) & (t == 0), other=0) != 0
            seen = (own & seen) | ((i == 0) & (t != 0) & row) | ((i != 0) & (t == 0) & col) | ((i != 0) & (t != 0))
        valid &= seen
    return valid


@triton.jit
def load_queries(
    q_ptr, query_mask_ptr, batch, first, length, q_stride, query_masked, dtype: tl.constexpr, PRECISION: tl.constexpr,
    WIDTH: tl.constexpr, QUERIES: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Token numbers [QUERIES], which of them count, and q [QUERIES, COLS] in a dtype, whose other rows read as 0."""
    query = first + tl.arange(0, QUERIES)
    keep = query < length
    if query_masked:
        keep = kept(query_mask_ptr, batch, query, length, True)
    return query, keep, load_head(q_ptr, batch, query, length, q_stride, keep, dtype, PRECISION, WIDTH, COLS, False)


@triton.jit(do_not_specialize=["LENGTH"])
def mask_any_kernel(
    mask_ptr,  # (B, L, L) bool
    rows_ptr,  # (B, L) bool
    cols_ptr,  # (B, L) bool
    LENGTH,
    LINES: tl.constexpr,
    ALONG: tl.constexpr,
):
    """Grid (2 * B * cdiv(L, LINES),): even programs any() over LINES rows, odd ones over LINES columns."""
    blocks = tl.cdiv(LENGTH, LINES)
    over_rows = tl.program_id(0) % 2 == 0
    batch = (tl.program_id(0) // 2 // blocks).to(tl.int64)
    line = (tl.program_id(0) // 2 % blocks * LINES + tl.arange(0, LINES)).to(tl.int64)
    line_stride = tl.where(over_rows, LENGTH, 1)
    along_stride = tl.where(over_rows, 1, LENGTH)
    seen = tl.zeros((LINES, ALONG), tl.int32)
    for start in range(0, LENGTH, ALONG):
        along = (start + tl.arange(0, ALONG)).to(tl.int64)
        at = line[:, None] * line_stride + along[None, :] * along_stride
        inside = (line < LENGTH)[:, None] & (along < LENGTH)[None, :]
        seen |= (tl.load(mask_ptr + batch * LENGTH * LENGTH + at, mask=inside, other=0) != 0).to(tl.int32)
    out = (rows_ptr if over_rows else cols_ptr) + batch * LENGTH + line
    tl.store(out, tl.max(seen, 1) != 0, mask=line < LENGTH)
