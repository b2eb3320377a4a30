"""Forward of joint attention on Hopper, in Gluon: warps with roles, in place of programs that do everything in turn.

One program per multiprocessor walks tiles of 3 x 64 queries. One warp, the producer, loads queries, keys and values through the
tensor memory accelerator into rings of shared memory; three warpgroups, the consumers, multiply 64 queries each. Barriers tell
who may read or overwrite a stage. A consumer's tensor cores multiply P v of one block of keys and q k of the next while its
exponentials are taken (Shah et al. 2024, arXiv:2407.08608, FlashAttention-3), and the consumers start their products in turn,
so that while one takes exponentials, another's products run.

The softmax has no shift (see `forward`). A row that needs one has lse NaN here, and joint_attention_repair_body does it again.
"""

from __future__ import annotations

from .._gluon import async_load, gl, gluon, make_tensor_descriptor, mbarrier, warpgroup_mma, warpgroup_mma_wait
from .backward import PARTS
from .forward import LN2

ROWS = gl.constexpr(64)  # queries of a consumer: what one wgmma multiplies
CONSUMERS = gl.constexpr(3)
STAGES = gl.constexpr(3)  # blocks of keys, and of values, in shared memory
CONSUMER_REGISTERS = gl.constexpr(160)
PRODUCER_REGISTERS = gl.constexpr(32)


