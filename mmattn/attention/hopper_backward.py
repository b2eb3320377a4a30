"""Backward of joint attention on Hopper, in Gluon, for heads 64 wide: one pass over the scores, dq summed in memory.

A program takes tiles of 128 keys, one after the other, and walks all queries for each. One warp, the producer, claims tiles
and loads; two warpgroups, the consumers, hold dk and dv of 64 keys each and write their dS to shared memory, from where each
multiplies the dq of half of a block's queries (Shah et al. 2024, arXiv:2407.08608, FlashAttention-3). What one block's dS is
multiplied by runs while the next block's scores are taken.

Every tile adds its share to dq, in the order of the tiles, so that dq is the same to the bit every time: for each block of
queries of each head a lock counts the tiles that have been added. One warp waits for the locks and permits the consumers to
add, one sets them when the consumers have. A tile waits only for tiles that were claimed before it, by programs that run, so
that it ends however few programs the GPU holds at once.
"""

from __future__ import annotations

from .._gluon import (
    async_load,
    constexpr_function,
    fence_async_shared,
    gl,
    gluon,
    make_tensor_descriptor,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from .backward import PAD
from .hopper import descriptors, exponentials

WIDTH = gl.constexpr(64)  # of a head
ROWS = gl.constexpr(64)  # keys of a consumer, and queries whose dq it multiplies
CONSUMERS = gl.constexpr(2)
KEYS = gl.constexpr(128)  # of a tile
QUERIES = gl.constexpr(128)  # of a block
STAGES = gl.constexpr(3)  # blocks of queries in shared memory
AHEAD = gl.constexpr(4)  # blocks whose addition to dq may be under way; `>> 2` divides by it
TOGETHER = gl.constexpr(32)  # heads whose tiles of keys take turns: programs that run at once seldom wait for one another
CONSUMER_REGISTERS = gl.constexpr(240)
OTHER_REGISTERS = gl.constexpr(24)


@gluon.jit
def meet(x):
    """Wait until both consumers are here. As elementwise assembly it needs some x; barriers from 8 on Triton leaves alone."""
    gl.inline_asm_elementwise("bar.sync 8, 256; mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def await_lock(lock, count):
    """Wait until `count` tiles of keys have been added to the lock's block of dq. All but the last look are relaxed: one that
    acquires empties the first cache."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; AGAIN: ld.relaxed.gpu.global.b32 $0, [$1]; setp.lt.s32 p, $0, $2; @p bra AGAIN; "
        "ld.acquire.gpu.global.b32 $0, [$1]; }",
        "=&r,l,r", [lock.to(gl.int64), count], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def release_lock(lock, count):
    """Say that `count` tiles of keys have been added to the lock's block of dq."""
    gl.inline_asm_elementwise(
        "st.release.gpu.global.b32 [$1], $2; mov.b32 $0, $2;",
        "=r,l,r", [lock.to(gl.int64), count], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@constexpr_function
def addition(stride):
    """Assembly that adds what a thread holds of a [64, 64] product to rows a stride apart, or stores it as the first share.

    A thread's 32 numbers are pairs of columns: of row 0, of row 8, and so on 8 columns further. Only the first element of every
    other argument is read: the address, how many rows are left from the thread's first, and whether this share is the first.
    """
    groups = []
    for name, instruction in (("FIRST", "st.global.v2.f32"), ("MORE", "red.relaxed.gpu.global.add.v2.f32")):
        for row in (0, 8):
            pairs = [(column, 32 + column // 2 + row // 4) for column in range(0, 64, 8)]
            each = [f"{instruction} [$64 + {4 * (row * stride + column)}], {{${x}, ${x + 1}}};" for column, x in pairs]
            groups.append(f"{name}{row}: setp.le.s32 p, $96, {row}; @p bra {'ADDED' if row else name + '8'}; " + " ".join(each))
    first, more = " ".join(groups[:2]), " ".join(groups[2:])
    return f"{{ .reg .pred p; setp.eq.s32 p, $128, 0; @p bra MORE0; {first} bra ADDED; {more} ADDED: }}"


ADDITION_OPERANDS = gl.constexpr(",".join(["=r"] * 32 + ["f"] * 32 + ["l"] * 32 + ["r"] * 64))


@gluon.jit
def add(share, start, left, first, STRIDE: gl.constexpr):
    """Add a [64, 64] share to memory from the address `start` on, rows STRIDE apart of which `left` are there.

    Nobody else adds there meanwhile, so the order of the sum is that of the locks. The first share is stored.
    """
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, share.type.layout))
    cols = gl.arange(0, WIDTH, gl.SliceLayout(0, share.type.layout))
    at = start + 4 * (rows[:, None] * STRIDE + cols[None, :])
    here = (left - rows)[:, None] + gl.zeros_like(cols)[None, :]
    ASM: gl.constexpr = addition(STRIDE)
    gl.inline_asm_elementwise(
        ASM, ADDITION_OPERANDS, [share, at, here, first.to(gl.int32)], dtype=gl.int32, is_pure=False, pack=32
    )


@gluon.jit
def blocks_of(LENGTHS):
    """Blocks of queries of all streams; as many are the tiles of keys."""
    blocks = 0
    for t in gl.static_range(len(LENGTHS)):
        blocks += gl.cdiv(LENGTHS[t], QUERIES)
    return blocks


@gluon.jit
def key_tile(tile, LENGTHS, samples, HEADS: gl.constexpr):
    """Which (sample, head) pair a tile belongs to, and its number among the pair's tiles of keys; TOGETHER pairs take turns."""
    each = blocks_of(LENGTHS)
    group = tile // (TOGETHER * each)
    width = gl.minimum(TOGETHER, HEADS * samples - group * TOGETHER)
    rest = tile - group * (TOGETHER * each)
    return group * TOGETHER + rest % width, rest // width


@gluon.jit
def tiles(LENGTHS, samples, HEADS: gl.constexpr):
    """Tiles of keys of all samples and heads."""
    return blocks_of(LENGTHS) * HEADS * samples


@gluon.jit
def take(work, count, WARPS: gl.constexpr):
    """The program's tile number `count`, as the producer announced it; tiles() and more: there is none."""
    smem, full = work
    mbarrier.wait(full.index(count & 1), (count >> 1) & 1)
    return gl.max(smem.index(count & 1).load(gl.BlockedLayout([1], [32], [WARPS], [0])), 0)


@gluon.jit
def in_stream(block, ptrs, LENGTHS):
    """Pointer, length and first token of the block of 128 tokens number `block` of all streams."""
    ptr = ptrs[0]
    length = gl.to_tensor(LENGTHS[0])
    first = block * KEYS
    before = gl.cdiv(LENGTHS[0], KEYS)
    for t in gl.static_range(1, len(ptrs)):
        if block >= before:
            ptr = ptrs[t]
            length = gl.to_tensor(LENGTHS[t])
            first = (block - before) * KEYS
        before += gl.cdiv(LENGTHS[t], KEYS)
    return ptr, length, first


@gluon.jit
def add_dq(
    dq, order, at, block, first_tile, dq_starts, LENGTHS, DQ_SCALE: gl.constexpr, CONSUMER: gl.constexpr, STRIDE: gl.constexpr
):
    """Add this consumer's half of the share of dq of block number `at`, if block >= 0, when that is permitted."""
    permitted, added, _ = order
    there = block >= 0
    mbarrier.wait(permitted.index(at & (AHEAD - 1)), (at >> 2) & 1, pred=there)
    row = block * QUERIES
    to = dq_starts[0] + row.to(gl.int64) * (4 * STRIDE)
    left = LENGTHS[0] - row
    before = gl.cdiv(LENGTHS[0], QUERIES)
    for t in gl.static_range(1, len(LENGTHS)):  # selected without a branch, at which some ptxas crash while products run
        row = (block - before) * QUERIES
        to = gl.where(row >= 0, dq_starts[t] + row.to(gl.int64) * (4 * STRIDE), to)
        left = gl.where(row >= 0, LENGTHS[t] - row, left)
        before += gl.cdiv(LENGTHS[t], QUERIES)
    FIRST: gl.constexpr = CONSUMER * ROWS
    add(dq * DQ_SCALE, to + 4 * FIRST * STRIDE, gl.where(there, left - FIRST, 0), first_tile, STRIDE)
    mbarrier.arrive(added.index(at & (AHEAD - 1)), count=1, pred=there)


@gluon.jit
def start_dq(ds_smem, at, k, CONSUMER: gl.constexpr):
    """Start this consumer's half of dS k, of block number `at`."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    ds = ds_smem.index(at & 1).slice(CONSUMER * ROWS, ROWS, dim=1).permute([1, 0])
    return warpgroup_mma(ds, k, gl.zeros([ROWS, WIDTH], gl.float32, layout), use_acc=False, is_async=True)


@gluon.jit
def start_dk(ds_smem, at, q, dk, CONSUMER: gl.constexpr):
    """Start dk + dS^T q, of block number `at`."""
    return warpgroup_mma(ds_smem.index(at & 1).slice(CONSUMER * ROWS, ROWS), q, dk, is_async=True)


@gluon.jit
def shifted(s, minus_shift, SCALE: gl.constexpr):
    """s SCALE - shift, the exponent of a probability."""
    if SCALE == 1.0:
        return s + minus_shift
    else:
        return gl.fma(s, gl.full_like(s, SCALE), minus_shift.broadcast_to(s.shape))


@gluon.jit
def store_keys(x, ptr, at, left, STRIDE: gl.constexpr):
    """Store the gradient of 64 keys, of which `left` are there."""
    layout: gl.constexpr = x.type.layout
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    cols = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    gl.store(ptr + at + rows[:, None] * STRIDE + cols[None, :], x.to(ptr.dtype.element_ty), mask=(rows < left)[:, None])


@gluon.jit
def consume(
    work, key_smem, query_ring, ds_smem, order, dq_ptrs, dk_ptrs, dv_ptrs, LENGTHS, samples,
    CONSUMER: gl.constexpr, HEADS: gl.constexpr, SCALE: gl.constexpr, DQ_SCALE: gl.constexpr, DK_SCALE: gl.constexpr,
):  # fmt: skip
    """What a consumer does: dk and dv of 64 keys of every tile of the program, and its half of dq."""
    q_smem, do_smem, shift_smem, delta_smem, q_full, do_full, empty = query_ring
    k_smem, v_smem, keys_full, keys_empty = key_smem
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, QUERIES, 16])
    key_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, key_layout, 2)
    all_k = k_smem.reshape([KEYS, WIDTH])
    k = all_k.slice(CONSUMER * ROWS, ROWS)
    v = v_smem.reshape([KEYS, WIDTH]).slice(CONSUMER * ROWS, ROWS)
    blocks = blocks_of(LENGTHS)
    end = tiles(LENGTHS, samples, HEADS)
    at = 0  # blocks of queries so far
    count = 0
    tile = take(work, count, 4)
    while tile < end:
        pair, n = key_tile(tile, LENGTHS, samples, HEADS)
        dk_ptr, length, first_key = in_stream(n, dk_ptrs, LENGTHS)
        left = length - first_key - CONSUMER * ROWS
        dq_starts = ()
        for t in gl.static_range(len(LENGTHS)):
            token = (pair // HEADS).to(gl.int64) * LENGTHS[t]
            dq_starts = dq_starts + ((dq_ptrs[t] + (token * HEADS + pair % HEADS) * WIDTH).to(gl.int64),)
        dk = gl.zeros([ROWS, WIDTH], gl.float32, key_layout)
        dv = gl.zeros([ROWS, WIDTH], gl.float32, key_layout)
        # The first block finds a dS before it that adds nothing.
        meet(at)
        ds_smem.index((at + 1) & 1).slice(CONSUMER * ROWS, ROWS).store(gl.zeros([ROWS, QUERIES], gl.bfloat16, score_layout))
        fence_async_shared()
        meet(at)
        mbarrier.wait(keys_full, count & 1)
        for block in range(blocks):
            stage = at % STAGES
            phase = (at // STAGES) & 1
            before = (at + STAGES - 1) % STAGES
            q = q_smem.index(stage).reshape([QUERIES, WIDTH])
            do = do_smem.index(stage).reshape([QUERIES, WIDTH])
            nothing = gl.zeros([ROWS, QUERIES], gl.float32, score_layout)
            mbarrier.wait(q_full.index(stage), phase)
            dq = start_dq(ds_smem, at + 1, all_k, CONSUMER)
            scores = warpgroup_mma(k, q.permute([1, 0]), nothing, use_acc=False, is_async=True)
            q_before = q_smem.index(gl.where(block > 0, before, stage)).reshape([QUERIES, WIDTH])
            dk = start_dk(ds_smem, at + 1, q_before, dk, CONSUMER)
            share = warpgroup_mma_wait(2, [dq])
            add_dq(share, order, at - 1, block - 1, n == 0, dq_starts, LENGTHS, DQ_SCALE, CONSUMER, HEADS * WIDTH)
            mbarrier.wait(do_full.index(stage), phase)
            dp = warpgroup_mma(v, do.permute([1, 0]), nothing, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(2, [scores])
            minus_shift = shift_smem.index(stage).load(score_layout)
            p = exponentials(shifted(s, minus_shift, SCALE), 1.0)
            dv = warpgroup_mma(gl.convert_layout(p.to(gl.bfloat16), p_layout), do, dv, is_async=True)
            dp, dk = warpgroup_mma_wait(1, [dp, dk])
            minus_delta = delta_smem.index(stage).load(score_layout)
            mbarrier.arrive(empty.index(before), count=1, pred=block > 0)
            ds = p * (dp + minus_delta)
            if left < ROWS:  # keys behind the end are 0, but their P may be infinite, and 0 times that is not 0
                rows = gl.arange(0, ROWS, gl.SliceLayout(1, score_layout))
                ds = gl.where((rows < left)[:, None], ds, 0.0)
            ds_smem.index(at & 1).slice(CONSUMER * ROWS, ROWS).store(ds.to(gl.bfloat16))
            fence_async_shared()
            dv = warpgroup_mma_wait(0, [dv])
            meet(at)
            at += 1
        q_before = q_smem.index((at + STAGES - 1) % STAGES).reshape([QUERIES, WIDTH])
        dk = start_dk(ds_smem, at + 1, q_before, dk, CONSUMER)
        dq = start_dq(ds_smem, at + 1, all_k, CONSUMER)
        share, dk = warpgroup_mma_wait(0, [dq, dk])
        # Asked for once more, so that nothing of it takes registers in the loop.
        pair, n = key_tile(take(work, count, 4), LENGTHS, samples, HEADS)
        mbarrier.arrive(empty.index((at + STAGES - 1) % STAGES), count=1)
        mbarrier.arrive(keys_empty, count=1)
        add_dq(share, order, at - 1, blocks - 1, n == 0, dq_starts, LENGTHS, DQ_SCALE, CONSUMER, HEADS * WIDTH)
        dk_ptr, length, first_key = in_stream(n, dk_ptrs, LENGTHS)
        dv_ptr, _, _ = in_stream(n, dv_ptrs, LENGTHS)
        left = length - first_key - CONSUMER * ROWS
        batch = pair // HEADS
        head = pair % HEADS
        to = ((batch.to(gl.int64) * length + first_key + CONSUMER * ROWS) * HEADS + head) * WIDTH
        store_keys(dv, dv_ptr, to, left, HEADS * WIDTH)
        store_keys(dk * DK_SCALE, dk_ptr, to, left, HEADS * WIDTH)
        count += 1
        tile = take(work, count, 4)


@gluon.jit
def permit(work, order, locks_ptr, LENGTHS, samples, HEADS: gl.constexpr):
    """What one warp does: permits the consumers to add to a block of dq when the tiles before theirs have been added."""
    permitted, _, released = order
    blocks = blocks_of(LENGTHS)
    end = tiles(LENGTHS, samples, HEADS)
    at = 0
    count = 0
    tile = take(work, count, 1)
    while tile < end:
        pair, n = key_tile(tile, LENGTHS, samples, HEADS)
        for block in range(blocks):
            await_lock(locks_ptr + 1 + pair * blocks + block, n)
            mbarrier.wait(released.index(at & (AHEAD - 1)), ((at >> 2) & 1) ^ 1)
            mbarrier.arrive(permitted.index(at & (AHEAD - 1)), count=1)
            at += 1
        count += 1
        tile = take(work, count, 1)


@gluon.jit
def release(work, order, locks_ptr, LENGTHS, samples, HEADS: gl.constexpr):
    """What another warp does: says that a tile has been added to a block of dq."""
    _, added, released = order
    blocks = blocks_of(LENGTHS)
    end = tiles(LENGTHS, samples, HEADS)
    at = 0
    count = 0
    tile = take(work, count, 1)
    while tile < end:
        pair, n = key_tile(tile, LENGTHS, samples, HEADS)
        for block in range(blocks):
            mbarrier.wait(added.index(at & (AHEAD - 1)), (at >> 2) & 1)
            release_lock(locks_ptr + 1 + pair * blocks + block, n + 1)
            mbarrier.arrive(released.index(at & (AHEAD - 1)), count=1)
            at += 1
        count += 1
        tile = take(work, count, 1)


@gluon.jit
def statistics_views(ptrs, LENGTHS, rows, LAYOUT: gl.constexpr):
    """Per stream, what loads QUERIES numbers of a row of statistics."""
    views = ()
    for t in gl.static_range(len(ptrs)):
        padded = gl.cdiv(gl.to_tensor(LENGTHS[t]), PAD) * PAD
        views = views + (make_tensor_descriptor(ptrs[t], [rows, padded], [padded.to(gl.int64), 1], [1, QUERIES], LAYOUT),)
    return views


@gluon.jit
def produce(
    work, key_smem, query_ring, q_ptrs, k_ptrs, v_ptrs, do_ptrs, statistics_ptrs, locks_ptr, LENGTHS, samples,
    Q_STRIDES_, K_STRIDES_, V_STRIDES_, V_AT: gl.constexpr, HEADS: gl.constexpr,
):  # fmt: skip
    """What the producer does: claims tiles, and loads for each."""
    work_smem, work_full = work
    q_smem, do_smem, shift_smem, delta_smem, q_full, do_full, empty = query_ring
    k_smem, v_smem, keys_full, keys_empty = key_smem
    LAYOUT: gl.constexpr = q_smem.type.layout
    FLAT: gl.constexpr = shift_smem.type.layout
    DENSE: gl.constexpr = HEADS * WIDTH
    v_starts = ()
    dense = ()
    for t in gl.static_range(len(v_ptrs)):
        v_starts = v_starts + (v_ptrs[t] + V_AT,)
        dense = dense + (DENSE,)
    qs = descriptors(q_ptrs, LENGTHS, Q_STRIDES_, samples, HEADS, WIDTH, QUERIES, LAYOUT)
    dos = descriptors(do_ptrs, LENGTHS, dense, samples, HEADS, WIDTH, QUERIES, LAYOUT)
    ks = descriptors(k_ptrs, LENGTHS, K_STRIDES_, samples, HEADS, WIDTH, KEYS, LAYOUT)
    vs = descriptors(v_starts, LENGTHS, V_STRIDES_, samples, HEADS, WIDTH, KEYS, LAYOUT)
    statistics = statistics_views(statistics_ptrs, LENGTHS, 2 * HEADS * samples, FLAT)
    end = tiles(LENGTHS, samples, HEADS)
    at = 0
    count = 0
    tile = 0
    while tile < end:
        tile = gl.atomic_add(locks_ptr, 1, sem="relaxed")
        work_smem.index(count & 1).store(gl.full([1], tile, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))
        mbarrier.arrive(work_full.index(count & 1), count=1)
        if tile < end:
            pair, n = key_tile(tile, LENGTHS, samples, HEADS)
            batch = pair // HEADS
            column = pair % HEADS * WIDTH
            mbarrier.wait(keys_empty, (count & 1) ^ 1)
            mbarrier.expect(keys_full, 2 * KEYS * WIDTH * 2)
            for t in gl.static_range(len(LENGTHS)):
                here = gl.cdiv(LENGTHS[t], KEYS)
                mine = (n >= 0) & (n < here)
                async_load(ks[t], [batch, n * KEYS, column], keys_full, k_smem, pred=mine)
                async_load(vs[t], [batch, n * KEYS, column], keys_full, v_smem, pred=mine)
                n -= here
            for t in gl.static_range(len(LENGTHS)):
                for first in range(0, LENGTHS[t], QUERIES):
                    stage = at % STAGES
                    mbarrier.wait(empty.index(stage), ((at // STAGES) & 1) ^ 1)
                    mbarrier.expect(q_full.index(stage), QUERIES * (WIDTH * 2 + 4))
                    async_load(qs[t], [batch, first, column], q_full.index(stage), q_smem.index(stage))
                    async_load(statistics[t], [2 * pair, first], q_full.index(stage), shift_smem.index(stage))
                    mbarrier.expect(do_full.index(stage), QUERIES * (WIDTH * 2 + 4))
                    async_load(dos[t], [batch, first, column], do_full.index(stage), do_smem.index(stage))
                    async_load(statistics[t], [2 * pair + 1, first], do_full.index(stage), delta_smem.index(stage))
                    at += 1
        count += 1


@gluon.jit
def barriers(SIZE: gl.constexpr, COUNT: gl.constexpr):
    """SIZE barriers of COUNT arrivals each."""
    each = gl.allocate_shared_memory(gl.int64, [SIZE, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SIZE):
        mbarrier.init(each.index(i), count=COUNT)
    return each


@gluon.jit
def joint_attention_hopper_bwd_body(
    q_ptrs,  # (B, L_s, H, d) per stream, tokens a stride apart, bfloat16
    k_ptrs,  # likewise
    v_ptrs,  # likewise
    do_ptrs,  # (B, L_s, H, d)
    statistics_ptrs,  # (B, H, 2, padded L_s) float32: minus lse in base 2, and minus delta
    zeros_ptr,  # locks_ptr again
    dq_ptrs,  # (B, L_s, H, d) float32
    dk_ptrs,  # (B, L_s, H, d)
    dv_ptrs,  # (B, L_s, H, d)
    locks_ptr,  # (1 + B * H * blocks of queries,) int32, 0: tiles claimed, and of each block of dq how many were added
    LENGTHS,
    SAMPLES,  # B, as often as there are streams
    Q_STRIDES_,
    K_STRIDES_,
    V_STRIDES_,
    V_AT,  # where v starts in a packed projection
    HEADS,
    SCALE,  # softmax scale times log2(e); 1 where q has been multiplied by it
    DQ_SCALE,  # of dS k
    DK_SCALE,  # of dS^T q
):
    """Grid (programs that the GPU holds at once,), 4 warps, to which warp_specialize adds the others."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=3)
    FLAT: gl.constexpr = gl.NVMMASharedLayout(0, 32, rank=2)
    work_smem = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    work = (work_smem, barriers(2, 1))
    key_smem = (
        gl.allocate_shared_memory(gl.bfloat16, [1, KEYS, WIDTH], LAYOUT),
        gl.allocate_shared_memory(gl.bfloat16, [1, KEYS, WIDTH], LAYOUT),
        barriers(1, 1).index(0),
        barriers(1, CONSUMERS).index(0),
    )
    query_ring = (
        gl.allocate_shared_memory(gl.bfloat16, [STAGES, 1, QUERIES, WIDTH], LAYOUT),
        gl.allocate_shared_memory(gl.bfloat16, [STAGES, 1, QUERIES, WIDTH], LAYOUT),
        gl.allocate_shared_memory(gl.float32, [STAGES, 1, QUERIES], FLAT),
        gl.allocate_shared_memory(gl.float32, [STAGES, 1, QUERIES], FLAT),
        barriers(STAGES, 1),
        barriers(STAGES, 1),
        barriers(STAGES, CONSUMERS),
    )
    ds_smem = gl.allocate_shared_memory(gl.bfloat16, [2, KEYS, QUERIES], gl.NVMMASharedLayout(128, 16, rank=2))
    order = (barriers(AHEAD, 1), barriers(AHEAD, CONSUMERS), barriers(AHEAD, 1))
    gl.warp_specialize(
        [
            (consume, (work, key_smem, query_ring, ds_smem, order, dq_ptrs, dk_ptrs, dv_ptrs, LENGTHS, SAMPLES[0],
                0, HEADS, SCALE, DQ_SCALE, DK_SCALE)),
            (consume, (work, key_smem, query_ring, ds_smem, order, dq_ptrs, dk_ptrs, dv_ptrs, LENGTHS, SAMPLES[0],
                1, HEADS, SCALE, DQ_SCALE, DK_SCALE)),
            (produce, (work, key_smem, query_ring, q_ptrs, k_ptrs, v_ptrs, do_ptrs, statistics_ptrs, locks_ptr, LENGTHS,
                SAMPLES[0], Q_STRIDES_, K_STRIDES_, V_STRIDES_, V_AT, HEADS)),
            (permit, (work, order, locks_ptr, LENGTHS, SAMPLES[0], HEADS)),
            (release, (work, order, locks_ptr, LENGTHS, SAMPLES[0], HEADS)),
        ],
        [4, 1, 1, 1],
        [CONSUMER_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS],
    )  # fmt: skip
