"""Backward of short joint sequences in one launch: a program does all of one head, every exponential once.

What a score needs of its row rides along in columns: with q' = [q, a, b, c], a + b + c = -lse / scale in three parts of 8 bits,
and k' = [k, 1, 1, 1], P = 2^(scale * q' k'), and likewise dP - delta = do' v'. So the tensor cores subtract, rows cost no load
and no instruction in the loop, and a key that is not there has k' = v' = 0, hence dS = 0, without a mask. Where heads are so
wide that q and do have no column to spare, those of both are in a tile of their own, in place of columns of o, which are not
needed any more: zeros of k' and v' meet the others, so where o is infinite, all gradients of the head are NaN.

A head of few blocks is straight code without a loop, and a program walks heads: the next one is loaded meanwhile.
"""

from __future__ import annotations

from .._triton import tl, triton
from .tokens import EMPTY, kept, load_tokens, pair_sum, piece_of, scaled


@triton.jit
def with_columns(x, number, FIRST: tl.constexpr):
    """x [ROWS, COLS] bfloat16, its columns FIRST to FIRST + 2 replaced by three parts of `number` [ROWS]."""
    cols = tl.arange(0, x.shape[1])[None, :]
    high = number.to(x.dtype)
    number -= high.to(tl.float32)
    middle = number.to(x.dtype)
    low = (number - middle.to(tl.float32)).to(x.dtype)
    x = tl.where(cols == FIRST, high[:, None], x)
    x = tl.where(cols == FIRST + 1, middle[:, None], x)
    return tl.where(cols == FIRST + 2, low[:, None], x)


@triton.jit
def with_ones(x, keep, FIRST: tl.constexpr):
    """x [ROWS, COLS], ones in its columns FIRST to FIRST + 2 of rows to keep."""
    cols = tl.arange(0, x.shape[1])[None, :]
    return tl.where(keep[:, None] & (cols >= FIRST) & (cols < FIRST + 3), 1.0, x).to(x.dtype)


