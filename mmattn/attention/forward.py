"""Forward kernel of joint attention: a softmax without a shift, checked by its sums, and one with a running maximum.

A softmax is commonly shifted by the row's largest score, so that no exponential overflows; finding and following that score
is half of the work. Between normalised q and k scores are bounded (Cauchy-Schwarz: |q k| <= ||q|| ||k||, and rows normalised
over d with unit gains have norm sqrt(d)), 2^16 = 2^(128^0.5 log2(e)) is the largest exponential there is at d = 128, and no
shift is needed. Whether it was needed, the unshifted row shows by itself: its sum r = sum_j 2^s_j tells overflow and
underflow apart from the rest. So a block of queries is computed without a shift; if a row's r or output is out of range, the
program computes its block once more with a running maximum (`short`: all blocks of the head). Nothing need be known of q and k,
no bound is computed, and the choice is made on the device.

Proof that a row in range is as exact as a shifted one. Let n be the number of keys, u the smallest number P holds.
- No 2^s_j <= r overflowed, as r <= 2^64; no partial sum of P v did, as the output is finite before its division.
- An exponential below u is lost: at most u / 2 of r each, n u / (2 r) of the row. With r >= 2^-64 and u = 2^-126 (bfloat16 and
  float32) that is n 2^-63. In float16 P is a multiple of u = 2^-24, so r >= n 2^-12 is asked for: 2^-13, a quarter of an ulp.
- A key that does not count is read as k = v = 0: it puts 2^0 = 1 into the sum and nothing into the output, and no score need be
  masked. Those ones are subtracted from r; where they are at most 256 r, the sum's rounding grows to 257 times 2^-24 of r.
- Every other rounding is relative to its term, shifted or not. A shifted row's largest exponential is 1 and rounded by nothing,
  here it is rounded as all others are, which shows where it outweighs them: in the log-sum-exp, by half an ulp of P, where the
  tensor cores sum the rows; in the output where threads do, since P v is a sum of rounded P.
"""

from __future__ import annotations

import math

from .._triton import tl, triton
from ..dots import for_dot
from .tokens import (
    EMPTY,
    accumulate,
    allowed,
    awake,
    kept,
    kept_range,
    load_head,
    load_queries,
    piece_of,
    place,
    power,
    products,
    row_sum,
    scaled,
    silenced,
    stream_of,
    zero_head,
)

LN2: tl.constexpr = tl.constexpr(math.log(2))


