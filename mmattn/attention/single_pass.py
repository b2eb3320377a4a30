"""Backward of short joint sequences in one launch: a program does all of one head, every exponential once.

What a score needs of its row rides along in spare columns: with q' = [q, a, b, c], a + b + c = -lse / scale in three parts
of 8 bits, and k' = [k, 1, 1, 1], P = 2^(scale * q' k'), and likewise dP - delta = do' v'. So the tensor cores subtract, rows
cost no load and no instruction in the loop, and a key that is not there has k' = v' = 0, hence dS = 0, without a mask.
"""

from __future__ import annotations

from .._triton import tl, triton
from .tokens import kept, load_tokens, pair_sum, scaled


@triton.jit
def with_columns(x, cols, number, WIDTH: tl.constexpr):
    """x [ROWS, WIDE] bfloat16, its columns WIDTH to WIDTH + 2 replaced by three parts of `number` [ROWS]."""
    high = number.to(x.dtype)
    number -= high.to(tl.float32)
    middle = number.to(x.dtype)
    low = (number - middle.to(tl.float32)).to(x.dtype)
    x = tl.where(cols[None, :] == WIDTH, high[:, None], x)
    x = tl.where(cols[None, :] == WIDTH + 1, middle[:, None], x)
    return tl.where(cols[None, :] == WIDTH + 2, low[:, None], x)


