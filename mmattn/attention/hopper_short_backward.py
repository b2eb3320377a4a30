"""Backward of short joint sequences on Hopper, in Gluon: `single_pass`, with products in flight.

What a score needs of its row rides along in columns, as there. Triton waits for every product as soon as it has been issued;
here the scores of the next pair of blocks are multiplied while this one's exponentials are taken, and its gradients while the
next one's are.
"""

from __future__ import annotations

from .._gluon import await_copies, commit_copies, copy_async, fence_async_shared, gl, gluon, warpgroup_mma, warpgroup_mma_wait
from .hopper import exponentials

ROWS = gl.constexpr(64)  # tokens of a block: what one wgmma multiplies
WIDTH = gl.constexpr(16)
CHUNKS = gl.constexpr(gl.BlockedLayout([1, 8], [16, 2], [4, 1], [1, 0]))  # 16 bytes a thread
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
HEAD = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16]))
TILE = gl.constexpr(gl.NVMMASharedLayout(32, 16, rank=2))
SQUARE = gl.constexpr(gl.NVMMASharedLayout(128, 16, rank=2))


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
def ones_at(real, FIRST: gl.constexpr):
    """Ones in columns FIRST to FIRST + 2 of the rows of keys that are real, as an operand of a product."""
    layout: gl.constexpr = real.type.layout.parent
    cols = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))[None, :]
    return gl.where(real[:, None] & (cols >= FIRST) & (cols < FIRST + 3), 1.0, 0.0).to(gl.bfloat16)


@gluon.jit
def copy_tile(smem, ptr, batch, head, first, length, stride: gl.constexpr, there):
    """Start to copy 64 tokens of a head; those that are not there read as 0."""
    token = first + gl.arange(0, ROWS, gl.SliceLayout(1, CHUNKS))
    cols = gl.arange(0, WIDTH, gl.SliceLayout(0, CHUNKS))
    at = ptr + batch * length * stride + head * WIDTH
    mask = ((token < length) & there)[:, None] & (cols >= 0)[None, :]
    copy_async(smem, at + token[:, None] * stride + cols[None, :], mask)


@gluon.jit
def fetch(
    unit, end, half, smem, v_smem, q_ptrs, k_ptrs, v_ptrs, o_ptrs, do_ptrs, lse_ptrs, dlse_ptrs, LENGTHS,
    Q_STRIDES_, K_STRIDES_, V_STRIDES_, V_AT: gl.constexpr, HEADS: gl.constexpr, SHIFTED: gl.constexpr, BLOCKS_,
):  # fmt: skip
    """Start to copy a head to shared memory; lse and dlse of its blocks."""
    q_smem, k_smem, do_smem, o_smem = smem
    N: gl.constexpr = q_smem.shape[0]
    row_stride: gl.constexpr = HEADS * WIDTH
    head = unit % HEADS
    batch = (unit // HEADS).to(gl.int64)
    there = unit < end
    lse, dlse = (), ()
    for i in gl.static_range(len(q_ptrs)):
        for b in gl.static_range(BLOCKS_[i]):
            copy_tile(q_smem.index(len(lse)), q_ptrs[i], batch, head, b * ROWS, LENGTHS[i], Q_STRIDES_[i], there)
            copy_tile(k_smem.index(len(lse)), k_ptrs[i], batch, head, b * ROWS, LENGTHS[i], K_STRIDES_[i], there)
            copy_tile(
                v_smem.index(half * N + len(lse)), v_ptrs[i] + V_AT, batch, head, b * ROWS, LENGTHS[i], V_STRIDES_[i], there
            )
            copy_tile(o_smem.index(len(lse)), o_ptrs[i], batch, head, b * ROWS, LENGTHS[i], row_stride, there)
            copy_tile(do_smem.index(len(lse)), do_ptrs[i], batch, head, b * ROWS, LENGTHS[i], row_stride, there)
            row = b * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, CHUNKS))
            start = (batch * HEADS + head) * LENGTHS[i]
            keep = (row < LENGTHS[i]) & there
            lse = lse + (gl.load(lse_ptrs[i] + start + row, mask=keep, other=float("-inf")),)
            if SHIFTED:
                dlse = dlse + (gl.load(dlse_ptrs[i] + start + row, mask=keep, other=0.0),)
    commit_copies()
    return lse, dlse