@gluon.jit
def barriers(SIZE: gl.constexpr, COUNT: gl.constexpr):
    """SIZE barriers of COUNT arrivals each."""
    each = gl.allocate_shared_memory(gl.int64, [SIZE, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SIZE):
        mbarrier.init(each.index(i), count=COUNT)
    return each


@gluon.jit
def ring(SIZE: gl.constexpr, TOKENS: gl.constexpr, WIDTH: gl.constexpr, READERS: gl.constexpr):
    """Shared memory of SIZE tiles, and barriers of each: it is full, and READERS warpgroups have emptied it."""
    layout: gl.constexpr = gl.NVMMASharedLayout(min(128, 2 * WIDTH), 16, rank=3)
    smem = gl.allocate_shared_memory(gl.bfloat16, [SIZE, 1, TOKENS, WIDTH], layout)
    return smem, barriers(SIZE, 1), barriers(SIZE, READERS)


@gluon.jit
def await_full(ring, at, wanted=True):
    """Wait until the ring's block number `at` has come, if it is wanted."""
    smem, full, _ = ring
    mbarrier.wait(full.index(at % smem.shape[0]), (at // smem.shape[0]) & 1, pred=wanted)


@gluon.jit
def await_empty(ring, at):
    """Wait until what was in the place of the ring's block number `at` has been read."""
    smem, _, empty = ring
    mbarrier.wait(empty.index(at % smem.shape[0]), ((at // smem.shape[0]) & 1) ^ 1)


@gluon.jit
def announce(ring, at):
    """The ring's block number `at` has come."""
    smem, full, _ = ring
    mbarrier.arrive(full.index(at % smem.shape[0]), count=1)


@gluon.jit
def release(ring, at):
    """This warpgroup, or warp, has read the ring's block number `at`."""
    smem, _, empty = ring
    mbarrier.arrive(empty.index(at % smem.shape[0]), count=1)


@gluon.jit
def turn(VERB: gl.constexpr, CONSUMER: gl.constexpr, x):
    """VERB "sync": wait for this consumer's turn to start products; "arrive": give it its turn.

    Named barriers of two warpgroups, from 8 on, which Triton leaves alone; as elementwise assembly they need some x.
    """
    gl.inline_asm_elementwise(
        f"bar.{VERB} {8 + CONSUMER % CONSUMERS}, 256; mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def exponentials(s, SCALE: gl.constexpr):
    """2^(s SCALE); what is below the smallest normal number is 0."""
    if SCALE != 1.0:
        s = s * SCALE
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [s], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def ones_at(real, FIRST: gl.constexpr):
    """Ones in columns FIRST to FIRST + 2 of the rows of real keys, else 0, as an operand of a product [rows, PARTS]: with the
    parts of a number for each query, that number for each real key."""
    cols = gl.arange(0, PARTS, gl.SliceLayout(0, real.type.layout.parent))[None, :]
    return gl.where(real[:, None] & (cols >= FIRST) & (cols < FIRST + 3), 1.0, 0.0).to(gl.bfloat16)


@gluon.jit
def row_sums(p):
    """Sums of the columns that one thread holds [ROWS, 8], so that no warp shuffles."""
    return gl.sum(p.reshape([p.shape[0], p.shape[1] // 8, 8]), 1)


@gluon.jit
def start_scores(q, k_ring, at, CONSUMER: gl.constexpr):
    """Start q k^T with the ring's block number `at`, when it has come and it is this consumer's turn."""
    smem = k_ring[0]
    KEYS: gl.constexpr = smem.shape[2]
    await_full(k_ring, at)
    turn("sync", CONSUMER, at)
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    k = smem.index(at % STAGES).reshape([KEYS, smem.shape[3]]).permute([1, 0])
    return warpgroup_mma(q, k, gl.zeros([ROWS, KEYS], gl.float32, layout), use_acc=False, is_async=True)


@gluon.jit
def start_output(p, v_ring, at, o):
    """Start o + p v with the ring's block number `at`, when it has come."""
    smem = v_ring[0]
    await_full(v_ring, at)
    return warpgroup_mma(p, smem.index(at % STAGES).reshape([smem.shape[2], smem.shape[3]]), o, is_async=True)


@gluon.jit
def advance(o, p, total, at, q, k_ring, v_ring, CONSUMER: gl.constexpr, SCALE: gl.constexpr):
    """Scores and P of block number `at`, while P v of the block before is added to o."""
    scores = start_scores(q, k_ring, at, CONSUMER)
    output = start_output(p, v_ring, at - 1, o)
    turn("arrive", CONSUMER + 1, at)
    s = warpgroup_mma_wait(1, [scores])
    release(k_ring, at)
    new = exponentials(s, SCALE)
    total += row_sums(new)
    # Waited for together, so that the compiler puts nothing of them behind the wait.
    o, p, total = warpgroup_mma_wait(0, [output, gl.convert_layout(new.to(gl.bfloat16), p.type.layout), total])
    release(v_ring, at - 1)
    return o, p, total


@gluon.jit
def blocks_of(LENGTHS, SIZE: gl.constexpr):
    """Blocks of SIZE tokens of all streams."""
    blocks = 0
    for t in gl.static_range(len(LENGTHS)):
        blocks += gl.cdiv(LENGTHS[t], SIZE)
    return blocks


@gluon.jit
def tiles(LENGTHS, samples, HEADS: gl.constexpr):
    """Tiles of all queries of a head, and of all heads and samples. A tile may hold queries of two streams."""
    blocks = gl.cdiv(blocks_of(LENGTHS, ROWS), CONSUMERS)
    return blocks, blocks * HEADS * samples


@gluon.jit
def store(
    o, sums, padding, unit, batch, head, o_ptrs, lse_ptrs, log_ptrs, LENGTHS,
    HEADS: gl.constexpr, WIDTH: gl.constexpr, LOGS: gl.constexpr,
):  # fmt: skip
    """Outputs and log-sum-exps of the 64 queries number `unit` of all streams; lse is NaN where a row is out of range.

    padding: the keys behind the streams' ends, which were loaded as 0: each put 2^0 = 1 into a row's sum and nothing into its
    output. A mask for them would cost registers that the main loop lacks. The sum's rounding is relative to all of it, so what is
    left must not be small beside it.
    """
    length = gl.to_tensor(LENGTHS[0])
    o_ptr = o_ptrs[0]
    lse_ptr = lse_ptrs[0]
    log_ptr = log_ptrs[0]
    before = gl.cdiv(LENGTHS[0], ROWS)
    first = unit * ROWS
    for t in gl.static_range(1, len(LENGTHS)):
        if unit >= before:
            length = gl.to_tensor(LENGTHS[t])
            o_ptr = o_ptrs[t]
            lse_ptr = lse_ptrs[t]
            log_ptr = log_ptrs[t]
            first = (unit - before) * ROWS
        before += gl.cdiv(LENGTHS[t], ROWS)
    rows = first + gl.arange(0, ROWS, gl.SliceLayout(1, o.type.layout))
    total = sums - padding
    good = (total * 16.0 >= padding) & (total >= 1 / 2.0**64) & (total <= 2.0**64) & (gl.max(gl.maximum(o, -o), 1) <= 2.0**126)
    lse = gl.where(good, gl.log2(total), float("nan"))
    at = (batch.to(gl.int64) * HEADS + head) * length + rows
    gl.store(lse_ptr + at, lse, mask=rows < length)
    if LOGS:
        gl.store(log_ptr + at, lse * LN2, mask=rows < length)
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    o = gl.convert_layout((o * (1.0 / total)[:, None]).to(gl.bfloat16), layout)
    rows = first + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    cols = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    at = o_ptr + ((batch.to(gl.int64) * length + first) * HEADS + head) * WIDTH
    gl.store(at + (rows - first)[:, None] * (HEADS * WIDTH) + cols[None, :], o, mask=(rows < length)[:, None])


@gluon.jit
def consume(
    q_ring, k_ring, v_ring, o_ptrs, lse_ptrs, log_ptrs, LENGTHS, samples,
    CONSUMER: gl.constexpr, HEADS: gl.constexpr, WIDTH: gl.constexpr, SCALE: gl.constexpr, LOGS: gl.constexpr,
):  # fmt: skip
    """What a consumer does: its 64 queries of every tile of the program."""
    KEYS: gl.constexpr = k_ring[0].shape[2]
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    q_smem, q_full, q_empty = q_ring
    q = q_smem.index(CONSUMER).reshape([ROWS, WIDTH])
    blocks, end = tiles(LENGTHS, samples, HEADS)
    key_blocks = 0
    padding = 0
    for t in gl.static_range(len(LENGTHS)):
        key_blocks += gl.cdiv(LENGTHS[t], KEYS)
        padding += gl.cdiv(LENGTHS[t], KEYS) * KEYS - LENGTHS[t]
    at = 0  # blocks of keys so far
    parity = 0
    if CONSUMER == CONSUMERS - 1:
        turn("arrive", 0, at)
    for tile in range(gl.program_id(0), end, gl.num_programs(0)):
        mbarrier.wait(q_full.index(CONSUMER), parity)
        scores = start_scores(q, k_ring, at, CONSUMER)
        turn("arrive", CONSUMER + 1, at)
        s = warpgroup_mma_wait(0, [scores])
        release(k_ring, at)
        new = exponentials(s, SCALE)
        total = row_sums(new)
        p = gl.convert_layout(new.to(gl.bfloat16), p_layout)
        o = gl.zeros([ROWS, WIDTH], gl.float32, o_layout)
        at += 1
        for _ in range(1, key_blocks):
            o, p, total = advance(o, p, total, at, q, k_ring, v_ring, CONSUMER, SCALE)
            at += 1
        mbarrier.arrive(q_empty.index(CONSUMER), count=1)
        output = start_output(p, v_ring, at - 1, o)
        sums = gl.convert_layout(gl.sum(total, 1), gl.SliceLayout(1, o_layout))
        o = warpgroup_mma_wait(0, [output])
        release(v_ring, at - 1)
        parity ^= 1
        store(
            o, sums, padding, tile % blocks * CONSUMERS + CONSUMER, tile // blocks // HEADS, tile // blocks % HEADS,
            o_ptrs, lse_ptrs, log_ptrs, LENGTHS, HEADS, WIDTH, LOGS,
        )  # fmt: skip
    if CONSUMER == 0:
        turn("sync", 0, at)  # the turn that nobody takes any more


@gluon.jit
def descriptors(
    ptrs, LENGTHS, STRIDES_, samples, HEADS: gl.constexpr, WIDTH: gl.constexpr, TOKENS: gl.constexpr, LAYOUT: gl.constexpr
):
    """Per stream, what loads tiles [TOKENS, WIDTH] of one head; tokens from the stream's length on read as 0."""
    views = ()
    for t in gl.static_range(len(ptrs)):
        length = gl.to_tensor(LENGTHS[t])
        view = make_tensor_descriptor(
            ptrs[t],
            [samples, length, HEADS * WIDTH],
            [length.to(gl.int64) * STRIDES_[t], STRIDES_[t], 1],
            [1, TOKENS, WIDTH],
            LAYOUT,
        )
        views = views + (view,)
    return views


@gluon.jit
def fill(view, batch, first, column, ring, at):
    """Load tokens from `first` on into the ring as its block number `at`, when the consumers have read what is there."""
    smem, full, _ = ring
    stage = at % STAGES
    await_empty(ring, at)
    mbarrier.expect(full.index(stage), smem.shape[2] * smem.shape[3] * 2)
    async_load(view, [batch, first, column], full.index(stage), smem.index(stage))


@gluon.jit
def produce(
    q_ring, k_ring, v_ring, q_ptrs, k_ptrs, v_ptrs, LENGTHS, samples, Q_STRIDES_, K_STRIDES_, V_STRIDES_,
    V_AT: gl.constexpr, HEADS: gl.constexpr, WIDTH: gl.constexpr,
):  # fmt: skip
    """What the producer does: loads for every tile of the program."""
    LAYOUT: gl.constexpr = k_ring[0].type.layout
    KEYS: gl.constexpr = k_ring[0].shape[2]
    qs = descriptors(q_ptrs, LENGTHS, Q_STRIDES_, samples, HEADS, WIDTH, ROWS, LAYOUT)
    ks = descriptors(k_ptrs, LENGTHS, K_STRIDES_, samples, HEADS, WIDTH, KEYS, LAYOUT)
    v_starts = ()
    for t in gl.static_range(len(v_ptrs)):
        v_starts = v_starts + (v_ptrs[t] + V_AT,)
    vs = descriptors(v_starts, LENGTHS, V_STRIDES_, samples, HEADS, WIDTH, KEYS, LAYOUT)
    q_smem, q_full, q_empty = q_ring
    blocks, end = tiles(LENGTHS, samples, HEADS)
    at = 0
    parity = 1
    for tile in range(gl.program_id(0), end, gl.num_programs(0)):
        batch = tile // blocks // HEADS
        column = tile // blocks % HEADS * WIDTH
        for consumer in gl.static_range(CONSUMERS):
            mbarrier.wait(q_empty.index(consumer), parity)
            mbarrier.expect(q_full.index(consumer), ROWS * WIDTH * 2)
            unit = tile % blocks * CONSUMERS + consumer
            for t in gl.static_range(len(LENGTHS)):
                units = gl.cdiv(LENGTHS[t], ROWS)
                here = unit >= 0 if t == len(LENGTHS) - 1 else (unit >= 0) & (unit < units)
                async_load(qs[t], [batch, unit * ROWS, column], q_full.index(consumer), q_smem.index(consumer), pred=here)
                unit -= units
        for t in gl.static_range(len(LENGTHS)):
            for first in range(0, LENGTHS[t], KEYS):
                fill(ks[t], batch, first, column, k_ring, at)
                fill(vs[t], batch, first, column, v_ring, at)
                at += 1
        parity ^= 1


@gluon.jit
def joint_attention_hopper_body(
    q_ptrs,  # (B, L_s, H, d) per stream, tokens a stride apart, bfloat16
    k_ptrs,  # likewise
    v_ptrs,  # likewise
    o_ptrs,  # (B, L_s, H, d)
    lse_ptrs,  # (B, H, L_s) float32, base 2
    log_ptrs,  # (B, H, L_s) float32, base e
    LENGTHS,
    SAMPLES,  # B, as often as there are streams
    Q_STRIDES_,
    K_STRIDES_,
    V_STRIDES_,
    V_AT,  # where v starts in a packed projection
    HEADS,
    WIDTH,  # d
    SCALE,  # softmax scale times log2(e); 1 where q has been multiplied by it
    LOGS,  # whether log_ptrs are wanted
    KEYS,
):
    """Grid (programs that the GPU holds at once,), 4 warps, to which warp_specialize adds the others."""
    q_ring = ring(CONSUMERS, ROWS, WIDTH, 1)
    k_ring = ring(STAGES, KEYS, WIDTH, CONSUMERS)
    v_ring = ring(STAGES, KEYS, WIDTH, CONSUMERS)
    gl.warp_specialize(
        [
            (consume, (q_ring, k_ring, v_ring, o_ptrs, lse_ptrs, log_ptrs, LENGTHS, SAMPLES[0], 0, HEADS, WIDTH, SCALE, LOGS)),
            (consume, (q_ring, k_ring, v_ring, o_ptrs, lse_ptrs, log_ptrs, LENGTHS, SAMPLES[0], 1, HEADS, WIDTH, SCALE, LOGS)),
            (consume, (q_ring, k_ring, v_ring, o_ptrs, lse_ptrs, log_ptrs, LENGTHS, SAMPLES[0], 2, HEADS, WIDTH, SCALE, LOGS)),
            (
                produce,
                (
                    q_ring,
                    k_ring,
                    v_ring,
                    q_ptrs,
                    k_ptrs,
                    v_ptrs,
                    LENGTHS,
                    SAMPLES[0],
                    Q_STRIDES_,
                    K_STRIDES_,
                    V_STRIDES_,
                    V_AT,
                    HEADS,
                    WIDTH,
                ),
            ),
        ],
        [4, 4, 1],
        [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
