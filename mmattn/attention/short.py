"""Forward of short joint sequences: a program does all queries of one head, so that k and v are read once.

All keys stay in shared memory, and the next block of queries is loaded while this one is computed. The softmax has no shift (see
`forward`); whether some row needed one is asked once, when all are done, since a program's warps have to wait for each other to
ask. Then the head is computed once more.
"""

from __future__ import annotations

from .._triton import tl, triton
from .forward import LN2, gather, load_all_keys, outputs_of, shifted_softmax, sums_in_range
from .tokens import EMPTY, kept, load_queries, piece_of, stream_of, zero_head


@triton.jit
def queries_of(
    block, q_ptrs, key_mask_ptrs, LENGTHS, Q_STRIDES_, KEY_MASKS_, batch, head, dtype: tl.constexpr,
    PRECISION: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Token numbers, which of them count, and q of a block of all streams' tokens. q does not wait for the mask."""
    _, q_ptr, length, stride, first = stream_of(block, q_ptrs, LENGTHS, Q_STRIDES_, TOKENS)
    _, mask_ptr, _, masked, _ = stream_of(block, key_mask_ptrs, LENGTHS, KEY_MASKS_, TOKENS)
    query, keep, q = load_queries(
        q_ptr + head * WIDTH, mask_ptr, batch, first, length, stride, False, dtype, PRECISION, WIDTH, TOKENS, COLS
    )
    if masked:
        keep = kept(mask_ptr, batch, query, length, True)
    return query, keep, q


@triton.jit
def joint_attention_short_fwd_body(
    q_ptrs,  # (B, L_s, H, d) per stream, tokens a stride apart
    k_ptrs,  # (B, L_s, H / GROUP, d), likewise
    v_ptrs,  # likewise
    key_mask_ptrs,  # (B, L_s) bool
    o_ptrs,  # (B, L_s, H, d)
    lse_ptrs,  # (B, H, L_s) float32, base 2
    log_ptrs,  # (B, H, L_s) float32, base e
    LENGTHS,
    Q_STRIDES_,
    K_STRIDES_,
    V_STRIDES_,
    V_AT,  # where v starts in a packed projection
    HEADS,
    GROUP,  # heads of q that share one of k and v
    WIDTH,  # d
    SCALE,  # softmax scale times log2(e); 1 where q has been multiplied by it
    KEY_MASKS_,  # per stream, whether it has a key mask
    PRECISION,
    LOGS,  # whether log_ptrs are wanted
    BLOCKS_,  # per stream, its blocks of TOKENS tokens
    TOKENS,
    KEYS,  # of a block, for a head that needs a running maximum
    COLS,  # one tile
):
    """Grid (B * H,)."""
    head = tl.program_id(0) % HEADS
    batch = (tl.program_id(0) // HEADS).to(tl.int64)
    dtype: tl.constexpr = v_ptrs[0].dtype.element_ty
    query, keep, q = queries_of(
        0, q_ptrs, key_mask_ptrs, LENGTHS, Q_STRIDES_, KEY_MASKS_, batch, head, dtype, PRECISION, WIDTH, TOKENS, COLS
    )
    ks, vs = (), ()
    blocks = 0
    keys = 0
    hidden = 0  # keys that do not count, but have added 1 to each sum
    for t in tl.static_range(len(k_ptrs)):
        k_ptr = k_ptrs[t] + head // GROUP * WIDTH
        v_ptr = v_ptrs[t] + head // GROUP * WIDTH + V_AT
        more_ks, more_vs, uncounted = load_all_keys(
            k_ptr, v_ptr, key_mask_ptrs[t], batch, LENGTHS[t], K_STRIDES_[t], V_STRIDES_[t],
            PRECISION, WIDTH, KEY_MASKS_[t], BLOCKS_[t], TOKENS, COLS,
        )  # fmt: skip
        ks = ks + more_ks
        vs = vs + more_vs
        blocks += BLOCKS_[t]
        keys += LENGTHS[t]
        hidden += uncounted
    fine = tl.full((TOKENS,), 1, tl.int32)
    largest = tl.zeros((TOKENS, COLS), tl.float32)
    for block in tl.range(0, blocks, num_stages=1):
        next_query, next_keep, next_q = queries_of(
            block + 1, q_ptrs, key_mask_ptrs, LENGTHS, Q_STRIDES_, KEY_MASKS_, batch, head, dtype, PRECISION, WIDTH, TOKENS, COLS
        )
        o_ptr, lse_ptr, log_ptr, length = outputs_of(block, o_ptrs, lse_ptrs, log_ptrs, LENGTHS, Q_STRIDES_, TOKENS)
        acc = zero_head(TOKENS, COLS)  # [TOKENS, COLS]
        total = tl.zeros((TOKENS, 8), tl.float32)
        for j in tl.static_range(len(ks)):
            acc, total = gather(acc, total, q, ks[j], vs[j], None, query, 0, 0, 0, SCALE, False, PRECISION, True, True)
        sums = tl.max(total, 1) - hidden  # [TOKENS]
        o = tl.where(keep[:, None], acc[0] * (1.0 / sums)[:, None], 0.0)
        fine &= sums_in_range(sums, keep, keys, hidden, dtype == tl.float16).to(tl.int32)
        largest = tl.maximum(largest, tl.abs(o), propagate_nan=tl.PropagateNan.ALL)  # infinite or NaN if a sum of P v was
        at, inside = piece_of(batch, head, query, length, 0, HEADS, WIDTH, COLS)
        tl.store(o_ptr + at, o.to(dtype), mask=inside)
        at = (batch * HEADS + head) * length + query
        lse = tl.log2(sums)
        tl.store(lse_ptr + at, tl.where(keep, lse, EMPTY), mask=query < length)
        if LOGS:
            tl.store(log_ptr + at, tl.where(keep, lse * LN2, float("-inf")), mask=query < length)
        query, keep, q = next_query, next_keep, next_q
    fine &= tl.min((largest < float("inf")).to(tl.int32), 1)
    if tl.min(fine, 0) == 0:
        tl.debug_barrier()  # what one thread has stored, another stores again
        for block in tl.range(0, blocks, num_stages=1):
            i, q_ptr, length, q_stride, first = stream_of(block, q_ptrs, LENGTHS, Q_STRIDES_, TOKENS)
            o_ptr, lse_ptr, log_ptr, _ = outputs_of(block, o_ptrs, lse_ptrs, log_ptrs, LENGTHS, Q_STRIDES_, TOKENS)
            _, query_mask_ptr, _, query_masked, _ = stream_of(block, key_mask_ptrs, LENGTHS, KEY_MASKS_, TOKENS)
            shifted_softmax(
                q_ptr, k_ptrs, v_ptrs, query_mask_ptr, key_mask_ptrs, q_ptr, q_ptr, q_ptr, o_ptr, lse_ptr, log_ptr,
                batch, head, i, first, length, q_stride, query_masked, LENGTHS, K_STRIDES_, V_STRIDES_, V_AT,
                HEADS, GROUP, WIDTH, SCALE, KEY_MASKS_, False, 0, PRECISION, False, LOGS, TOKENS, KEYS, COLS, 1,
            )  # fmt: skip