@triton.jit
def store_tokens(ptr, x, batch, head, tokens, length, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """A tile x [tokens, COLS] of one head."""
    at, inside = piece_of(batch, head, tokens, length, 0, HEADS, WIDTH, x.shape[1])
    tl.store(ptr + at, x.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def key_gradients(
    q, do, q_and, do_and, rows, dq, k, v, key, dk_ptr, dv_ptr, batch, head, length, real,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, SCALE: tl.constexpr, DK_SCALE: tl.constexpr,
):  # fmt: skip
    """Stores dk and dv of one block of keys; dq of all queries, increased by its part."""
    spare: tl.constexpr = k.shape[1] >= WIDTH + 3
    k_and = k
    v_and = v
    if spare:
        k_and = with_ones(k, real, WIDTH)
        v_and = with_ones(v, real, WIDTH)
    else:
        shift_ones = with_ones(tl.zeros_like(k), real, 0)
        delta_ones = with_ones(tl.zeros_like(v), real, 3)
    dk = tl.zeros(k.shape, tl.float32)  # [KEYS, COLS]
    dv = tl.zeros(v.shape, tl.float32)
    sums = ()
    for b in tl.static_range(len(dq)):
        s = tl.dot(k_and, tl.trans(q_and[b]))  # [KEYS, QUERIES]
        dp = tl.dot(v_and, tl.trans(do_and[b]))  # [KEYS, QUERIES]
        if not spare:
            s = tl.dot(shift_ones, tl.trans(rows[b]), s)
            dp = tl.dot(delta_ones, tl.trans(rows[b]), dp)
        p = tl.exp2(scaled(s, SCALE))
        ds = (p * dp).to(k.dtype)
        dv = tl.dot(p.to(k.dtype), do[b], dv)
        dk = tl.dot(ds, q[b], dk)
        sums = sums + (tl.dot(tl.trans(ds), k, dq[b]),)
    store_tokens(dk_ptr, dk * DK_SCALE, batch, head, key, length, HEADS, WIDTH)
    store_tokens(dv_ptr, tl.where(real[:, None], dv, 0.0), batch, head, key, length, HEADS, WIDTH)
    return sums


@triton.jit
def head_gradients(
    unit, q_ptrs, k_ptrs, v_ptrs, key_mask_ptrs, o_ptrs, do_ptrs, lse_ptrs, dlse_ptrs, dq_ptrs, dk_ptrs, dv_ptrs,
    LENGTHS, Q_STRIDES_, K_STRIDES_, V_STRIDES_, V_AT: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    SCALE: tl.constexpr, KEY_MASKS_, SHIFTED: tl.constexpr, DQ_SCALE: tl.constexpr, DK_SCALE: tl.constexpr, BLOCKS_,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, COLS: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    """dq, dk and dv of a head. dq of all queries stays in registers while one block of keys after the other is finished."""
    row_stride: tl.constexpr = HEADS * WIDTH
    dtype: tl.constexpr = v_ptrs[0].dtype.element_ty
    cols = tl.arange(0, COLS)
    head = unit % HEADS
    batch = tl.cast(unit // HEADS, tl.int64)
    # All loads come before the first use of one, so that they wait for memory together.
    q, do, o, lse, dlse, k, v = (), (), (), (), (), (), ()  # of blocks, [QUERIES, COLS] or [QUERIES]
    for i in tl.static_range(len(q_ptrs)):
        q_ptr, o_ptr, do_ptr = q_ptrs[i] + head * WIDTH, o_ptrs[i] + head * WIDTH, do_ptrs[i] + head * WIDTH
        k_ptr, v_ptr = k_ptrs[i] + head * WIDTH, v_ptrs[i] + head * WIDTH + V_AT
        for b in tl.static_range(BLOCKS_[i]):
            query = b * QUERIES + tl.arange(0, QUERIES)
            keep = kept(key_mask_ptrs[i], batch, query, LENGTHS[i], KEY_MASKS_[i])
            row = (batch * HEADS + head) * LENGTHS[i] + query
            q = q + (load_tokens(q_ptr, batch, query, LENGTHS[i], Q_STRIDES_[i], cols, WIDTH, keep, False).to(dtype),)
            do = do + (load_tokens(do_ptr, batch, query, LENGTHS[i], row_stride, cols, WIDTH, keep, False),)
            o = o + (load_tokens(o_ptr, batch, query, LENGTHS[i], row_stride, cols, WIDTH, keep, False),)
            lse = lse + (tl.load(lse_ptrs[i] + row, mask=query < LENGTHS[i], other=EMPTY),)
            if SHIFTED:
                dlse = dlse + (tl.load(dlse_ptrs[i] + row, mask=query < LENGTHS[i], other=0.0),)
            if not LOOP:
                k = k + (load_tokens(k_ptr, batch, query, LENGTHS[i], K_STRIDES_[i], cols, WIDTH, keep, False).to(dtype),)
                v = v + (load_tokens(v_ptr, batch, query, LENGTHS[i], V_STRIDES_[i], cols, WIDTH, keep, False),)
    q_and, do_and, rows, dq = (), (), (), ()
    for b in tl.static_range(len(q)):
        delta = tl.reshape(pair_sum(o[b].to(tl.float32) * do[b].to(tl.float32)), (QUERIES,))
        if SHIFTED:
            delta -= dlse[b]
        empty = lse[b] == EMPTY
        shift = tl.where(empty, -1e30, lse[b] * (-1.0 / SCALE))
        delta = tl.where(empty, 0.0, -delta)
        if WIDTH + 3 <= COLS:
            q_and = q_and + (with_columns(q[b], shift, WIDTH),)
            do_and = do_and + (with_columns(do[b], delta, WIDTH),)
        else:
            q_and = q
            do_and = do
            rows = rows + (with_columns(with_columns(o[b], shift, 0), delta, 3),)
        dq = dq + (tl.zeros((QUERIES, COLS), tl.float32),)
    done = ()
    for t in tl.static_range(len(k_ptrs)):
        if LOOP:
            k_ptr, v_ptr = k_ptrs[t] + head * WIDTH, v_ptrs[t] + head * WIDTH + V_AT
            key = tl.arange(0, KEYS)
            real = kept(key_mask_ptrs[t], batch, key, LENGTHS[t], KEY_MASKS_[t])
            next_k = load_tokens(k_ptr, batch, key, LENGTHS[t], K_STRIDES_[t], cols, WIDTH, real, False)
            next_v = load_tokens(v_ptr, batch, key, LENGTHS[t], V_STRIDES_[t], cols, WIDTH, real, False)
            for start in tl.range(0, LENGTHS[t], KEYS, num_stages=1):
                key = start + tl.arange(0, KEYS)
                real = kept(key_mask_ptrs[t], batch, key, LENGTHS[t], KEY_MASKS_[t])
                coming = kept(key_mask_ptrs[t], batch, key + KEYS, LENGTHS[t], KEY_MASKS_[t])
                this_k = next_k.to(dtype)
                this_v = next_v
                next_k = load_tokens(k_ptr, batch, key + KEYS, LENGTHS[t], K_STRIDES_[t], cols, WIDTH, coming, False)
                next_v = load_tokens(v_ptr, batch, key + KEYS, LENGTHS[t], V_STRIDES_[t], cols, WIDTH, coming, False)
                dq = key_gradients(
                    q, do, q_and, do_and, rows, dq, this_k, this_v, key, dk_ptrs[t], dv_ptrs[t], batch, head, LENGTHS[t],
                    real, HEADS, WIDTH, SCALE, DK_SCALE,
                )  # fmt: skip
        else:
            for b in tl.static_range(BLOCKS_[t]):
                key = b * KEYS + tl.arange(0, KEYS)
                real = kept(key_mask_ptrs[t], batch, key, LENGTHS[t], KEY_MASKS_[t])
                dq = key_gradients(
                    q, do, q_and, do_and, rows, dq, k[len(done)], v[len(done)], key, dk_ptrs[t], dv_ptrs[t], batch, head,
                    LENGTHS[t], real, HEADS, WIDTH, SCALE, DK_SCALE,
                )  # fmt: skip
                done = done + (0,)
    stored = ()
    for i in tl.static_range(len(q_ptrs)):
        for b in tl.static_range(BLOCKS_[i]):
            query = b * QUERIES + tl.arange(0, QUERIES)
            store_tokens(dq_ptrs[i], dq[len(stored)] * DQ_SCALE, batch, head, query, LENGTHS[i], HEADS, WIDTH)
            stored = stored + (0,)


@triton.jit
def joint_attention_bwd_body(
    q_ptrs,  # (B, L_s, H, d) per stream, tokens a stride apart
    k_ptrs,  # likewise
    v_ptrs,  # likewise, bfloat16
    key_mask_ptrs,  # (B, L_s) bool
    o_ptrs,  # (B, L_s, H, d)
    do_ptrs,  # (B, L_s, H, d)
    lse_ptrs,  # (B, H, L_s) float32, base 2
    dlse_ptrs,  # (B, H, L_s) float32
    dq_ptrs,  # (B, L_s, H, d)
    dk_ptrs,  # (B, L_s, H, d)
    dv_ptrs,  # (B, L_s, H, d)
    LENGTHS,
    SAMPLES,  # B, as often as there are streams
    Q_STRIDES_,
    K_STRIDES_,
    V_STRIDES_,
    V_AT,
    HEADS,
    WIDTH,  # d
    SCALE,  # softmax scale times log2(e); 1 where q has been multiplied by it
    KEY_MASKS_,
    SHIFTED,  # whether dlse is given
    DQ_SCALE,  # of dS k: the softmax scale
    DK_SCALE,  # of dS^T q: the same, or what undoes log2(e) in a folded q
    BLOCKS_,  # blocks of QUERIES in each stream
    QUERIES,
    KEYS,
    COLS,
    LOOP,  # over blocks of keys; else the next head is loaded meanwhile
):
    """Grid (B * H,), or where there is no LOOP the programs that the GPU holds at once."""
    if LOOP:
        head_gradients(
            tl.program_id(0), q_ptrs, k_ptrs, v_ptrs, key_mask_ptrs, o_ptrs, do_ptrs, lse_ptrs, dlse_ptrs, dq_ptrs, dk_ptrs,
            dv_ptrs, LENGTHS, Q_STRIDES_, K_STRIDES_, V_STRIDES_, V_AT, HEADS, WIDTH, SCALE, KEY_MASKS_, SHIFTED, DQ_SCALE,
            DK_SCALE, BLOCKS_, QUERIES, KEYS, COLS, LOOP,
        )  # fmt: skip
    else:
        for unit in range(tl.program_id(0), SAMPLES[0] * HEADS, tl.num_programs(0)):
            head_gradients(
                unit, q_ptrs, k_ptrs, v_ptrs, key_mask_ptrs, o_ptrs, do_ptrs, lse_ptrs, dlse_ptrs, dq_ptrs, dk_ptrs, dv_ptrs,
                LENGTHS, Q_STRIDES_, K_STRIDES_, V_STRIDES_, V_AT, HEADS, WIDTH, SCALE, KEY_MASKS_, SHIFTED, DQ_SCALE, DK_SCALE,
                BLOCKS_, QUERIES, KEYS, COLS, LOOP,
            )  # fmt: skip
