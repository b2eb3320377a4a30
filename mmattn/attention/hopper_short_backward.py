"""Backward of short joint sequences on Hopper, in Gluon: `single_pass`, with products in flight.

What a score needs of its row rides along in columns, as there. Triton waits for every product as soon as it has been issued;
here, while a step takes exponentials, the products of the step before it are still running, and its own scores were among
them. A program walks heads and, where there is room, copies the next one to shared memory meanwhile. Blocks of keys are a loop,
since code that is straight for all of a head is slower than waiting at the end of each; dq of all blocks of queries stays in
registers, dk and dv of one block of keys. Which tokens count is loaded one head earlier than the head itself, so that no copy
waits for a mask, and lies in shared memory beside it.

dS, which has keys in its rows, is the left operand of dk as it is, and of dq transposed: for that it goes through shared memory
and comes back to registers. wgmma could read it there, but a fence for it takes longer than a barrier of four warps.
"""

from __future__ import annotations

from .._gluon import (
    INSTALLED,
    await_copies,
    commit_copies,
    copy_async,
    fence_async_shared,
    gl,
    gluon,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from .._triton import triton
from .hopper import exponentials, ones_at
from .tokens import EMPTY

ROWS = gl.constexpr(64)  # tokens of a block: what one wgmma multiplies
WIDTH = gl.constexpr(16)  # of a head, and of rows of parts
if INSTALLED:
    CHUNKS = gl.constexpr(gl.BlockedLayout([1, 8], [16, 2], [4, 1], [1, 0]))  # of a tile, 16 bytes a thread
    HEAD = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16]))  # of a product that is a tile
    LEFT = gl.constexpr(gl.DotOperandLayout(0, HEAD, 2))  # of its left operand
    SQUARE = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
    TILE = gl.constexpr(gl.NVMMASharedLayout(32, 16, rank=2))
    SQUARE_TILE = gl.constexpr(gl.NVMMASharedLayout(128, 16, rank=2))
    # HEAD with four neighbours a thread, so that four threads store a row, a whole sector of memory; products leave two a thread.
    STORED = gl.constexpr(
        gl.DistributedLinearLayout(
            reg_bases=[[0, 1], [0, 2], [8, 0]],
            lane_bases=[[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
            warp_bases=[[16, 0], [32, 0]],
            block_bases=[],
            shape=[64, 16],
        )
    )


@triton.constexpr_function
def total(xs):
    """The sum of a tuple of constants."""
    return sum(xs)


@gluon.jit
def with_columns(x, number, FIRST: gl.constexpr):
    """x [ROWS, WIDTH] bfloat16, its columns FIRST to FIRST + 2 replaced by three parts of `number` [ROWS]."""
    cols = gl.arange(0, WIDTH, gl.SliceLayout(0, x.type.layout))[None, :]
    for i in gl.static_range(3):
        part = number.to(x.dtype)
        number -= part.to(gl.float32)
        x = gl.where(cols == FIRST + i, part[:, None], x)
    return x


@gluon.jit
def kept(unit, end, key_mask_ptrs, LENGTHS, HEADS: gl.constexpr, KEY_MASKS_, BLOCKS_):
    """Which tokens of a head's blocks count."""
    keeps = ()
    batch = (unit // HEADS).to(gl.int64)
    for i in gl.static_range(len(LENGTHS)):
        for b in gl.static_range(BLOCKS_[i]):
            token = b * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, CHUNKS))
            keep = (token < LENGTHS[i]) & (unit < end)
            if KEY_MASKS_[i]:
                keep = keep & (gl.load(key_mask_ptrs[i] + batch * LENGTHS[i] + token, mask=keep, other=0) != 0)
            keeps = keeps + (keep,)
    return keeps


@gluon.jit
def copy_tile(smem, ptr, batch, head, first, length, stride: gl.constexpr, keep):
    """Start to copy 64 tokens of a head; those that do not count read as 0."""
    token = first + gl.arange(0, ROWS, gl.SliceLayout(1, CHUNKS))
    cols = gl.arange(0, WIDTH, gl.SliceLayout(0, CHUNKS))
    at = ptr + batch * length * stride + head * WIDTH
    copy_async(smem, at + token[:, None] * stride + cols[None, :], keep[:, None])


@gluon.jit
def fetch(
    unit, keeps, slot, smem, q_ptrs, k_ptrs, v_ptrs, o_ptrs, do_ptrs, lse_ptrs, dlse_ptrs, LENGTHS,
    Q_STRIDES_, K_STRIDES_, V_STRIDES_, V_AT: gl.constexpr, HEADS: gl.constexpr, SHIFTED: gl.constexpr, BLOCKS_,
):  # fmt: skip
    """Start to copy a head, of which `keeps` says what counts, to shared memory; lse and dlse of its blocks."""
    q_smem, k_smem, v_smem, do_smem, o_smem, _, _, real_smem = smem
    row_stride: gl.constexpr = HEADS * WIDTH
    head = unit % HEADS
    batch = (unit // HEADS).to(gl.int64)
    lse, dlse = (), ()
    for i in gl.static_range(len(q_ptrs)):
        for b in gl.static_range(BLOCKS_[i]):
            at = slot * o_smem.shape[0] + len(lse)
            keep = keeps[len(lse)]
            real_smem.index(at).store(keep.to(gl.int32))
            # k first: without AHEAD these copies go where the head before lay. Warps read k from shared memory themselves, so
            # that the compiler puts a barrier before it; of what wgmma alone reads it takes a warp's wait for everyone's.
            copy_tile(k_smem.index(at), k_ptrs[i], batch, head, b * ROWS, LENGTHS[i], K_STRIDES_[i], keep)
            copy_tile(q_smem.index(at), q_ptrs[i], batch, head, b * ROWS, LENGTHS[i], Q_STRIDES_[i], keep)
            copy_tile(v_smem.index(at), v_ptrs[i] + V_AT, batch, head, b * ROWS, LENGTHS[i], V_STRIDES_[i], keep)
            copy_tile(do_smem.index(at), do_ptrs[i], batch, head, b * ROWS, LENGTHS[i], row_stride, keep)
            copy_tile(o_smem.index(len(lse)), o_ptrs[i], batch, head, b * ROWS, LENGTHS[i], row_stride, keep)
            row = b * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, CHUNKS))
            line = (batch * HEADS + head) * LENGTHS[i]
            lse = lse + (gl.load(lse_ptrs[i] + line + row, mask=keep, other=EMPTY),)
            if SHIFTED:
                dlse = dlse + (gl.load(dlse_ptrs[i] + line + row, mask=keep, other=0.0),)
    commit_copies()
    return lse, dlse


