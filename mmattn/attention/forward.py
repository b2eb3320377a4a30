"""Forward kernel of joint attention: online softmax over one stream's keys after the other."""

from __future__ import annotations

import math

from .._triton import tl, triton
from .tokens import accumulate, allowed, kept, load_tokens, power, products, row_sum, stream_of

LN2: tl.constexpr = tl.constexpr(math.log(2))


@triton.jit
def attend(
    acc, total, top, q, k_ptr, v_ptr, key_mask_ptr, mask_ptr, rows_ptr, cols_ptr, batch, i, t, query, start,
    length, first_length, k_stride, v_stride,
    SCALE: tl.constexpr, WIDTH: tl.constexpr, KEY_MASKED: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, EXACT: tl.constexpr, KEYS: tl.constexpr, COLS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One block of keys in the online softmax: output [QUERIES, COLS], row sum [QUERIES, 16] and running maximum [QUERIES]."""
    key = start + tl.arange(0, KEYS)
    cols = tl.arange(0, COLS)
    whole: tl.constexpr = not (TAIL or KEY_MASKED)
    keep = kept(key_mask_ptr, batch, key, length, KEY_MASKED)
    v = load_tokens(v_ptr, batch, key, length, v_stride, cols, WIDTH, keep, whole)  # [KEYS, COLS]
    k = load_tokens(k_ptr, batch, key, length, k_stride, cols, WIDTH, keep, whole).to(v.dtype)
    s = products(q, k, PRECISION, EXACT) * SCALE  # [QUERIES, KEYS]
    if not whole:
        s = tl.where(keep[None, :], s, float("-inf"))
    if CAUSAL or MASKED:
        valid = allowed(mask_ptr, rows_ptr, cols_ptr, batch, i, t, query[:, None], key[None, :], first_length, CAUSAL, MASKED)
        s = tl.where(valid, s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1))
    shift = new_top
    if CAUSAL or MASKED or KEY_MASKED:  # a row may have seen no key yet
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = power(s - shift[:, None], EXACT).to(v.dtype)
    decay = power(top - shift, EXACT)[:, None]
    total = row_sum(total, decay, p, PRECISION, EXACT)
    acc = accumulate(acc, decay, p, v, PRECISION, EXACT)
    return acc, total, new_top


@triton.jit
def joint_attention_fwd_body(
    q_ptrs,  # (B, L_s, H, d) per stream, tokens a stride apart
    k_ptrs,  # likewise
    v_ptrs,  # likewise
    key_mask_ptrs,  # (B, L_s) bool
    mask_ptr,  # (B, L_0, L_0) bool
    rows_ptr,  # (B, L_0) bool: any of the mask's row
    cols_ptr,  # (B, L_0) bool: any of the mask's column
    o_ptrs,  # (B, L_s, H, d)
    lse_ptrs,  # (B, H, L_s) float32, base 2; EXACT: (B, H, L_s, 2), the largest score and the sum, base e
    log_ptrs,  # (B, H, L_s) float32, base e
    LENGTHS,
    Q_STRIDES_,
    K_STRIDES_,
    V_STRIDES_,
    V_AT,  # where v starts in a packed projection
    HEADS,
    WIDTH,  # d
    SCALE,  # softmax scale, in base 2 times log2(e)
    KEY_MASKS_,  # per stream, whether it has a key mask
    CAUSAL,
    MASKED,
    PRECISION,
    EXACT,  # base e and exponentials within an ulp
    LOGS,  # whether log_ptrs are wanted
    QUERIES,
    KEYS,
    COLS,
):
    """Grid (B * H * blocks of QUERIES tokens over all streams,)."""
    blocks = 0
    for t in tl.static_range(len(q_ptrs)):
        blocks += tl.cdiv(LENGTHS[t], QUERIES)
    head = tl.program_id(0) // blocks % HEADS
    batch = (tl.program_id(0) // blocks // HEADS).to(tl.int64)
    block = tl.program_id(0) % blocks
    i, q_ptr, length, q_stride, first = stream_of(block, q_ptrs, LENGTHS, Q_STRIDES_, QUERIES)
    _, o_ptr, _, _, _ = stream_of(block, o_ptrs, LENGTHS, Q_STRIDES_, QUERIES)
    _, lse_ptr, _, _, _ = stream_of(block, lse_ptrs, LENGTHS, Q_STRIDES_, QUERIES)
    _, query_mask_ptr, _, _, _ = stream_of(block, key_mask_ptrs, LENGTHS, Q_STRIDES_, QUERIES)
    _, _, _, query_masked, _ = stream_of(block, key_mask_ptrs, LENGTHS, KEY_MASKS_, QUERIES)

    query = first + tl.arange(0, QUERIES)
    cols = tl.arange(0, COLS)
    keep = query < length
    if query_masked:
        keep = kept(query_mask_ptr, batch, query, length, True)
    q = load_tokens(q_ptr + head * WIDTH, batch, query, length, q_stride, cols, WIDTH, keep, False)  # [QUERIES, COLS]
    q = q.to(v_ptrs[0].dtype.element_ty)
    acc = tl.zeros((QUERIES, COLS), tl.float32)
    total = tl.zeros((QUERIES, 16), tl.float32)
    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    for t in tl.static_range(len(k_ptrs)):
        k_ptr = k_ptrs[t] + head * WIDTH
        v_ptr = v_ptrs[t] + head * WIDTH + V_AT
        end = LENGTHS[t] + 0
        if CAUSAL:
            end = tl.where(i == t, tl.minimum(LENGTHS[t], first + QUERIES), LENGTHS[t])
        full = end // KEYS * KEYS
        for start in range(0, full, KEYS):
            acc, total, top = attend(
                acc, total, top, q, k_ptr, v_ptr, key_mask_ptrs[t], mask_ptr, rows_ptr, cols_ptr, batch, i, t, query, start,
                LENGTHS[t], LENGTHS[0], K_STRIDES_[t], V_STRIDES_[t],
                SCALE, WIDTH, KEY_MASKS_[t], CAUSAL, MASKED, PRECISION, EXACT, KEYS, COLS, TAIL=False,
            )  # fmt: skip
        if full < end:
            acc, total, top = attend(
                acc, total, top, q, k_ptr, v_ptr, key_mask_ptrs[t], mask_ptr, rows_ptr, cols_ptr, batch, i, t, query, full,
                LENGTHS[t], LENGTHS[0], K_STRIDES_[t], V_STRIDES_[t],
                SCALE, WIDTH, KEY_MASKS_[t], CAUSAL, MASKED, PRECISION, EXACT, KEYS, COLS, TAIL=True,
            )  # fmt: skip
    total = tl.max(total, 1)
    seen = keep & (total > 0)
    total = tl.where(seen, total, 1.0)
    o = tl.div_rn(acc, tl.broadcast_to(total[:, None], acc.shape)) if EXACT else acc * (1.0 / total)[:, None]
    o = tl.where(seen[:, None], o, 0.0)
    top = tl.where(seen, top, float("-inf"))
    at = (batch * length + query)[:, None] * (HEADS * WIDTH) + head * WIDTH + cols[None, :]
    tl.store(o_ptr + at, o.to(o_ptr.dtype.element_ty), mask=(query < length)[:, None] & (cols < WIDTH)[None, :])
    at = (batch * HEADS + head) * length + query
    if EXACT:
        # One number would be off by half an ulp of the logits, and a row's whole gradient with it.
        tl.store(lse_ptr + 2 * at, top, mask=query < length)
        tl.store(lse_ptr + 2 * at + 1, total, mask=query < length)
        log = top + tl.log(total)
    else:
        lse = top + tl.log2(total)
        tl.store(lse_ptr + at, lse, mask=query < length)
        log = lse * LN2
    if LOGS:
        _, log_ptr, _, _, _ = stream_of(block, log_ptrs, LENGTHS, Q_STRIDES_, QUERIES)
        tl.store(log_ptr + at, log, mask=query < length)
