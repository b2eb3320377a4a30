"""ReLU linear attention of several token streams.

With k' = relu(k), q' = relu(q), per head, the sums over the tokens of all streams:
    S = sum_j k'_j^T v_j    z = sum_j k'_j    o_i = q'_i S / (q'_i . z + eps)
Katharopoulos et al. 2020, arXiv:2006.16236; the ReLU form: Cai et al. 2022, arXiv:2205.14756 (EfficientViT).

Backward, with den_i = q'_i . z + eps:
    dnum_i = do_i / den_i    dden_i = -(do_i . o_i) / den_i    dS = sum_i q'_i^T dnum_i    dz = sum_i q'_i dden_i
    dq'_i = S dnum_i + z dden_i    dk'_j = dS v_j + dz    dv_j = k'_j dS
One program per head sums the state, one per block of tokens reads it. Saved for the backward: q, k, v, S and z.
"""

from __future__ import annotations

from . import check
from ._triton import tl, triton
from .attention.joint import joined, joint_operands, mask_operands, split_streams
from .attention.plans import key_mask_inputs
from .attention.tokens import kept, load_tokens, stream_of
from .dots import for_dot
from .op import Call, Op, Plan, Spec, Streams, Target, cast, cdiv, next_power_of_2, remembered, row_stride, spec
from .streams import integers, over_streams


@triton.jit
def relu(x):
    return tl.where(x > 0, x, 0.0)


LEAST: tl.constexpr = tl.constexpr(2.0**-126)  # a smaller denominator is 0: that of a query that meets no key, where EPS is 0


@triton.jit
def quotient(x, den, EPS: tl.constexpr):
    """x / den, 0 where den is."""
    y = x / den
    return tl.where(den < LEAST, 0.0, y) if EPS < LEAST else y


@triton.jit
def load_state(state_ptr, norm_ptr, head, WIDTH: tl.constexpr, COLS: tl.constexpr):
    """S [COLS, COLS] and z [COLS] of one head of one sample, float32."""
    rows = tl.arange(0, COLS)
    inside = (rows < WIDTH)[:, None] & (rows < WIDTH)[None, :]
    state = tl.load(state_ptr + head * WIDTH * WIDTH + rows[:, None] * WIDTH + rows[None, :], mask=inside, other=0.0)
    return state, tl.load(norm_ptr + head * WIDTH + rows, mask=rows < WIDTH, other=0.0)