@gluon.jit
def zero_of(x):
    """0, of which LLVM does not know it. Addresses with it in them are made anew for every step, which is cheap, where LLVM
    would make all of them once and keep them in registers."""
    return gl.inline_asm_elementwise("mov.b32 $0, 0;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def queries_of(tiles, at, step: gl.constexpr, QUERIES: gl.constexpr):
    """The queries of a step, of tiles that begin with number `at`."""
    return tiles.index(at + step * QUERIES // ROWS).slice(step * QUERIES % ROWS, QUERIES)


@gluon.jit
def start_scores(x, ones, y, rows):
    """Start x y^T plus what the columns of `rows` are the parts of [keys, queries]."""
    QUERIES: gl.constexpr = y.shape[0]
    nothing = gl.zeros([ROWS, QUERIES], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, QUERIES, 16]))
    z = warpgroup_mma(x, y.permute([1, 0]), nothing, use_acc=False, is_async=True)
    return warpgroup_mma(ones, rows.permute([1, 0]), z, is_async=True)


@gluon.jit
def replaced(xs, at: gl.constexpr, x):
    """The tuple xs with x in place `at`."""
    new = ()
    for i in gl.static_range(len(xs)):
        new = new + ((x if i == at else xs[i]),)
    return new


@gluon.jit
def stream_of(block, ptrs, LENGTHS, BLOCKS_):
    """Of the stream that has the block of this number: its pointer and length, and the block's first token."""
    ptr = ptrs[0]
    length = gl.to_tensor(LENGTHS[0])
    first = gl.to_tensor(block) * ROWS
    before = 0
    for t in gl.static_range(1, len(ptrs)):
        before += BLOCKS_[t - 1]
        if block >= before:
            ptr = ptrs[t]
            length = gl.to_tensor(LENGTHS[t])
            first = (block - before) * ROWS
    return ptr, length, first