@triton.jit
def with_ones(x, cols, keep, WIDTH: tl.constexpr):
    """x [ROWS, WIDE], ones in its columns WIDTH to WIDTH + 2 of rows to keep."""
    ones = keep[:, None] & (cols >= WIDTH)[None, :] & (cols < WIDTH + 3)[None, :]
    return tl.where(ones, 1.0, x).to(x.dtype)


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
    WIDE,  # columns of q', k', v' and do'
):
    """Grid (B * H,). dq of all queries stays in registers while one block of keys after the other is finished."""
    head = tl.program_id(0) % HEADS
    batch = (tl.program_id(0) // HEADS).to(tl.int64)
    row_stride: tl.constexpr = HEADS * WIDTH
    cols = tl.arange(0, COLS)
    wide = tl.arange(0, WIDE)
    # All loads come before the first use of one, so that they wait for memory together.
    q, do, o, q_wide, do_wide, lse, dlse = (), (), (), (), (), (), ()
    for i in tl.static_range(len(q_ptrs)):
        q_ptr, o_ptr, do_ptr = q_ptrs[i] + head * WIDTH, o_ptrs[i] + head * WIDTH, do_ptrs[i] + head * WIDTH
        for b in tl.static_range(BLOCKS_[i]):
            query = b * QUERIES + tl.arange(0, QUERIES)
            keep = kept(key_mask_ptrs[i], batch, query, LENGTHS[i], KEY_MASKS_[i])
            row = (batch * HEADS + head) * LENGTHS[i] + query
            q = q + (load_tokens(q_ptr, batch, query, LENGTHS[i], Q_STRIDES_[i], cols, WIDTH, keep, False),)
            do = do + (load_tokens(do_ptr, batch, query, LENGTHS[i], row_stride, cols, WIDTH, keep, False),)
            o = o + (load_tokens(o_ptr, batch, query, LENGTHS[i], row_stride, cols, WIDTH, keep, False),)
            q_wide = q_wide + (load_tokens(q_ptr, batch, query, LENGTHS[i], Q_STRIDES_[i], wide, WIDTH, keep, False),)
            do_wide = do_wide + (load_tokens(do_ptr, batch, query, LENGTHS[i], row_stride, wide, WIDTH, keep, False),)
            lse = lse + (tl.load(lse_ptrs[i] + row, mask=query < LENGTHS[i], other=float("-inf")),)
            if SHIFTED:
                dlse = dlse + (tl.load(dlse_ptrs[i] + row, mask=query < LENGTHS[i], other=0.0),)
    dtype: tl.constexpr = v_ptrs[0].dtype.element_ty
    q_and, do_and, dq = (), (), ()
    for b in tl.static_range(len(q)):
        delta = tl.reshape(pair_sum(o[b].to(tl.float32) * do[b].to(tl.float32)), (QUERIES,))
        if SHIFTED:
            delta -= dlse[b]
        empty = lse[b] == float("-inf")
        shift = tl.where(empty, -1e30, lse[b] * (-1.0 / SCALE))
        q_and = q_and + (with_columns(q_wide[b].to(dtype), wide, shift, WIDTH),)
        do_and = do_and + (with_columns(do_wide[b], wide, tl.where(empty, 0.0, -delta), WIDTH),)
        dq = dq + (tl.zeros((QUERIES, COLS), tl.float32),)
    for t in tl.static_range(len(k_ptrs)):
        k_ptr, v_ptr = k_ptrs[t] + head * WIDTH, v_ptrs[t] + head * WIDTH + V_AT
        key = tl.arange(0, KEYS)
        real = kept(key_mask_ptrs[t], batch, key, LENGTHS[t], KEY_MASKS_[t])
        next_k = load_tokens(k_ptr, batch, key, LENGTHS[t], K_STRIDES_[t], cols, WIDTH, real, False)
        next_k_wide = load_tokens(k_ptr, batch, key, LENGTHS[t], K_STRIDES_[t], wide, WIDTH, real, False)
        next_v_wide = load_tokens(v_ptr, batch, key, LENGTHS[t], V_STRIDES_[t], wide, WIDTH, real, False)
        for start in range(0, LENGTHS[t], KEYS):
            key = start + tl.arange(0, KEYS)
            real = kept(key_mask_ptrs[t], batch, key, LENGTHS[t], KEY_MASKS_[t])
            k = next_k.to(dtype)
            k_and = with_ones(next_k_wide.to(dtype), wide, real, WIDTH)  # [KEYS, WIDE]
            v_and = with_ones(next_v_wide, wide, real, WIDTH)
            coming = kept(key_mask_ptrs[t], batch, key + KEYS, LENGTHS[t], KEY_MASKS_[t])
            next_k = load_tokens(k_ptr, batch, key + KEYS, LENGTHS[t], K_STRIDES_[t], cols, WIDTH, coming, False)
            next_k_wide = load_tokens(k_ptr, batch, key + KEYS, LENGTHS[t], K_STRIDES_[t], wide, WIDTH, coming, False)
            next_v_wide = load_tokens(v_ptr, batch, key + KEYS, LENGTHS[t], V_STRIDES_[t], wide, WIDTH, coming, False)
            dk = tl.zeros((KEYS, COLS), tl.float32)
            dv = tl.zeros((KEYS, COLS), tl.float32)
            sums = ()
            for b in tl.static_range(len(dq)):
                p = tl.exp2(scaled(tl.dot(k_and, tl.trans(q_and[b])), SCALE))  # [KEYS, QUERIES]
                ds = (p * tl.dot(v_and, tl.trans(do_and[b]))).to(dtype)
                dv = tl.dot(p.to(dtype), do[b], dv)
                dk = tl.dot(ds, q[b].to(dtype), dk)
                sums = sums + (tl.dot(tl.trans(ds), k, dq[b]),)
            dq = sums
            at = (batch * LENGTHS[t] + key)[:, None] * row_stride + head * WIDTH + cols[None, :]
            written = (key < LENGTHS[t])[:, None] & (cols < WIDTH)[None, :]
            dv = tl.where(real[:, None], dv, 0.0)
            tl.store(dk_ptrs[t] + at, (dk * DK_SCALE).to(dk_ptrs[t].dtype.element_ty), mask=written)
            tl.store(dv_ptrs[t] + at, dv.to(dv_ptrs[t].dtype.element_ty), mask=written)
    stored = ()
    for i in tl.static_range(len(q_ptrs)):
        for b in tl.static_range(BLOCKS_[i]):
            query = b * QUERIES + tl.arange(0, QUERIES)
            at = (batch * LENGTHS[i] + query)[:, None] * row_stride + head * WIDTH + cols[None, :]
            inside = (query < LENGTHS[i])[:, None] & (cols < WIDTH)[None, :]
            tl.store(dq_ptrs[i] + at, (dq[len(stored)] * DQ_SCALE).to(dq_ptrs[i].dtype.element_ty), mask=inside)
            stored = stored + (0,)
