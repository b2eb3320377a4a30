"""Backward of joint attention on Hopper, in Gluon: one pass over the scores, dq summed in memory.

A program takes tiles of 128 keys, one after the other, and walks all queries for each. Warps have roles. One, the producer,
claims tiles and loads. Two warpgroups, the key side, hold dk and dv of 64 keys each and write their dS to shared memory. A
third, the query side, multiplies it into the tile's share of dq, so that the other two meet at no block (Shah et al. 2024,
arXiv:2407.08608, FlashAttention-3, whose warpgroups do).

The tensor cores add lse to the scores and delta to dP, as three numbers of bfloat16 each, which hold the 24 bits of a float32,
times ones: so they take no loads, no additions and hardly a register, and with ones for real keys alone nothing is masked.

The tensor memory accelerator adds the shares to dq, and every block of dq is added to in the order of its tiles, so that dq is
the same to the bit every time: for each block of queries of each head a lock counts the tiles that have been added. One warp
waits for the locks, one has the accelerator add, one sets the locks. A tile waits only for tiles that were claimed before it,
by programs that run, so that it ends however few programs the GPU holds at once.
"""

from __future__ import annotations

from .._gluon import (
    async_add,
    async_load,
    async_store,
    fence_async_shared,
    gl,
    gluon,
    make_tensor_descriptor,
    mbarrier,
    store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from .backward import PAD, PARTS
from .hopper import announce, await_empty, await_full, barriers, blocks_of, descriptors, exponentials, ones_at, release, ring

ROWS = gl.constexpr(64)  # keys of a warpgroup: what one wgmma multiplies
KEYS = gl.constexpr(128)  # of a tile
STAGES = gl.constexpr(3)  # blocks of queries in shared memory
SLOTS = gl.constexpr(2)  # of what roles hand to one another: tiles, dS, shares of dq
AHEAD = gl.constexpr(4)  # blocks by which permits to add to dq may be ahead of what is counted as added
# Columns of all heads whose tiles of keys take turns: enough heads that programs seldom wait for one another, few enough that
# what they read and add to stays in the second cache.
TOGETHER = gl.constexpr(512)
ROLES = gl.constexpr(6)  # that read which tiles there are
KEY_REGISTERS = gl.constexpr(208)  # of a thread; the first warpgroup gets what the others leave, which must be as many
QUERY_REGISTERS = gl.constexpr(72)
OTHER_REGISTERS = gl.constexpr(24)


@gluon.jit
def await_lock(lock, count):
    """Wait until `count` tiles of keys have been added to the lock's block of dq. All but the last look are relaxed: one that
    acquires empties the first cache."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; AGAIN: ld.relaxed.gpu.global.b32 $0, [$1]; setp.lt.s32 p, $0, $2; @p bra AGAIN; "
        "ld.acquire.gpu.global.b32 $0, [$1]; fence.proxy.async.global; }",
        "=&r,l,r", [lock.to(gl.int64), count], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def set_lock(lock, count):
    """Say that `count` tiles of keys have been added to the lock's block of dq."""
    gl.inline_asm_elementwise(
        "st.release.gpu.global.b32 [$1], $2; mov.b32 $0, $2;",
        "=r,l,r", [lock.to(gl.int64), count], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def await_additions(LEFT: gl.constexpr, x):
    """Wait until all but LEFT of this warp's additions have been made: Triton's `store_wait` is for shared memory to be read.

    As elementwise assembly it needs some x."""
    gl.inline_asm_elementwise(
        f"cp.async.bulk.wait_group {LEFT}; bar.warp.sync -1; mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def each(LENGTHS, x):
    """x for each stream."""
    xs = ()
    for _ in gl.static_range(len(LENGTHS)):
        xs = xs + (x,)
    return xs


@gluon.jit
def tiles(LENGTHS, samples, HEADS: gl.constexpr):
    """Tiles of keys of all samples and heads."""
    return blocks_of(LENGTHS, KEYS) * HEADS * samples


@gluon.jit
def key_tile(tile, LENGTHS, samples, HEADS: gl.constexpr, WIDTH: gl.constexpr):
    """Which (sample, head) pair a tile belongs to, and its number among the pair's tiles of keys; pairs take turns."""
    PAIRS: gl.constexpr = TOGETHER // WIDTH
    tiles_each = blocks_of(LENGTHS, KEYS)
    group = tile // (PAIRS * tiles_each)
    turns = gl.minimum(PAIRS, HEADS * samples - group * PAIRS)
    rest = tile - group * (PAIRS * tiles_each)
    return group * PAIRS + rest % turns, rest // turns


@gluon.jit
def take(work, count, WARPS: gl.constexpr):
    """The program's tile number `count`, as the producer announced it; tiles() and more: there is none."""
    await_full(work, count)
    return gl.max(work[0].index(count % SLOTS).load(gl.BlockedLayout([1], [32], [WARPS], [0])), 0)


@gluon.jit
def of_stream(tile, xs, LENGTHS):
    """The one of xs, one for each stream, whose stream has the tile of keys number `tile` of all streams."""
    x = gl.to_tensor(xs[0])
    before = gl.cdiv(LENGTHS[0], KEYS)
    for t in gl.static_range(1, len(xs)):
        if tile >= before:
            x = gl.to_tensor(xs[t])
        before += gl.cdiv(LENGTHS[t], KEYS)
    return x


@gluon.jit
def first_key(tile, LENGTHS):
    """The first token, in its stream, of the tile of keys number `tile` of all streams."""
    first = tile * KEYS
    before = gl.cdiv(LENGTHS[0], KEYS)
    for t in gl.static_range(1, len(LENGTHS)):
        if tile >= before:
            first = (tile - before) * KEYS
        before += gl.cdiv(LENGTHS[t], KEYS)
    return first


@gluon.jit
def store_keys(x, ptr, at, left, STRIDE: gl.constexpr):
    """Store the gradient of 64 keys, of which `left` are there."""
    layout: gl.constexpr = x.type.layout
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    cols = gl.arange(0, x.shape[1], gl.SliceLayout(0, layout))
    gl.store(ptr + at + rows[:, None] * STRIDE + cols[None, :], x.to(ptr.dtype.element_ty), mask=(rows < left)[:, None])


@gluon.jit
def half_of_keys(ring, count, HALF: gl.constexpr, LAYOUT: gl.constexpr):
    """64 keys [ROWS, WIDTH] of the program's tile number `count`, in shared memory, or in registers where LAYOUT is given."""
    smem = ring[0]
    keys = smem.index(count % smem.shape[0]).reshape([KEYS, smem.shape[3]]).slice(HALF * ROWS, ROWS)
    if LAYOUT is None:
        return keys
    else:
        return keys.load(LAYOUT)


@gluon.jit
def start_product(keys, ring, at, parts, ones, wanted=True):
    """Start keys x^T with x the ring's block number `at`, when it has come, plus what `ones` pick from the parts of each
    of its queries; with some other block if it is not wanted."""
    smem = ring[0]
    QUERIES: gl.constexpr = smem.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, QUERIES, 16])
    await_full(ring, at, wanted)
    x = smem.index(at % STAGES).reshape([QUERIES, smem.shape[3]]).permute([1, 0])
    there = parts.index(at % STAGES).reshape([QUERIES, PARTS]).permute([1, 0])
    nothing = gl.zeros([ROWS, QUERIES], gl.float32, layout)
    return warpgroup_mma(keys, x, warpgroup_mma(ones, there, nothing, use_acc=False, is_async=True), is_async=True)


@gluon.jit
def key_side(
    work, k_ring, v_ring, q_ring, do_ring, parts, ds_ring, dk_ptrs, dv_ptrs, LENGTHS, samples,
    HALF: gl.constexpr, HEADS: gl.constexpr, SCALE: gl.constexpr, DK_SCALE: gl.constexpr,
):  # fmt: skip
    """What a warpgroup of the key side does: dk and dv of 64 keys of every tile of the program."""
    q_smem, do_smem, ds_smem = q_ring[0], do_ring[0], ds_ring[0]
    QUERIES: gl.constexpr = q_smem.shape[2]
    WIDTH: gl.constexpr = q_smem.shape[3]
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, QUERIES, 16])
    key_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, key_layout, 2)
    operand_layout: gl.constexpr = gl.DotOperandLayout(0, score_layout, 2)
    # With 64 queries a block, k and v read from shared memory for every product would keep the tensor cores waiting; registers
    # hold one of them. With more, the queries weigh more; with fewer, dk and dv leave no registers.
    v_layout: gl.constexpr = operand_layout if QUERIES == 64 else None
    EARLY: gl.constexpr = QUERIES < 128  # whether registers hold the next block's scores besides
    blocks = blocks_of(LENGTHS, QUERIES)
    end = tiles(LENGTHS, samples, HEADS)
    at = 0  # blocks of queries so far
    count = 0
    tile = take(work, count, 4)
    while tile < end:
        dk = gl.zeros([ROWS, WIDTH], gl.float32, key_layout)
        dv = gl.zeros([ROWS, WIDTH], gl.float32, key_layout)
        # No ones for keys behind the end: their P is 2^0, their dP 0, and so their dS.
        number = key_tile(tile, LENGTHS, samples, HEADS, WIDTH)[1]
        left = of_stream(number, LENGTHS, LENGTHS) - first_key(number, LENGTHS) - HALF * ROWS
        real = gl.arange(0, ROWS, gl.SliceLayout(1, operand_layout)) < left
        shift_ones = ones_at(real, 0)
        delta_ones = ones_at(real, 3)
        await_full(k_ring, count)
        await_full(v_ring, count)
        k = half_of_keys(k_ring, count, HALF, None)
        v = half_of_keys(v_ring, count, HALF, v_layout)
        if EARLY:
            s = warpgroup_mma_wait(0, [start_product(k, q_ring, at, parts, shift_ones)])
        for block in range(blocks):
            stage = at % STAGES
            q = q_smem.index(stage).reshape([QUERIES, WIDTH])
            do = do_smem.index(stage).reshape([QUERIES, WIDTH])
            if not EARLY:
                scores = start_product(k, q_ring, at, parts, shift_ones)
            dp = start_product(v, do_ring, at, parts, delta_ones)
            if not EARLY:
                s = warpgroup_mma_wait(2, [scores])
            p = exponentials(s, SCALE)
            dv = warpgroup_mma(gl.convert_layout(p.to(gl.bfloat16), p_layout), do, dv, is_async=True)
            dp = warpgroup_mma_wait(1, [dp])
            ds = (p * dp).to(gl.bfloat16)
            await_empty(ds_ring, at)
            ds_smem.index(at % SLOTS).slice(HALF * ROWS, ROWS).store(ds)
            fence_async_shared()
            dk = warpgroup_mma(gl.convert_layout(ds, p_layout), q, dk, is_async=True)
            announce(ds_ring, at)
            if EARLY:
                scores = start_product(k, q_ring, at + 1, parts, shift_ones, block + 1 < blocks)
                dk, dv, s = warpgroup_mma_wait(0, [dk, dv, scores])
            else:
                dk, dv = warpgroup_mma_wait(0, [dk, dv])
            release(q_ring, at)
            at += 1
        release(k_ring, count)
        release(v_ring, count)
        # Asked for again, so that nothing of it takes registers in the loop.
        pair, n = key_tile(take(work, count, 4), LENGTHS, samples, HEADS, WIDTH)
        length = of_stream(n, LENGTHS, LENGTHS)
        first = first_key(n, LENGTHS) + HALF * ROWS
        to = (((pair // HEADS).to(gl.int64) * length + first) * HEADS + pair % HEADS) * WIDTH
        store_keys(dv, of_stream(n, dv_ptrs, LENGTHS), to, length - first, HEADS * WIDTH)
        store_keys(dk * DK_SCALE, of_stream(n, dk_ptrs, LENGTHS), to, length - first, HEADS * WIDTH)
        release(work, count)
        count += 1
        tile = take(work, count, 4)


@gluon.jit
def product(x, y):
    """x y, from shared memory."""
    M: gl.constexpr = x.shape[0]
    N: gl.constexpr = y.shape[1]
    nothing = gl.zeros([M, N], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16]))
    return warpgroup_mma_wait(0, [warpgroup_mma(x, y, nothing, use_acc=False, is_async=True)])


@gluon.jit
def query_side(work, k_ring, ds_ring, shares, LENGTHS, samples, HEADS: gl.constexpr, DQ_SCALE: gl.constexpr):
    """What the warpgroup of the query side does: the shares of dq of every tile of the program."""
    k_smem = k_ring[0]
    ds_smem, smem = ds_ring[0], shares[0]
    QUERIES: gl.constexpr = smem.shape[2]
    WIDTH: gl.constexpr = smem.shape[3]
    blocks = blocks_of(LENGTHS, QUERIES)
    end = tiles(LENGTHS, samples, HEADS)
    at = 0
    count = 0
    tile = take(work, count, 4)
    while tile < end:
        await_full(k_ring, count)
        k = k_smem.index(count % k_smem.shape[0]).reshape([KEYS, WIDTH])
        for _ in range(blocks):
            slot = at % SLOTS
            await_full(ds_ring, at)
            ds = ds_smem.index(slot)
            # Where there are fewer queries than a wgmma has rows, the columns of k are its rows.
            dq = product(k.permute([1, 0]), ds) if QUERIES < ROWS else product(ds.permute([1, 0]), k)
            dq *= DQ_SCALE
            release(ds_ring, at)
            await_empty(shares, at)
            share = smem.index(slot).reshape([QUERIES, WIDTH])
            if QUERIES < ROWS:
                share = share.permute([1, 0])
            share.store(dq)
            fence_async_shared()
            announce(shares, at)
            at += 1
        release(k_ring, count)
        release(work, count)
        count += 1
        tile = take(work, count, 4)


@gluon.jit
def keep_order(
    work, order, locks_ptr, LENGTHS, samples,
    HEADS: gl.constexpr, WIDTH: gl.constexpr, QUERIES: gl.constexpr, RECORD: gl.constexpr,
):  # fmt: skip
    """What two warps do for each block of dq: one permits an addition when the tiles before this one have been added, the other
    (RECORD) counts in the lock what has been added."""
    permitted, added, counted = order
    blocks = blocks_of(LENGTHS, QUERIES)
    end = tiles(LENGTHS, samples, HEADS)
    at = 0
    count = 0
    tile = take(work, count, 1)
    while tile < end:
        pair, n = key_tile(tile, LENGTHS, samples, HEADS, WIDTH)
        for block in range(blocks):
            if RECORD:
                mbarrier.wait(added.index(at % AHEAD), (at // AHEAD) & 1)
                set_lock(locks_ptr + 1 + pair * blocks + block, n + 1)
                mbarrier.arrive(counted.index(at % AHEAD), count=1)
            else:
                await_lock(locks_ptr + 1 + pair * blocks + block, n)
                mbarrier.wait(counted.index(at % AHEAD), ((at // AHEAD) & 1) ^ 1)
                mbarrier.arrive(permitted.index(at % AHEAD), count=1)
            at += 1
        release(work, count)
        count += 1
        tile = take(work, count, 1)


@gluon.jit
def add(work, shares, order, dq_ptrs, LENGTHS, samples, HEADS: gl.constexpr):
    """What another warp does: has the accelerator add shares to dq. A head's first share is stored."""
    smem = shares[0]
    permitted, added, _ = order
    QUERIES: gl.constexpr = smem.shape[2]
    WIDTH: gl.constexpr = smem.shape[3]
    LAYOUT: gl.constexpr = smem.type.layout
    dqs = descriptors(dq_ptrs, LENGTHS, each(LENGTHS, HEADS * WIDTH), samples, HEADS, WIDTH, QUERIES, LAYOUT)
    end = tiles(LENGTHS, samples, HEADS)
    at = 0
    count = 0
    tile = take(work, count, 1)
    while tile < end:
        pair, n = key_tile(tile, LENGTHS, samples, HEADS, WIDTH)
        batch = pair // HEADS
        column = pair % HEADS * WIDTH
        start = at
        for t in gl.static_range(len(LENGTHS)):
            for first in range(0, LENGTHS[t], QUERIES):
                slot = at % SLOTS
                mbarrier.wait(permitted.index(at % AHEAD), (at // AHEAD) & 1)
                await_full(shares, at)
                if n == 0:
                    async_store(dqs[t], [batch, first, column], smem.index(slot))
                else:
                    async_add(dqs[t], [batch, first, column], smem.index(slot))
                store_wait(0)
                release(shares, at)
                await_additions(1, at)
                mbarrier.arrive(added.index((at + AHEAD - 1) % AHEAD), count=1, pred=at > start)
                at += 1
        # The last addition is not left to the next tile, which may wait for tiles that wait for this one.
        await_additions(0, at)
        mbarrier.arrive(added.index((at + AHEAD - 1) % AHEAD), count=1)
        release(work, count)
        count += 1
        tile = take(work, count, 1)


@gluon.jit
def parts_views(ptrs, LENGTHS, pairs, QUERIES: gl.constexpr, LAYOUT: gl.constexpr):
    """Per stream, what loads the parts of QUERIES queries of a pair."""
    views = ()
    for t in gl.static_range(len(ptrs)):
        padded = gl.cdiv(gl.to_tensor(LENGTHS[t]), PAD) * PAD
        shape = [pairs, padded, PARTS]
        views = views + (
            make_tensor_descriptor(ptrs[t], shape, [padded.to(gl.int64) * PARTS, PARTS, 1], [1, QUERIES, PARTS], LAYOUT),
        )
    return views


@gluon.jit
def fill_keys(views, batch, n, column, ring, count, LENGTHS):
    """Load the tile of keys number n into the ring, when those that were there have been read."""
    smem, full, _ = ring
    slot = count % smem.shape[0]
    await_empty(ring, count)
    mbarrier.expect(full.index(slot), KEYS * smem.shape[3] * 2)
    for t in gl.static_range(len(LENGTHS)):
        here = gl.cdiv(LENGTHS[t], KEYS)
        async_load(views[t], [batch, n * KEYS, column], full.index(slot), smem.index(slot), pred=(n >= 0) & (n < here))
        n -= here


@gluon.jit
def produce(
    work, k_ring, v_ring, q_ring, do_ring, parts, q_ptrs, k_ptrs, v_ptrs, do_ptrs, parts_ptrs, locks_ptr,
    LENGTHS, samples, Q_STRIDES_, K_STRIDES_, V_STRIDES_, V_AT: gl.constexpr, HEADS: gl.constexpr,
):  # fmt: skip
    """What the producer does: claims tiles, and loads for each."""
    q_smem, q_full, _ = q_ring
    do_smem, do_full, _ = do_ring
    QUERIES: gl.constexpr = q_smem.shape[2]
    WIDTH: gl.constexpr = q_smem.shape[3]
    LAYOUT: gl.constexpr = q_smem.type.layout
    PARTS_LAYOUT: gl.constexpr = parts.type.layout
    v_starts = ()
    for t in gl.static_range(len(v_ptrs)):
        v_starts = v_starts + (v_ptrs[t] + V_AT,)
    qs = descriptors(q_ptrs, LENGTHS, Q_STRIDES_, samples, HEADS, WIDTH, QUERIES, LAYOUT)
    dos = descriptors(do_ptrs, LENGTHS, each(LENGTHS, HEADS * WIDTH), samples, HEADS, WIDTH, QUERIES, LAYOUT)
    ks = descriptors(k_ptrs, LENGTHS, K_STRIDES_, samples, HEADS, WIDTH, KEYS, LAYOUT)
    vs = descriptors(v_starts, LENGTHS, V_STRIDES_, samples, HEADS, WIDTH, KEYS, LAYOUT)
    rows = parts_views(parts_ptrs, LENGTHS, HEADS * samples, QUERIES, PARTS_LAYOUT)
    end = tiles(LENGTHS, samples, HEADS)
    at = 0
    count = 0
    tile = 0
    while tile < end:
        tile = gl.atomic_add(locks_ptr, 1, sem="relaxed")
        await_empty(work, count)
        work[0].index(count % SLOTS).store(gl.full([1], tile, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))
        announce(work, count)
        if tile < end:
            pair, n = key_tile(tile, LENGTHS, samples, HEADS, WIDTH)
            batch = pair // HEADS
            column = pair % HEADS * WIDTH
            fill_keys(ks, batch, n, column, k_ring, count, LENGTHS)
            fill_keys(vs, batch, n, column, v_ring, count, LENGTHS)
            for t in gl.static_range(len(LENGTHS)):
                for first in range(0, LENGTHS[t], QUERIES):
                    stage = at % STAGES
                    await_empty(q_ring, at)
                    mbarrier.expect(q_full.index(stage), QUERIES * (WIDTH + PARTS) * 2)
                    async_load(qs[t], [batch, first, column], q_full.index(stage), q_smem.index(stage))
                    async_load(rows[t], [pair, first, 0], q_full.index(stage), parts.index(stage))
                    mbarrier.expect(do_full.index(stage), QUERIES * WIDTH * 2)
                    async_load(dos[t], [batch, first, column], do_full.index(stage), do_smem.index(stage))
                    at += 1
        count += 1


@gluon.jit
def joint_attention_hopper_bwd_body(
    q_ptrs,  # (B, L_s, H, d) per stream, tokens a stride apart, bfloat16
    k_ptrs,  # likewise
    v_ptrs,  # likewise
    do_ptrs,  # (B, L_s, H, d)
    parts_ptrs,  # (B, H, padded L_s, PARTS) bfloat16: three of minus lse in base 2, divided by SCALE, three of minus delta
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
    WIDTH,  # d
    SCALE,  # softmax scale times log2(e); 1 where q has been multiplied by it
    DQ_SCALE,  # of dS k
    DK_SCALE,  # of dS^T q
    QUERIES,  # of a block
):
    """Grid (programs that the GPU holds at once,), 4 warps, to which warp_specialize adds the others."""
    TILES: gl.constexpr = 2 if WIDTH < 128 else 1  # of keys in shared memory
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(min(128, 2 * WIDTH), 16, rank=3)
    DS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout(min(128, 2 * QUERIES), 16, rank=2)
    SHARE_LAYOUT: gl.constexpr = gl.NVMMASharedLayout(min(128, 4 * WIDTH), 32, rank=3)
    PARTS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout(2 * PARTS, 16, rank=3)
    work = (
        gl.allocate_shared_memory(gl.int32, [SLOTS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])),
        barriers(SLOTS, 1),
        barriers(SLOTS, ROLES),
    )
    k_ring = ring(TILES, KEYS, WIDTH, 3)
    v_ring = ring(TILES, KEYS, WIDTH, 2)
    q_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 1, QUERIES, WIDTH], LAYOUT)
    do_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 1, QUERIES, WIDTH], LAYOUT)
    parts = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 1, QUERIES, PARTS], PARTS_LAYOUT)
    q_full = barriers(STAGES, 1)
    do_full = barriers(STAGES, 1)
    both_empty = barriers(STAGES, 2)
    q_ring = (q_smem, q_full, both_empty)
    do_ring = (do_smem, do_full, both_empty)
    ds_ring = (
        gl.allocate_shared_memory(gl.bfloat16, [SLOTS, KEYS, QUERIES], DS_LAYOUT),
        barriers(SLOTS, 2),
        barriers(SLOTS, 1),
    )
    shares = (
        gl.allocate_shared_memory(gl.float32, [SLOTS, 1, QUERIES, WIDTH], SHARE_LAYOUT),
        barriers(SLOTS, 1),
        barriers(SLOTS, 1),
    )
    order = (barriers(AHEAD, 1), barriers(AHEAD, 1), barriers(AHEAD, 1))
    samples = SAMPLES[0]
    gl.warp_specialize(
        [
            (key_side, (work, k_ring, v_ring, q_ring, do_ring, parts, ds_ring, dk_ptrs, dv_ptrs, LENGTHS, samples,
                0, HEADS, SCALE, DK_SCALE)),
            (key_side, (work, k_ring, v_ring, q_ring, do_ring, parts, ds_ring, dk_ptrs, dv_ptrs, LENGTHS, samples,
                1, HEADS, SCALE, DK_SCALE)),
            (query_side, (work, k_ring, ds_ring, shares, LENGTHS, samples, HEADS, DQ_SCALE)),
            (produce, (work, k_ring, v_ring, q_ring, do_ring, parts, q_ptrs, k_ptrs, v_ptrs, do_ptrs, parts_ptrs,
                locks_ptr, LENGTHS, samples, Q_STRIDES_, K_STRIDES_, V_STRIDES_, V_AT, HEADS)),
            (keep_order, (work, order, locks_ptr, LENGTHS, samples, HEADS, WIDTH, QUERIES, False)),
            (add, (work, shares, order, dq_ptrs, LENGTHS, samples, HEADS)),
            (keep_order, (work, order, locks_ptr, LENGTHS, samples, HEADS, WIDTH, QUERIES, True)),
        ],
        [4, 4, 1, 1, 1, 1],
        [KEY_REGISTERS, QUERY_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS],
    )  # fmt: skip