@triton.jit
def halves(x):
    """The first and the last columns of a tile [TOKENS, COLS]."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def add_product(
    y, x, state_ptr, first, WIDTH: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr, PART: tl.constexpr
):
    """y + x S, or y + x S^T, where x [TOKENS, COLS] stands for as many columns from `first` on: PART of them after the other."""
    if x.shape[1] > PART:
        low, high = halves(x)
        y = add_product(y, low, state_ptr, first, WIDTH, TRANSPOSED, PRECISION, PART)
        return add_product(y, high, state_ptr, first + x.shape[1] // 2, WIDTH, TRANSPOSED, PRECISION, PART)
    else:
        some = first + tl.arange(0, PART)
        every = tl.arange(0, y.shape[1])
        inside = (some < WIDTH)[:, None] & (every < WIDTH)[None, :]
        if TRANSPOSED:
            at = every[:, None] * WIDTH + some[None, :]
            part = tl.trans(tl.load(state_ptr + at, mask=tl.trans(inside), other=0.0))  # [PART, COLS]
        else:
            part = tl.load(state_ptr + some[:, None] * WIDTH + every[None, :], mask=inside, other=0.0)  # [PART, COLS]
        y = tl.dot(x, part, y, input_precision=PRECISION)
        tl.debug_barrier()  # else the next part is fetched before this one is used up, and all are held at once
        return y


@triton.jit
def times_state(
    x, state, state_ptr, head, WIDTH: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr, PART: tl.constexpr
):
    """x S, or x S^T [TOKENS, COLS]; S is `state`, or where a program holds PART of its rows at a time, read from memory."""
    if x.shape[1] == PART:
        return tl.dot(x, tl.trans(state) if TRANSPOSED else state, input_precision=PRECISION)
    else:
        y = tl.zeros(x.shape, tl.float32)
        return add_product(y, x, state_ptr + head * WIDTH * WIDTH, 0, WIDTH, TRANSPOSED, PRECISION, PART)


@triton.jit
def store_state(state_ptr, norm_ptr, head, state, norm, PRECISION: tl.constexpr, WIDTH: tl.constexpr, COLS: tl.constexpr):
    """S as the dots that read it take it, and z."""
    rows = tl.arange(0, COLS)
    inside = (rows < WIDTH)[:, None] & (rows < WIDTH)[None, :]
    tl.store(state_ptr + head * WIDTH * WIDTH + rows[:, None] * WIDTH + rows[None, :], for_dot(state, PRECISION), mask=inside)
    tl.store(norm_ptr + head * WIDTH + rows, norm, mask=rows < WIDTH)


@triton.jit
def linear_attention_state_body(
    k_ptrs,  # (B, L_s, H, d) per stream, tokens a stride apart
    v_ptrs,  # likewise
    key_mask_ptrs,  # (B, L_s) bool
    state_ptr,  # (B, H, d, d) float32
    norm_ptr,  # (B, H, d) float32
    LENGTHS,
    K_STRIDES_,
    V_STRIDES_,
    HEADS,
    WIDTH,  # d
    KEY_MASKS_,
    PRECISION,
    TOKENS,
    COLS,
):
    """Grid (B * H,): S and z of one head."""
    batch = (tl.program_id(0) // HEADS).to(tl.int64)
    head = tl.program_id(0) % HEADS
    cols = tl.arange(0, COLS)
    state = tl.zeros((COLS, COLS), tl.float32)
    norm = tl.zeros((COLS,), tl.float32)
    for t in tl.static_range(len(k_ptrs)):
        for start in range(0, LENGTHS[t], TOKENS):
            token = start + tl.arange(0, TOKENS)
            keep = kept(key_mask_ptrs[t], batch, token, LENGTHS[t], KEY_MASKS_[t])
            v = load_tokens(v_ptrs[t] + head * WIDTH, batch, token, LENGTHS[t], V_STRIDES_[t], cols, WIDTH, keep, False)
            k = load_tokens(k_ptrs[t] + head * WIDTH, batch, token, LENGTHS[t], K_STRIDES_[t], cols, WIDTH, keep, False)
            k = relu(for_dot(k, PRECISION)).to(k.dtype)  # [TOKENS, COLS]
            v = for_dot(v, PRECISION)
            if k.dtype != v.dtype:  # no 16-bit dtype holds all values of another
                k = k.to(tl.float32)
                v = v.to(tl.float32)
            state = tl.dot(tl.trans(k), v, state, input_precision=PRECISION)
            norm += tl.sum(k.to(tl.float32), 0)
    store_state(state_ptr, norm_ptr, tl.program_id(0).to(tl.int64), state, norm, PRECISION, WIDTH, COLS)


@triton.jit
def linear_attention_fwd_body(
    q_ptrs,
    key_mask_ptrs,
    state_ptr,
    norm_ptr,
    o_ptrs,  # (B, L_s, H, d)
    LENGTHS,
    Q_STRIDES_,
    HEADS,
    WIDTH,
    EPS,
    KEY_MASKS_,
    PRECISION,
    TOKENS,
    COLS,
    PART,  # rows of the state that a product holds at a time, COLS or fewer
):
    """Grid (B * H * blocks of TOKENS tokens over all streams,)."""
    blocks = 0
    for t in tl.static_range(len(q_ptrs)):
        blocks += tl.cdiv(LENGTHS[t], TOKENS)
    head = (tl.program_id(0) // blocks).to(tl.int64)  # counted over the batch
    batch = head // HEADS
    block = tl.program_id(0) % blocks
    _, q_ptr, length, stride, first = stream_of(block, q_ptrs, LENGTHS, Q_STRIDES_, TOKENS)
    _, o_ptr, _, _, _ = stream_of(block, o_ptrs, LENGTHS, Q_STRIDES_, TOKENS)
    _, key_mask_ptr, _, masked, _ = stream_of(block, key_mask_ptrs, LENGTHS, KEY_MASKS_, TOKENS)
    token = first + tl.arange(0, TOKENS)
    cols = tl.arange(0, COLS)
    keep = token < length
    if masked:
        keep = kept(key_mask_ptr, batch, token, length, True)
    state, norm = load_state(state_ptr, norm_ptr, head, WIDTH, COLS)
    q = load_tokens(q_ptr + head % HEADS * WIDTH, batch, token, length, stride, cols, WIDTH, keep, False)
    q = relu(for_dot(q, PRECISION).to(tl.float32))  # [TOKENS, COLS]
    den = tl.sum(q * norm[None, :], 1) + EPS
    o = quotient(times_state(q, state, state_ptr, head, WIDTH, False, PRECISION, PART), den[:, None], EPS)
    at = (batch * length + token)[:, None] * (HEADS * WIDTH) + head % HEADS * WIDTH + cols[None, :]
    o = tl.where(keep[:, None], o, 0.0)
    tl.store(o_ptr + at, o.to(o_ptr.dtype.element_ty), mask=(token < length)[:, None] & (cols < WIDTH)[None, :])


@triton.jit
def query_gradients(
    q, do, state, norm, state_ptr, head, WIDTH: tl.constexpr, EPS: tl.constexpr, PRECISION: tl.constexpr, PART: tl.constexpr
):
    """dnum [TOKENS, COLS] and dden [TOKENS] of a block of rectified queries."""
    den = tl.sum(q * norm[None, :], 1) + EPS
    o = quotient(times_state(q, state, state_ptr, head, WIDTH, False, PRECISION, PART), den[:, None], EPS)
    return for_dot(quotient(do, den[:, None], EPS), PRECISION), quotient(-tl.sum(do * o, 1), den, EPS)


@triton.jit
def linear_attention_bwd_state_body(
    q_ptrs,
    do_ptrs,  # (B, L_s, H, d)
    key_mask_ptrs,
    state_ptr,
    norm_ptr,
    dstate_ptr,  # (B, H, d, d) float32
    dnorm_ptr,  # (B, H, d) float32
    LENGTHS,
    Q_STRIDES_,
    HEADS,
    WIDTH,
    EPS,
    KEY_MASKS_,
    PRECISION,
    TOKENS,
    COLS,
    PART,  # rows of the state that a product holds at a time, COLS or fewer
):
    """Grid (B * H,): dS and dz of one head."""
    batch = (tl.program_id(0) // HEADS).to(tl.int64)
    head = tl.program_id(0) % HEADS
    cols = tl.arange(0, COLS)
    state, norm = load_state(state_ptr, norm_ptr, tl.program_id(0).to(tl.int64), WIDTH, COLS)
    dstate = tl.zeros((COLS, COLS), tl.float32)
    dnorm = tl.zeros((COLS,), tl.float32)
    for t in tl.static_range(len(q_ptrs)):
        for start in range(0, LENGTHS[t], TOKENS):
            token = start + tl.arange(0, TOKENS)
            keep = kept(key_mask_ptrs[t], batch, token, LENGTHS[t], KEY_MASKS_[t])
            q = load_tokens(q_ptrs[t] + head * WIDTH, batch, token, LENGTHS[t], Q_STRIDES_[t], cols, WIDTH, keep, False)
            do = load_tokens(do_ptrs[t] + head * WIDTH, batch, token, LENGTHS[t], HEADS * WIDTH, cols, WIDTH, keep, False)
            q = relu(for_dot(q, PRECISION).to(tl.float32))  # [TOKENS, COLS]
            dnum, dden = query_gradients(
                q, do.to(tl.float32), state, norm, state_ptr, tl.program_id(0).to(tl.int64), WIDTH, EPS, PRECISION, PART
            )
            dstate = tl.dot(tl.trans(q), dnum, dstate, input_precision=PRECISION)
            dnorm += tl.sum(q * dden[:, None], 0)
    store_state(dstate_ptr, dnorm_ptr, tl.program_id(0).to(tl.int64), dstate, dnorm, PRECISION, WIDTH, COLS)


@triton.jit
def linear_attention_bwd_body(
    q_ptrs,
    k_ptrs,
    v_ptrs,
    do_ptrs,
    key_mask_ptrs,
    state_ptr,
    norm_ptr,
    dstate_ptr,
    dnorm_ptr,
    dq_ptrs,  # (B, L_s, H, d)
    dk_ptrs,
    dv_ptrs,
    LENGTHS,
    Q_STRIDES_,
    K_STRIDES_,
    V_STRIDES_,
    HEADS,
    WIDTH,
    EPS,
    KEY_MASKS_,
    PRECISION,
    TOKENS,
    COLS,
    PART,  # rows of the state that a product holds at a time, COLS or fewer
):
    """Grid (B * H * blocks of TOKENS tokens over all streams,): dq, dk and dv of one block."""
    blocks = 0
    for t in tl.static_range(len(q_ptrs)):
        blocks += tl.cdiv(LENGTHS[t], TOKENS)
    head = (tl.program_id(0) // blocks).to(tl.int64)  # counted over the batch
    batch = head // HEADS
    block = tl.program_id(0) % blocks
    _, q_ptr, length, q_stride, first = stream_of(block, q_ptrs, LENGTHS, Q_STRIDES_, TOKENS)
    _, k_ptr, _, k_stride, _ = stream_of(block, k_ptrs, LENGTHS, K_STRIDES_, TOKENS)
    _, v_ptr, _, v_stride, _ = stream_of(block, v_ptrs, LENGTHS, V_STRIDES_, TOKENS)
    _, do_ptr, _, _, _ = stream_of(block, do_ptrs, LENGTHS, Q_STRIDES_, TOKENS)
    _, dq_ptr, _, _, _ = stream_of(block, dq_ptrs, LENGTHS, Q_STRIDES_, TOKENS)
    _, dk_ptr, _, _, _ = stream_of(block, dk_ptrs, LENGTHS, Q_STRIDES_, TOKENS)
    _, dv_ptr, _, _, _ = stream_of(block, dv_ptrs, LENGTHS, Q_STRIDES_, TOKENS)
    _, key_mask_ptr, _, masked, _ = stream_of(block, key_mask_ptrs, LENGTHS, KEY_MASKS_, TOKENS)
    token = first + tl.arange(0, TOKENS)
    cols = tl.arange(0, COLS)
    keep = token < length
    if masked:
        keep = kept(key_mask_ptr, batch, token, length, True)
    at_head = head % HEADS * WIDTH
    inside = (token < length)[:, None] & (cols < WIDTH)[None, :]
    at = (batch * length + token)[:, None] * (HEADS * WIDTH) + at_head + cols[None, :]

    state, norm = load_state(state_ptr, norm_ptr, head, WIDTH, COLS)
    q = load_tokens(q_ptr + at_head, batch, token, length, q_stride, cols, WIDTH, keep, False)
    q = for_dot(q, PRECISION).to(tl.float32)  # [TOKENS, COLS]
    do = load_tokens(do_ptr + at_head, batch, token, length, HEADS * WIDTH, cols, WIDTH, keep, False).to(tl.float32)
    dnum, dden = query_gradients(relu(q), do, state, norm, state_ptr, head, WIDTH, EPS, PRECISION, PART)
    dq = times_state(dnum, state, state_ptr, head, WIDTH, True, PRECISION, PART) + dden[:, None] * norm[None, :]
    tl.store(dq_ptr + at, tl.where(keep[:, None] & (q > 0), dq, 0.0).to(dq_ptr.dtype.element_ty), mask=inside)

    dstate, dnorm = load_state(dstate_ptr, dnorm_ptr, head, WIDTH, COLS)
    k = load_tokens(k_ptr + at_head, batch, token, length, k_stride, cols, WIDTH, keep, False)
    k = for_dot(k, PRECISION).to(tl.float32)
    v = load_tokens(v_ptr + at_head, batch, token, length, v_stride, cols, WIDTH, keep, False)
    v = for_dot(v, PRECISION).to(tl.float32)
    dk = times_state(v, dstate, dstate_ptr, head, WIDTH, True, PRECISION, PART) + dnorm[None, :]
    tl.store(dk_ptr + at, tl.where(keep[:, None] & (k > 0), dk, 0.0).to(dk_ptr.dtype.element_ty), mask=inside)
    dv = times_state(relu(k), dstate, dstate_ptr, head, WIDTH, False, PRECISION, PART)
    tl.store(dv_ptr + at, tl.where(keep[:, None], dv, 0.0).to(dv_ptr.dtype.element_ty), mask=inside)


def rows_at_a_time(target: Target, cols: int, tokens: int, precision: str) -> int:
    """Rows of the state that a product holds: all of them, but

    - 16 in IEEE float32 above width 64, where whole rows of operands do not fit the registers: 1 to 3 KB were spilled, and with
      16 rows nothing is, on sm_80, sm_90 and sm_120;
    - as many as shared memory holds, S and its transpose beside two tiles of tokens (tests/test_plans.py asks the compiler).
    """
    if precision == "ieee" and cols > 64:
        return 16
    return next(rows for rows in (cols, 64, 32, 16) if 8 * cols * (rows + tokens) <= target.shared or rows == 16)


@remembered
def plan(
    target: Target, body, lengths: tuple[int, ...], heads: int, per_block: bool, outs: tuple[Spec, ...], constants: tuple, d: int,
    precision: str,
) -> Plan:  # fmt: skip
    """One program per head, or one per head and block of tokens."""
    cols = max(16, next_power_of_2(d))
    tokens = 16 if precision != "tf32" and cols > 32 else 64 if cols <= 64 else 32
    tile = dict(TOKENS=tokens, COLS=cols)
    if "EPS" in dict(constants):  # a kernel that multiplies with the state
        tile |= dict(PART=rows_at_a_time(target, cols, tokens, precision))
    return Plan(
        over_streams(body, len(lengths)),
        grid=(heads * (sum(cdiv(L, tokens) for L in lengths) if per_block else 1),),
        outs=outs,
        ints=integers(LENGTHS=lengths),
        meta=dict(constants) | tile,
        warps=4 if cols <= 64 else 8,
    )


class Launches:
    """Plans of one call: constants are those that the body names."""

    def __init__(self, a, eps: float, precision: str):
        self.a, self.n = a, len(a.q)
        self.B, _, self.H, self.d = a.q[0].shape
        # The state is float32. Its 11 bits in tf32 do for bfloat16's 8; float16 has 11 itself, and takes three tf32 products.
        low = {spec(x[0]).dtype for x in (a.q, a.k, a.v)}
        self.precision = precision if "float32" in low else "tf32" if low == {"bfloat16"} else "tf32x3"
        self.eps = eps

    def plan(self, target: Target, body, outs, *, strides: str, per_block: bool, eps: bool = True) -> Plan:
        constants = dict(HEADS=self.H, WIDTH=self.d, PRECISION=self.precision) | (dict(EPS=self.eps) if eps else {})
        for i in range(self.n):
            constants |= {f"{x}_STRIDE{i}": row_stride(getattr(self.a, x.lower())[i], 2) for x in strides}
            constants[f"KEY_MASK{i}"] = self.a.key_masks[i] is not None
        lengths = tuple(q.shape[1] for q in self.a.q)
        given = tuple(constants.items())
        return plan(target, body, lengths, self.B * self.H, per_block, tuple(outs), given, self.d, self.precision)

    def state_specs(self) -> tuple[Spec, Spec]:
        return Spec((self.B, self.H, self.d, self.d), "float32"), Spec((self.B, self.H, self.d), "float32")


def infer(a, *, eps, precision):
    return tuple(Spec(tuple(v.shape), spec(v).dtype) for v in a.v), Launches(a, eps, precision).state_specs()


def forward(run, a, *, eps, precision):
    launches = Launches(a, eps, precision)
    p = launches.plan(run.target, linear_attention_state_body, launches.state_specs(), strides="KV", per_block=False, eps=False)
    state = tuple(run(p, *a.k, *a.v, *key_mask_inputs(a)))
    outs, _ = infer(a, eps=eps, precision=precision)
    p = launches.plan(run.target, linear_attention_fwd_body, outs, strides="Q", per_block=True)
    return tuple(run(p, *a.q, *key_mask_inputs(a), *state)), state


def backward(run, a, outs, extras, douts, *, eps, precision):
    launches, n = Launches(a, eps, precision), len(a.q)
    p = launches.plan(run.target, linear_attention_bwd_state_body, launches.state_specs(), strides="Q", per_block=False)
    dstate = run(p, *a.q, *douts, *key_mask_inputs(a), *extras)
    grads = [Spec(tuple(x.shape), spec(x).dtype) for x in (*a.q, *a.k, *a.v)]
    p = launches.plan(run.target, linear_attention_bwd_body, grads, strides="QKV", per_block=True)
    d = tuple(run(p, *a.q, *a.k, *a.v, *douts, *key_mask_inputs(a), *extras, *dstate))
    return dict(q=d[:n], k=d[n : 2 * n], v=d[2 * n :])


def reference(xp, a, *, eps, precision):
    lengths = [x.shape[1] for x in a.q]
    q, k, v = joined(xp, a.q, a.k, a.v, a.key_masks)
    q, k = (xp.where(x > 0, x, xp.zeros_like(x)) for x in (q, k))
    den = xp.einsum("bihc,bhc->bih", q, xp.sum(k, axis=1)) + eps
    o = xp.einsum("bihc,bhcd->bihd", q, xp.einsum("bjhc,bjhd->bhcd", k, v))
    least = dict(float32=2.0**-126, float64=2.0**-1022)[spec(o).dtype]
    if eps < least:
        none, den = (den < least)[..., None], den[..., None]
        lift = xp.where(den < 2.0**-60, 2.0**90, 1.0)  # JAX's derivative of a quotient squares the denominator, which underflows
        o = xp.where(none, 0.0, o * lift / xp.where(none, 1.0, den * lift))
    else:
        o = o / den[..., None]
    return tuple(cast(x, spec(a.v[0]).dtype) for x in split_streams(o, lengths, 1))


relu_linear_attention_op = Op(
    "relu_linear_attention",
    operands=("q", "k", "v", "key_masks"),
    infer=infer,
    forward=forward,
    backward=backward,
    reference=reference,
    keeps=frozenset({"q", "k", "v", "key_masks"}),
    constant=frozenset({"key_masks"}),
    dense={"q": 2, "k": 2, "v": 2},
)


def relu_linear_attention(
    q: Streams, k: Streams, v: Streams, *, key_masks: Streams | None = None, eps: float = 1e-6, precision: str = "ieee"
) -> Call:
    """o_i = relu(q_i) S / (relu(q_i) . z + eps),  S = sum_j relu(k_j)^T v_j,  z = sum_j relu(k_j), j over all streams.

    q, k, v    (B, L_s, H, d) per stream, float32, bfloat16 or float16, each its own; d a multiple of 8, 8 to 128. A single array
               is one stream.
    key_masks  per stream (B, L_s) bool or None, True = a real token. A masked token is silent both ways, as in
               joint_attention.
    eps        added to the denominator, 0 or more. The denominator is 0 for a query without a positive element, as for one whose
               positive elements no key shares; with eps 0 its output is 0 then, and so are its gradients.
    returns    (B, L_s, H, d) per stream in v's dtype (docs/dtypes.md); the state is float32. float32 dots as in joint_attention.

    Linear in the number of tokens. Katharopoulos et al. 2020, arXiv:2006.16236; Cai et al. 2022, arXiv:2205.14756.
    """
    op = "relu_linear_attention"
    operands, single = joint_operands(op, q, k, v, grouped=False)
    operands |= {"key_masks": mask_operands(op, "q", operands["q"], None, key_masks)["key_masks"]}
    check.choice(op, "precision", precision, ("ieee", "tf32"))
    static = dict(eps=check.eps(op, eps), precision=precision)
    return Call(relu_linear_attention_op, operands, tuple(static.items()), (lambda outs: outs[0]) if single else tuple)