@gluon.jit
def store_tokens(block, x, batch, head, ptrs, LENGTHS, HEADS: gl.constexpr, BLOCKS_):
    """Store a block of 64 tokens of a head."""
    ptr, length, first = stream_of(block, ptrs, LENGTHS, BLOCKS_)
    x = gl.convert_layout(x.to(ptr.dtype.element_ty), STORED)
    token = first + gl.arange(0, ROWS, gl.SliceLayout(1, STORED))
    cols = gl.arange(0, WIDTH, gl.SliceLayout(0, STORED))
    at = ptr + batch * length * (HEADS * WIDTH) + head * WIDTH
    mask = (token < length)[:, None]
    gl.store(at + token[:, None] * (HEADS * WIDTH) + cols[None, :], x, mask=mask)


@gluon.jit
def keys_of(k, v, real, QUERIES: gl.constexpr):
    """Left operands of the products with a block of keys: k, v and ones."""
    layout: gl.constexpr = gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, QUERIES, 16]), 2)
    real = real.load(gl.SliceLayout(1, layout)) != 0
    return k.load(layout), v.load(layout), ones_at(real, 0), ones_at(real, 3)


@gluon.jit
def key_block(j, s, dp, dq, keys, slot, smem, SCALE: gl.constexpr, QUERIES: gl.constexpr):
    """dk and dv of block j of keys, dq increased by its part. s and dP of its first step come along, the next block's go out."""
    q_smem, k_smem, v_smem, do_smem, o_smem, rows_smem, ds_smem, real_smem = smem
    N: gl.constexpr = o_smem.shape[0]
    STEPS: gl.constexpr = N * ROWS // QUERIES
    k, v, shift_ones, delta_ones = keys
    dk = gl.zeros([ROWS, WIDTH], gl.float32, HEAD)
    dv = gl.zeros([ROWS, WIDTH], gl.float32, HEAD)
    before = ()
    for step in gl.static_range(STEPS):
        z = zero_of(slot)
        at = z + slot * N
        if step + 1 == STEPS:  # the last block's next one is itself: products that nobody waits for long
            n = gl.minimum(j + 1, N - 1)
            k, v, shift_ones, delta_ones = keys_of(k_smem.index(at + n), v_smem.index(at + n), real_smem.index(at + n), QUERIES)
        next_q = queries_of(q_smem, at, (step + 1) % STEPS, QUERIES)
        next_do = queries_of(do_smem, at, (step + 1) % STEPS, QUERIES)
        next_rows = queries_of(rows_smem, z, (step + 1) % STEPS, QUERIES)
        p = exponentials(s, SCALE)
        left = gl.convert_layout(p.to(gl.bfloat16), LEFT)
        running = [dv, dk, dq[(step * QUERIES // ROWS + N - 1) % N], dp, left]
        if step + 1 == STEPS:
            # The operands wait too: if one were made while products are in flight, ptxas would have all wait for one another.
            dv, dk, done, dp, left, k, v, shift_ones, delta_ones = warpgroup_mma_wait(0, running + [k, v, shift_ones, delta_ones])
            keys = (k, v, shift_ones, delta_ones)
        else:
            dv, dk, done, dp, left = warpgroup_mma_wait(0, running)
        dq = replaced(dq, (step * QUERIES // ROWS + N - 1) % N, done)
        dv = warpgroup_mma(left, queries_of(do_smem, at, step, QUERIES), dv, use_acc=step > 0, is_async=True)
        ds = (p * dp).to(gl.bfloat16)
        dk = warpgroup_mma(
            gl.convert_layout(ds, LEFT), queries_of(q_smem, at, step, QUERIES), dk, use_acc=step > 0, is_async=True
        )
        before = before + (ds,)
        if (step + 1) * QUERIES % ROWS == 0:
            there = ds_smem.index(z)
            if QUERIES < ROWS:
                ds = gl.join(before[step - 1], ds).permute([0, 2, 1]).reshape([ROWS, ROWS])
            there.store(gl.convert_layout(ds, SQUARE))
        scores = start_scores(k, shift_ones, next_q, next_rows)
        dp = start_scores(v, delta_ones, next_do, next_rows)
        if (step + 1) * QUERIES % ROWS == 0:
            right = there.permute([1, 0]).load(LEFT)
            s = warpgroup_mma_wait(2, [scores])
            more = warpgroup_mma(right, k_smem.index(at + j), dq[step * QUERIES // ROWS], is_async=True)
            dq = replaced(dq, step * QUERIES // ROWS, more)
        else:
            s = warpgroup_mma_wait(2, [scores])
    dv, dk, done, dp = warpgroup_mma_wait(0, [dv, dk, dq[N - 1], dp])
    return s, dp, dk, dv, replaced(dq, N - 1, done), keys


@gluon.jit
def gradients(
    batch, head, slot, smem, dq_ptrs, dk_ptrs, dv_ptrs, LENGTHS, HEADS: gl.constexpr, SCALE: gl.constexpr,
    DQ_SCALE: gl.constexpr, DK_SCALE: gl.constexpr, KEY_MASKS_, BLOCKS_, QUERIES: gl.constexpr,
):  # fmt: skip
    """dq, dk and dv of a head that is in shared memory."""
    q_smem, k_smem, v_smem, do_smem, o_smem, rows_smem, _, real_smem = smem
    N: gl.constexpr = o_smem.shape[0]
    dq = ()
    for _ in gl.static_range(N):
        dq = dq + (gl.zeros([ROWS, WIDTH], gl.float32, HEAD),)
    z = zero_of(slot)
    at = z + slot * N
    keys = keys_of(k_smem.index(at), v_smem.index(at), real_smem.index(at), QUERIES)
    rows = queries_of(rows_smem, z, 0, QUERIES)
    s = start_scores(keys[0], keys[2], queries_of(q_smem, at, 0, QUERIES), rows)
    dp = start_scores(keys[1], keys[3], queries_of(do_smem, at, 0, QUERIES), rows)
    s, dp = warpgroup_mma_wait(0, [s, dp])
    for j in range(N):
        s, dp, dk, dv, dq, keys = key_block(j, s, dp, dq, keys, slot, smem, SCALE, QUERIES)
        store_tokens(j, dk * DK_SCALE, batch, head, dk_ptrs, LENGTHS, HEADS, BLOCKS_)
        if total(KEY_MASKS_) > 0:  # a silenced key has P = 1
            real = real_smem.index(zero_of(slot) + slot * N + j).load(gl.SliceLayout(1, HEAD)) != 0
            dv = gl.where(real[:, None], dv, 0.0)
        store_tokens(j, dv, batch, head, dv_ptrs, LENGTHS, HEADS, BLOCKS_)
    for i in gl.static_range(N):
        store_tokens(i, dq[i] * DQ_SCALE, batch, head, dq_ptrs, LENGTHS, HEADS, BLOCKS_)


@gluon.jit
def joint_attention_hopper_short_bwd_body(
    q_ptrs,  # (B, L_s, H, 16) per stream, tokens a stride apart, bfloat16
    k_ptrs,  # likewise
    v_ptrs,  # likewise
    key_mask_ptrs,  # (B, L_s) bool
    o_ptrs,  # (B, L_s, H, 16)
    do_ptrs,  # (B, L_s, H, 16)
    lse_ptrs,  # (B, H, L_s) float32, base 2
    dlse_ptrs,  # (B, H, L_s) float32
    dq_ptrs,  # (B, L_s, H, 16)
    dk_ptrs,  # (B, L_s, H, 16)
    dv_ptrs,  # (B, L_s, H, 16)
    LENGTHS,
    SAMPLES,  # B, as often as there are streams
    Q_STRIDES_,
    K_STRIDES_,
    V_STRIDES_,
    V_AT,  # where v starts in a packed projection
    HEADS,
    SCALE,  # softmax scale times log2(e); 1 where q has been multiplied by it
    KEY_MASKS_,  # per stream, whether it has a key mask
    SHIFTED,  # whether dlse is given
    DQ_SCALE,  # of dS k
    DK_SCALE,  # of dS^T q
    BLOCKS_,  # blocks of 64 tokens in each stream
    QUERIES,  # of a step: a block, or half of one
    AHEAD,  # whether the next head is copied while one is computed
):
    """Grid (programs that the GPU holds at once,)."""
    TOTAL: gl.constexpr = total(BLOCKS_)
    SLOTS: gl.constexpr = 2 if AHEAD else 1
    q_smem = gl.allocate_shared_memory(gl.bfloat16, [SLOTS * TOTAL, ROWS, WIDTH], TILE)
    k_smem = gl.allocate_shared_memory(gl.bfloat16, [SLOTS * TOTAL, ROWS, WIDTH], TILE)
    v_smem = gl.allocate_shared_memory(gl.bfloat16, [SLOTS * TOTAL, ROWS, WIDTH], TILE)
    do_smem = gl.allocate_shared_memory(gl.bfloat16, [SLOTS * TOTAL, ROWS, WIDTH], TILE)
    o_smem = gl.allocate_shared_memory(gl.bfloat16, [TOTAL, ROWS, WIDTH], TILE)
    rows_smem = gl.allocate_shared_memory(gl.bfloat16, [TOTAL, ROWS, WIDTH], TILE) if AHEAD else o_smem
    ds_smem = gl.allocate_shared_memory(gl.bfloat16, [1, ROWS, ROWS], SQUARE_TILE)
    real_smem = gl.allocate_shared_memory(gl.int32, [SLOTS * TOTAL, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    smem = (q_smem, k_smem, v_smem, do_smem, o_smem, rows_smem, ds_smem, real_smem)
    end = SAMPLES[0] * HEADS
    slot = 0
    programs = gl.num_programs(0)
    keeps = kept(gl.program_id(0), end, key_mask_ptrs, LENGTHS, HEADS, KEY_MASKS_, BLOCKS_)
    if AHEAD:
        lse, dlse = fetch(
            gl.program_id(0), keeps, slot, smem, q_ptrs, k_ptrs, v_ptrs, o_ptrs, do_ptrs, lse_ptrs, dlse_ptrs, LENGTHS,
            Q_STRIDES_, K_STRIDES_, V_STRIDES_, V_AT, HEADS, SHIFTED, BLOCKS_,
        )  # fmt: skip
        keeps = kept(gl.program_id(0) + programs, end, key_mask_ptrs, LENGTHS, HEADS, KEY_MASKS_, BLOCKS_)
    for unit in range(gl.program_id(0), end, programs):
        if not AHEAD:
            lse, dlse = fetch(
                unit, keeps, slot, smem, q_ptrs, k_ptrs, v_ptrs, o_ptrs, do_ptrs, lse_ptrs, dlse_ptrs, LENGTHS,
                Q_STRIDES_, K_STRIDES_, V_STRIDES_, V_AT, HEADS, SHIFTED, BLOCKS_,
            )  # fmt: skip
        await_copies(0)
        arrived = ()
        for b in gl.static_range(TOTAL):
            o = o_smem.index(b).load(CHUNKS)
            do = do_smem.index(slot * TOTAL + b).load(CHUNKS)
            delta = gl.sum(o.to(gl.float32) * do.to(gl.float32), 1)
            if SHIFTED:
                delta -= dlse[b]
            empty = lse[b] == EMPTY
            rows = with_columns(gl.zeros_like(o), gl.where(empty, -1e30, lse[b] * (-1.0 / SCALE)), 0)
            arrived = arrived + (with_columns(rows, gl.where(empty, 0.0, -delta), 3),)
        for b in gl.static_range(TOTAL):
            rows_smem.index(b).store(arrived[b])
        fence_async_shared()
        if AHEAD:
            lse, dlse = fetch(
                unit + programs, keeps, slot ^ 1, smem, q_ptrs, k_ptrs, v_ptrs, o_ptrs, do_ptrs, lse_ptrs,
                dlse_ptrs, LENGTHS, Q_STRIDES_, K_STRIDES_, V_STRIDES_, V_AT, HEADS, SHIFTED, BLOCKS_,
            )  # fmt: skip
        # Which tokens count is known before it is asked for: a copy does not wait for a mask.
        keeps = kept(unit + (2 if AHEAD else 1) * programs, end, key_mask_ptrs, LENGTHS, HEADS, KEY_MASKS_, BLOCKS_)
        gradients(
            (unit // HEADS).to(gl.int64), unit % HEADS, slot, smem, dq_ptrs, dk_ptrs, dv_ptrs, LENGTHS,
            HEADS, SCALE, DQ_SCALE, DK_SCALE, KEY_MASKS_, BLOCKS_, QUERIES,
        )  # fmt: skip
        if AHEAD:
            slot ^= 1