@gluon.jit
def zero_of(x):
    """0, of which LLVM does not know it: addresses with it in them are made anew, which is cheap, instead of kept in registers."""
    return gl.inline_asm_elementwise("mov.b32 $0, 0;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def start(x, ones, y, rows):
    """Start x y^T plus what the columns of `rows` are the parts of [keys, queries]."""
    nothing = gl.zeros([ROWS, ROWS], gl.float32, SCORES)
    z = warpgroup_mma(x, y.permute([1, 0]), nothing, use_acc=False, is_async=True)
    return warpgroup_mma(ones, rows.permute([1, 0]), z, is_async=True)


@gluon.jit
def replaced(xs, at: gl.constexpr, x):
    """The tuple xs with x in place `at`."""
    new = ()
    for i in gl.static_range(len(xs)):
        if i == at:
            new = new + (x,)
        else:
            new = new + (xs[i],)
    return new


@gluon.jit
def place(block, ptrs, LENGTHS, BLOCKS_):
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
    ptr, length, first = place(block, ptrs, LENGTHS, BLOCKS_)
    token = first + gl.arange(0, ROWS, gl.SliceLayout(1, HEAD))
    cols = gl.arange(0, WIDTH, gl.SliceLayout(0, HEAD))
    at = ptr + batch * length * (HEADS * WIDTH) + head * WIDTH
    mask = (token < length)[:, None] & (cols >= 0)[None, :]
    gl.store(at + token[:, None] * (HEADS * WIDTH) + cols[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@gluon.jit
def keys_of(block, k, v, ptrs, LENGTHS, BLOCKS_):
    """Operands of the products with a block of keys: k, v and ones."""
    layout: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
    _, length, first = place(block, ptrs, LENGTHS, BLOCKS_)
    real = first + gl.arange(0, ROWS, gl.SliceLayout(1, layout)) < length
    return k.load(layout), v.load(layout), ones_at(real, 0), ones_at(real, 3)


@gluon.jit
def key_block(
    j, s, dp, dk, dv, dq, keys, batch, head, half, smem, v_smem, ds_smem, dq_ptrs, dk_ptrs, dv_ptrs, LENGTHS,
    HEADS: gl.constexpr, SCALE: gl.constexpr, DQ_SCALE: gl.constexpr, DK_SCALE: gl.constexpr, BLOCKS_,
    FIRST: gl.constexpr, LAST: gl.constexpr, LOOP: gl.constexpr,
):  # fmt: skip
    """What block j of keys takes part in. Of the first pair, s and dp come along; of the last, the products are left in flight,
    but in a LOOP."""
    q_smem, k_smem, do_smem, rows_smem = smem
    N: gl.constexpr = q_smem.shape[0]
    P: gl.constexpr = gl.DotOperandLayout(0, HEAD, 2)
    nothing = gl.zeros([ROWS, WIDTH], gl.float32, HEAD)
    k, v, shift_ones, delta_ones = keys
    for i in gl.static_range(N):
        z = zero_of(half)
        if i + 1 == N and not LAST:
            n = gl.minimum(j + 1, N - 1) if LOOP else j + 1
            keys = keys_of(n, k_smem.index(z + n), v_smem.index(half * N + n), dk_ptrs, LENGTHS, BLOCKS_)
            k, v, shift_ones, delta_ones = keys
        p = exponentials(s, SCALE)
        left = gl.convert_layout(p.to(gl.bfloat16), P)
        dv, dk, done, dp, left = warpgroup_mma_wait(0, [dv, dk, dq[(i + N - 1) % N], dp, left])
        if i + 1 < N or not LAST:
            scores = start(k, shift_ones, q_smem.index(z + (i + 1) % N), rows_smem.index(z + (i + 1) % N))
        dq = replaced(dq, (i + N - 1) % N, done)
        if i == 0:
            if not FIRST and not LOOP:
                store_keys(j - 1, dk, dv, batch, head, dk_ptrs, dv_ptrs, LENGTHS, HEADS, DK_SCALE, BLOCKS_)
            dk = nothing
            dv = nothing
        elif LAST:
            store_tokens(i - 1, done * DQ_SCALE, batch, head, dq_ptrs, LENGTHS, HEADS, BLOCKS_)
        dv = warpgroup_mma(left, do_smem.index(z + i), dv, use_acc=i > 0, is_async=True)
        ds = (p * dp).to(gl.bfloat16)
        dk = warpgroup_mma(gl.convert_layout(ds, P), q_smem.index(z + i), dk, use_acc=i > 0, is_async=True)
        there = ds_smem[i % 2 if LOOP else (i + j * N) % 2].index(z)
        there.store(ds)
        fence_async_shared()
        if i + 1 < N or not LAST:
            dp = start(v, delta_ones, do_smem.index(z + (i + 1) % N), rows_smem.index(z + (i + 1) % N))
        more = warpgroup_mma(there.permute([1, 0]), k_smem.index(z + j), dq[i], use_acc=not FIRST, is_async=True)
        dq = replaced(dq, i, more)
        if i + 1 < N or not LAST:
            s = warpgroup_mma_wait(5, [scores])
    if LOOP:
        dv, dk, done, dp = warpgroup_mma_wait(0, [dv, dk, dq[N - 1], dp])
        dq = replaced(dq, N - 1, done)
        store_keys(j, dk, dv, batch, head, dk_ptrs, dv_ptrs, LENGTHS, HEADS, DK_SCALE, BLOCKS_)
    return s, dp, dk, dv, dq, keys


@gluon.jit
def store_keys(j, dk, dv, batch, head, dk_ptrs, dv_ptrs, LENGTHS, HEADS: gl.constexpr, DK_SCALE: gl.constexpr, BLOCKS_):
    """Store dk and dv of a block of keys."""
    store_tokens(j, dk * DK_SCALE, batch, head, dk_ptrs, LENGTHS, HEADS, BLOCKS_)
    store_tokens(j, dv, batch, head, dv_ptrs, LENGTHS, HEADS, BLOCKS_)


@gluon.jit
def gradients(
    batch, head, half, smem, v_smem, ds_smem, dq_ptrs, dk_ptrs, dv_ptrs, LENGTHS,
    HEADS: gl.constexpr, SCALE: gl.constexpr, DQ_SCALE: gl.constexpr, DK_SCALE: gl.constexpr, BLOCKS_, LOOP: gl.constexpr,
):  # fmt: skip
    """dq, dk and dv of a head; LOOP: not as straight code."""
    q_smem, k_smem, do_smem, rows_smem = smem
    N: gl.constexpr = q_smem.shape[0]
    nothing = gl.zeros([ROWS, WIDTH], gl.float32, HEAD)
    dk, dv = nothing, nothing
    dq = ()
    for _ in gl.static_range(N):
        dq = dq + (nothing,)
    z = zero_of(half)
    keys = keys_of(0, k_smem.index(z), v_smem.index(half * N), dk_ptrs, LENGTHS, BLOCKS_)
    s = start(keys[0], keys[2], q_smem.index(z), rows_smem.index(z))
    dp = start(keys[1], keys[3], do_smem.index(z), rows_smem.index(z))
    if LOOP:
        s, dp = warpgroup_mma_wait(0, [s, dp])
        for j in range(N):
            s, dp, dk, dv, dq, keys = key_block(
                j, s, dp, dk, dv, dq, keys, batch, head, half, smem, v_smem, ds_smem, dq_ptrs, dk_ptrs, dv_ptrs,
                LENGTHS, HEADS, SCALE, DQ_SCALE, DK_SCALE, BLOCKS_, False, False, LOOP,
            )  # fmt: skip
        for i in gl.static_range(N):
            store_tokens(i, dq[i] * DQ_SCALE, batch, head, dq_ptrs, LENGTHS, HEADS, BLOCKS_)
    else:
        s = warpgroup_mma_wait(2, [s])
        for j in gl.static_range(N):
            s, dp, dk, dv, dq, keys = key_block(
                j, s, dp, dk, dv, dq, keys, batch, head, half, smem, v_smem, ds_smem, dq_ptrs, dk_ptrs, dv_ptrs,
                LENGTHS, HEADS, SCALE, DQ_SCALE, DK_SCALE, BLOCKS_, j == 0, j == N - 1, LOOP,
            )  # fmt: skip
        dv, dk, done = warpgroup_mma_wait(0, [dv, dk, dq[N - 1]])
        store_keys(N - 1, dk, dv, batch, head, dk_ptrs, dv_ptrs, LENGTHS, HEADS, DK_SCALE, BLOCKS_)
        store_tokens(N - 1, done * DQ_SCALE, batch, head, dq_ptrs, LENGTHS, HEADS, BLOCKS_)


@gluon.jit
def joint_attention_hopper_short_bwd_body(
    q_ptrs,  # (B, L_s, H, 16) per stream, tokens a stride apart, bfloat16
    k_ptrs,  # likewise
    v_ptrs,  # likewise
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
    SHIFTED,  # whether dlse is given
    DQ_SCALE,  # of dS k
    DK_SCALE,  # of dS^T q
    BLOCKS_,  # blocks of 64 tokens in each stream
    TOTAL,  # of all streams
    LOOP,  # over blocks of keys
    AHEAD,  # whether the next head is loaded while one is computed
):
    """Grid (programs that the GPU holds at once,)."""
    SLOTS: gl.constexpr = 2 if AHEAD else 1
    q_smem = gl.allocate_shared_memory(gl.bfloat16, [TOTAL, ROWS, WIDTH], TILE)
    k_smem = gl.allocate_shared_memory(gl.bfloat16, [TOTAL, ROWS, WIDTH], TILE)
    do_smem = gl.allocate_shared_memory(gl.bfloat16, [TOTAL, ROWS, WIDTH], TILE)
    rows_smem = gl.allocate_shared_memory(gl.bfloat16, [TOTAL, ROWS, WIDTH], TILE)  # in place of o
    smem = (q_smem, k_smem, do_smem, rows_smem)
    v_smem = gl.allocate_shared_memory(gl.bfloat16, [SLOTS * TOTAL, ROWS, WIDTH], TILE)
    if AHEAD:
        coming = ()
        for _ in gl.static_range(4):
            coming = coming + (gl.allocate_shared_memory(gl.bfloat16, [TOTAL, ROWS, WIDTH], TILE),)
    else:
        coming = smem
    ds_smem = (
        gl.allocate_shared_memory(gl.bfloat16, [1, ROWS, ROWS], SQUARE),
        gl.allocate_shared_memory(gl.bfloat16, [1, ROWS, ROWS], SQUARE),
    )
    end = SAMPLES[0] * HEADS
    half = 0
    if AHEAD:
        lse, dlse = fetch(
            gl.program_id(0), end, half, coming, v_smem, q_ptrs, k_ptrs, v_ptrs, o_ptrs, do_ptrs, lse_ptrs, dlse_ptrs, LENGTHS,
            Q_STRIDES_, K_STRIDES_, V_STRIDES_, V_AT, HEADS, SHIFTED, BLOCKS_,
        )  # fmt: skip
    for unit in range(gl.program_id(0), end, gl.num_programs(0)):
        if not AHEAD:
            lse, dlse = fetch(
                unit, end, half, coming, v_smem, q_ptrs, k_ptrs, v_ptrs, o_ptrs, do_ptrs, lse_ptrs, dlse_ptrs, LENGTHS,
                Q_STRIDES_, K_STRIDES_, V_STRIDES_, V_AT, HEADS, SHIFTED, BLOCKS_,
            )  # fmt: skip
        await_copies(0)
        arrived = ()
        for b in gl.static_range(TOTAL):
            do = coming[2].index(b).load(CHUNKS)
            o = coming[3].index(b).load(CHUNKS)
            delta = gl.sum(o.to(gl.float32) * do.to(gl.float32), 1)
            if SHIFTED:
                delta -= dlse[b]
            empty = lse[b] == float("-inf")
            rows = with_columns(gl.zeros_like(o), gl.where(empty, -1e30, lse[b] * (-1.0 / SCALE)), 0)
            rows = with_columns(rows, gl.where(empty, 0.0, -delta), 3)
            if AHEAD:
                arrived = arrived + ((coming[0].index(b).load(CHUNKS), coming[1].index(b).load(CHUNKS), do, rows),)
            else:
                arrived = arrived + (rows,)
        for b in gl.static_range(TOTAL):
            if AHEAD:
                for x in gl.static_range(4):
                    smem[x].index(b).store(arrived[b][x])
            else:
                rows_smem.index(b).store(arrived[b])
        fence_async_shared()
        if AHEAD:
            lse, dlse = fetch(
                unit + gl.num_programs(0), end, half ^ 1, coming, v_smem, q_ptrs, k_ptrs, v_ptrs, o_ptrs, do_ptrs, lse_ptrs,
                dlse_ptrs, LENGTHS, Q_STRIDES_, K_STRIDES_, V_STRIDES_, V_AT, HEADS, SHIFTED, BLOCKS_,
            )  # fmt: skip
        gradients(
            (unit // HEADS).to(gl.int64), unit % HEADS, half, smem, v_smem, ds_smem, dq_ptrs, dk_ptrs, dv_ptrs, LENGTHS,
            HEADS, SCALE, DQ_SCALE, DK_SCALE, BLOCKS_, LOOP,
        )  # fmt: skip
        if AHEAD:
            half ^= 1