@triton.jit
def load_keys(
    k_ptr, v_ptr, key_mask_ptr, batch, start, length, k_stride, v_stride, PRECISION: tl.constexpr,
    WIDTH: tl.constexpr, KEY_MASKED: tl.constexpr, KEYS: tl.constexpr, COLS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One block of k and v [KEYS, COLS], and which keys count [KEYS]; the others read as 0."""
    key = start + tl.arange(0, KEYS)
    dtype: tl.constexpr = v_ptr.dtype.element_ty
    v = load_head(v_ptr, batch, key, length, v_stride, key < length, dtype, PRECISION, WIDTH, COLS, not TAIL)
    k = load_head(k_ptr, batch, key, length, k_stride, key < length, dtype, PRECISION, WIDTH, COLS, not TAIL)
    keep = kept(key_mask_ptr, batch, key, length, KEY_MASKED)
    if KEY_MASKED:  # after the loads, which need not wait for the mask
        k = silenced(k, keep)
        v = silenced(v, keep)
    return k, v, keep


@triton.jit
def load_all_keys(
    k_ptr, v_ptr, key_mask_ptr, batch, length, k_stride, v_stride, PRECISION: tl.constexpr,
    WIDTH: tl.constexpr, KEY_MASKED: tl.constexpr, BLOCKS: tl.constexpr, KEYS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A stream's BLOCKS blocks of k and v, and how many of the keys in them do not count."""
    ks, vs = (), ()
    real = tl.zeros((KEYS,), tl.int32)
    for j in tl.static_range(BLOCKS):
        k, v, keep = load_keys(
            k_ptr, v_ptr, key_mask_ptr, batch, j * KEYS, length, k_stride, v_stride, PRECISION,
            WIDTH, KEY_MASKED, KEYS, COLS, j == BLOCKS - 1,
        )  # fmt: skip
        ks = ks + (k,)
        vs = vs + (v,)
        real += keep.to(tl.int32)
    return ks, vs, BLOCKS * KEYS - (tl.sum(real, 0) if KEY_MASKED else length)


@triton.jit
def gather(
    acc, total, q, k, v, keep, query, start, i, t,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, WHOLE: tl.constexpr, BY_DOT: tl.constexpr,
):  # fmt: skip
    """One block of keys without a shift: output [QUERIES, COLS] and, in eight columns, row sum [QUERIES, 8].

    Where the tensor cores have time (BY_DOT), they sum the rows, as a product with a tile of ones. Else every thread adds what
    it holds. Keys that do not count are 0 and add 1 to the sum, but in causal attention, which masks scores anyway.
    """
    p = tl.exp2(scaled(products(q, k, PRECISION, False), SCALE))  # [QUERIES, KEYS]
    if CAUSAL:
        key = start + tl.arange(0, p.shape[1])
        valid = (query[:, None] >= key[None, :]) | (i != t)
        if not WHOLE:
            valid &= keep[None, :]
        p = tl.where(valid, p, 0.0)
    if not BY_DOT:
        total += tl.sum(tl.reshape(p, (p.shape[0], p.shape[1] // 8, 8)), 1)
    operand = for_dot(p.to(v[0].dtype), PRECISION)
    if BY_DOT:
        ones = tl.full((p.shape[1], 8), 1.0, v[0].dtype)
        total = tl.dot(operand, ones, total, input_precision=PRECISION)
    return accumulate(acc, 1.0, operand, v, PRECISION, False), total


@triton.jit
def sums_in_range(total, keep, keys, hidden, HALF: tl.constexpr):
    """Which rows do not count, or have a sum that makes them as exact as shifted ones (see the module's text).

    hidden: keys that do not count.
    """
    least = keys * (1.0 / 4096) if HALF else 1 / 2.0**64
    return ((total >= least) & (total <= 2.0**64) & (total * 256.0 >= hidden)) | ~keep


@triton.jit
def in_range(acc, total, keep, keys, hidden, HALF: tl.constexpr):
    """Whether every row that counts came out as exact as a shifted one."""
    good = sums_in_range(total, keep, keys, hidden, HALF).to(tl.int32)
    for i in tl.static_range(len(acc)):
        good &= tl.min(tl.ravel((tl.abs(acc[i]) <= 2.0**126).to(tl.int32)), 0)  # by rows it crashes the compiler for sm_100
    return tl.min(good, 0) != 0


@triton.jit
def attend(
    acc, total, top, q, k, v, keep, mask_ptr, rows_ptr, cols_ptr, batch, i, t, query, start, first_length,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
    EMPTY: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One block of keys in the online softmax: output [QUERIES, COLS], row sum [QUERIES, 16] and running maximum [QUERIES].

    EMPTY: a row may have seen no key yet.
    """
    s = scaled(products(q, k, PRECISION, EXACT), SCALE)  # [QUERIES, KEYS]
    if not WHOLE:
        s = tl.where(keep[None, :], s, float("-inf"))
    if CAUSAL or MASKED:
        key = start + tl.arange(0, s.shape[1])
        valid = allowed(mask_ptr, rows_ptr, cols_ptr, batch, i, t, query[:, None], key[None, :], first_length, CAUSAL, MASKED)
        s = tl.where(valid, s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1))
    shift = new_top
    if EMPTY:
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = for_dot(power(s - shift[:, None], EXACT).to(v[0].dtype), PRECISION)
    decay = power(top - shift, EXACT)[:, None]
    total = row_sum(total, decay, p, PRECISION, EXACT)
    acc = accumulate(acc, decay, p, v, PRECISION, EXACT)
    return acc, total, new_top


@triton.jit
def outputs_of(block, o_ptrs, lse_ptrs, log_ptrs, LENGTHS, Q_STRIDES_, SIZE: tl.constexpr):
    """Pointers of the outputs of the stream that a block of SIZE tokens belongs to, and its length."""
    _, o_ptr, length, _, _ = stream_of(block, o_ptrs, LENGTHS, Q_STRIDES_, SIZE)
    _, lse_ptr, _, _, _ = stream_of(block, lse_ptrs, LENGTHS, Q_STRIDES_, SIZE)
    _, log_ptr, _, _, _ = stream_of(block, log_ptrs, LENGTHS, Q_STRIDES_, SIZE)
    return o_ptr, lse_ptr, log_ptr, length


@triton.jit
def store_rows(
    acc, total, top, keep, query, batch, head, length, o_ptr, lse_ptr, log_ptr,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, EXACT: tl.constexpr, LOGS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Outputs and log-sum-exps from accumulated output [QUERIES, COLS], row sum and shift [QUERIES]."""
    seen = keep & (total != 0)  # NaN is not 0, and must not be silent
    total = tl.where(seen, total, 1.0)
    for i in tl.static_range(len(acc)):
        o = tl.div_rn(acc[i], tl.broadcast_to(total[:, None], acc[i].shape)) if EXACT else acc[i] * (1.0 / total)[:, None]
        o = tl.where(seen[:, None], o, 0.0)
        at, inside = piece_of(batch, head, query, length, i, HEADS, WIDTH, COLS)
        tl.store(o_ptr + at, o.to(o_ptr.dtype.element_ty), mask=inside)
    at = (batch * HEADS + head) * length + query
    if EXACT:
        # One number would be off by half an ulp of the logits, and a row's whole gradient with it.
        tl.store(lse_ptr + 2 * at, tl.where(seen, top, EMPTY), mask=query < length)
        tl.store(lse_ptr + 2 * at + 1, total, mask=query < length)
        log = top + tl.log(total)
    else:
        lse = top + tl.log2(total)
        tl.store(lse_ptr + at, tl.where(seen, lse, EMPTY), mask=query < length)
        log = lse * LN2
    if LOGS:
        tl.store(log_ptr + at, tl.where(seen, log, float("-inf")), mask=query < length)


@triton.jit
def shifted_softmax(
    q_ptr, k_ptrs, v_ptrs, query_mask_ptr, key_mask_ptrs, mask_ptr, rows_ptr, cols_ptr, o_ptr, lse_ptr, log_ptr,
    batch, head, i, first, length, q_stride, query_masked, LENGTHS, K_STRIDES_, V_STRIDES_, V_AT: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, SCALE: tl.constexpr, KEY_MASKS_, CAUSAL: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr, LOGS: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A block of queries with a running maximum, from its loads to its stores."""
    query, keep, q = load_queries(
        q_ptr + head * WIDTH, query_mask_ptr, batch, first, length, q_stride, query_masked,
        v_ptrs[0].dtype.element_ty, PRECISION, WIDTH, QUERIES, COLS,
    )  # fmt: skip
    acc = zero_head(QUERIES, COLS)
    total = tl.zeros((QUERIES, 16), tl.float32)
    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    for t in tl.static_range(len(k_ptrs)):
        k_ptr = k_ptrs[t] + head // GROUP * WIDTH
        v_ptr = v_ptrs[t] + head // GROUP * WIDTH + V_AT
        end = LENGTHS[t] + 0
        if CAUSAL:
            end = tl.where(i == t, tl.minimum(LENGTHS[t], first + QUERIES), LENGTHS[t])
        full = end // KEYS * KEYS
        for start in tl.range(0, full, KEYS, num_stages=STAGES):
            k, v, kept_keys = load_keys(
                k_ptr, v_ptr, key_mask_ptrs[t], batch, start, LENGTHS[t], K_STRIDES_[t], V_STRIDES_[t],
                PRECISION, WIDTH, KEY_MASKS_[t], KEYS, COLS, False,
            )  # fmt: skip
            acc, total, top = attend(
                acc, total, top, q, k, v, kept_keys, mask_ptr, rows_ptr, cols_ptr, batch, i, t, query, start, LENGTHS[0],
                SCALE, CAUSAL, MASKED, PRECISION, EXACT, CAUSAL or MASKED or KEY_MASKS_[t], not KEY_MASKS_[t],
            )  # fmt: skip
        if full < end:
            k, v, kept_keys = load_keys(
                k_ptr, v_ptr, key_mask_ptrs[t], batch, full, LENGTHS[t], K_STRIDES_[t], V_STRIDES_[t],
                PRECISION, WIDTH, KEY_MASKS_[t], KEYS, COLS, True,
            )  # fmt: skip
            acc, total, top = attend(
                acc, total, top, q, k, v, kept_keys, mask_ptr, rows_ptr, cols_ptr, batch, i, t, query, full, LENGTHS[0],
                SCALE, CAUSAL, MASKED, PRECISION, EXACT, CAUSAL or MASKED or KEY_MASKS_[t], False,
            )  # fmt: skip
    store_rows(
        acc, tl.max(total, 1), top, keep, query, batch, head, length, o_ptr, lse_ptr, log_ptr, HEADS, WIDTH, EXACT, LOGS, COLS
    )


@triton.jit
def joint_attention_repair_body(
    q_ptrs,  # (B, L_s, H, d) per stream, tokens a stride apart
    k_ptrs,  # likewise
    v_ptrs,  # likewise
    old_o_ptrs,  # the outputs, which are updated in place
    old_lse_ptrs,
    old_log_ptrs,
    o_ptrs,  # (B, L_s, H, d)
    lse_ptrs,  # (B, H, L_s) float32, base 2
    log_ptrs,  # (B, H, L_s) float32, base e
    LENGTHS,
    Q_STRIDES_,
    K_STRIDES_,
    V_STRIDES_,
    V_AT,
    HEADS,
    WIDTH,
    SCALE,
    LOGS,
    REACH,  # queries of a program, a multiple of QUERIES
    QUERIES,
    KEYS,
    COLS,
):
    """With a running maximum, each block of QUERIES queries one of which has lse NaN. Grid (B * H * blocks of REACH tokens over
    all streams,): a program that finds none, as most do, has next to nothing to do, so each one looks far."""
    batch, head, block = place(LENGTHS, REACH, HEADS)
    i, q_ptr, length, q_stride, first = stream_of(block, q_ptrs, LENGTHS, Q_STRIDES_, REACH)
    o_ptr, lse_ptr, log_ptr, _ = outputs_of(block, o_ptrs, lse_ptrs, log_ptrs, LENGTHS, Q_STRIDES_, REACH)
    row = lse_ptr + (batch * HEADS + head) * length
    if any_nan(row, first, length, REACH):
        for part in tl.range(0, REACH // QUERIES, num_stages=1):
            if any_nan(row, first + part * QUERIES, length, QUERIES):
                shifted_softmax(
                    q_ptr, k_ptrs, v_ptrs, q_ptr, k_ptrs, q_ptr, q_ptr, q_ptr, o_ptr, lse_ptr, log_ptr,
                    batch, head, i, first + part * QUERIES, length, q_stride, False, LENGTHS, K_STRIDES_, V_STRIDES_, V_AT,
                    HEADS, 1, WIDTH, SCALE, (False,) * len(k_ptrs), False, 0, "ieee", False, LOGS, QUERIES, KEYS, COLS, None,
                )  # fmt: skip


@triton.jit
def any_nan(ptr, first, length, SIZE: tl.constexpr):
    at = first + tl.arange(0, SIZE)
    x = tl.load(ptr + at, mask=at < length, other=0.0)
    return tl.max((x != x).to(tl.int32), 0) != 0


@triton.jit
def joint_attention_fwd_body(
    q_ptrs,  # (B, L_s, H, d) per stream, tokens a stride apart
    k_ptrs,  # (B, L_s, H / GROUP, d), likewise
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
    GROUP,  # heads of q that share one of k and v
    WIDTH,  # d
    SCALE,  # softmax scale, in base 2 times log2(e); 1 where q has been multiplied by it
    KEY_MASKS_,  # per stream, whether it has a key mask
    CAUSAL,
    MASKED,
    PRECISION,
    EXACT,  # base e and exponentials within an ulp
    LOGS,  # whether log_ptrs are wanted
    SHIFTED,  # always a running maximum
    KEY_BLOCKS_,  # per stream, its blocks of KEYS keys, all loaded at once; 0: a loop over them
    QUERIES,
    KEYS,
    COLS,
    SHIFTED_QUERIES,  # of a block that turns out to need a running maximum
    SHIFTED_KEYS,
):
    """Grid (B * H * blocks of QUERIES tokens over all streams,)."""
    batch, head, block = place(LENGTHS, QUERIES, HEADS)
    i, q_ptr, length, q_stride, first = stream_of(block, q_ptrs, LENGTHS, Q_STRIDES_, QUERIES)
    o_ptr, lse_ptr, log_ptr, _ = outputs_of(block, o_ptrs, lse_ptrs, log_ptrs, LENGTHS, Q_STRIDES_, QUERIES)
    _, query_mask_ptr, _, query_masked, _ = stream_of(block, key_mask_ptrs, LENGTHS, KEY_MASKS_, QUERIES)
    if SHIFTED:
        shifted_softmax(
            q_ptr, k_ptrs, v_ptrs, query_mask_ptr, key_mask_ptrs, mask_ptr, rows_ptr, cols_ptr, o_ptr, lse_ptr, log_ptr,
            batch, head, i, first, length, q_stride, query_masked, LENGTHS, K_STRIDES_, V_STRIDES_, V_AT,
            HEADS, GROUP, WIDTH, SCALE, KEY_MASKS_, CAUSAL, MASKED, PRECISION, EXACT, LOGS, QUERIES, KEYS, COLS, None,
        )  # fmt: skip
    else:
        query, keep, q = load_queries(
            q_ptr + head * WIDTH, query_mask_ptr, batch, first, length, q_stride, query_masked,
            v_ptrs[0].dtype.element_ty, PRECISION, WIDTH, QUERIES, COLS,
        )  # fmt: skip
        busy = awake(keep, query_masked)
        by_dot: tl.constexpr = COLS <= 32
        acc = zero_head(QUERIES, COLS)
        total = tl.zeros((QUERIES, 8), tl.float32)
        keys = 0
        hidden = 0  # keys that do not count, but have added 1 to each sum
        for t in tl.static_range(len(k_ptrs)):
            keys += LENGTHS[t]
            k_ptr = k_ptrs[t] + head // GROUP * WIDTH
            v_ptr = v_ptrs[t] + head // GROUP * WIDTH + V_AT
            if KEY_BLOCKS_[t] > 0:
                ks, vs, uncounted = load_all_keys(
                    k_ptr, v_ptr, key_mask_ptrs[t], batch, LENGTHS[t], K_STRIDES_[t], V_STRIDES_[t],
                    PRECISION, WIDTH, KEY_MASKS_[t], KEY_BLOCKS_[t], KEYS, COLS,
                )  # fmt: skip
                hidden += uncounted
                for j in tl.static_range(KEY_BLOCKS_[t]):
                    acc, total = gather(
                        acc, total, q, ks[j], vs[j], None, query, j * KEYS, i, t, SCALE, CAUSAL, PRECISION, True, by_dot
                    )  # fmt: skip
            else:
                lead, end, real = kept_range(key_mask_ptrs[t], batch, LENGTHS[t], KEY_MASKS_[t])
                if CAUSAL:
                    end = tl.where(i == t, tl.minimum(end, first + QUERIES), end)
                end = end * busy
                if not CAUSAL:
                    hidden += tl.cdiv(end, KEYS) * KEYS - real * busy
                full = tl.minimum(lead, end) // KEYS * KEYS
                for start in range(0, full, KEYS):
                    k, v, kept_keys = load_keys(
                        k_ptr, v_ptr, key_mask_ptrs[t], batch, start, LENGTHS[t], K_STRIDES_[t], V_STRIDES_[t],
                        PRECISION, WIDTH, False, KEYS, COLS, False,
                    )  # fmt: skip
                    acc, total = gather(
                        acc, total, q, k, v, kept_keys, query, start, i, t, SCALE, CAUSAL, PRECISION, True, by_dot
                    )
                # The tail, and with a key mask all that follows the first masked key: one block if the mask is padding.
                for start in tl.range(full, end, KEYS, num_stages=1):
                    k, v, kept_keys = load_keys(
                        k_ptr, v_ptr, key_mask_ptrs[t], batch, start, LENGTHS[t], K_STRIDES_[t], V_STRIDES_[t],
                        PRECISION, WIDTH, KEY_MASKS_[t], KEYS, COLS, True,
                    )  # fmt: skip
                    acc, total = gather(
                        acc, total, q, k, v, kept_keys, query, start, i, t, SCALE, CAUSAL, PRECISION, False, by_dot
                    )
        sums = (tl.max(total, 1) if by_dot else tl.sum(total, 1)) - hidden
        if in_range(acc, sums, keep, keys, hidden, v_ptrs[0].dtype.element_ty == tl.float16):
            store_rows(
                acc, sums, tl.zeros_like(sums), keep, query, batch, head, length, o_ptr, lse_ptr, log_ptr,
                HEADS, WIDTH, EXACT, LOGS, COLS,
            )  # fmt: skip
        else:
            # Rare: small tiles that shape neither registers nor shared memory of the kernel.
            for part in tl.range(0, QUERIES // SHIFTED_QUERIES, num_stages=1):
                shifted_softmax(
                    q_ptr, k_ptrs, v_ptrs, query_mask_ptr, key_mask_ptrs, mask_ptr, rows_ptr, cols_ptr, o_ptr, lse_ptr, log_ptr,
                    batch, head, i, first + part * SHIFTED_QUERIES, length, q_stride, query_masked, LENGTHS, K_STRIDES_,
                    V_STRIDES_, V_AT, HEADS, GROUP, WIDTH, SCALE, KEY_MASKS_, CAUSAL, MASKED, PRECISION, EXACT, LOGS,
                    SHIFTED_QUERIES, SHIFTED_KEYS, COLS, 1,
                )  # fmt: skip
