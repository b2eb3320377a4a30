"""Launches of joint attention: tiles, masks, and which kernels run forward and backward."""

from __future__ import annotations

import math

from .. import tuned
from ..op import UNUSED, Plan, Spec, Target, aligned, cdiv, next_power_of_2, remembered, row_stride, spec
from ..streams import integers, over_streams
from .backward import (
    PAD,
    PARTS,
    attention_delta_body,
    attention_round_body,
    joint_attention_bwd_dkdv_body,
    joint_attention_bwd_dq_body,
)
from .forward import joint_attention_fwd_body, joint_attention_repair_body
from .hopper import CONSUMERS, ROWS, joint_attention_hopper_body
from .hopper_backward import KEYS, joint_attention_hopper_bwd_body
from .hopper_short_backward import joint_attention_hopper_short_bwd_body
from .short import joint_attention_short_fwd_body
from .single_pass import joint_attention_bwd_body
from .tokens import mask_any_kernel

LOG2E = math.log2(math.e)


def columns(target: Target, kind: str, d: int, dtype: str, masked: bool) -> int:
    """Columns that a kernel computes for heads of width d: a sum of powers of two, each of them a tile (see tokens.py).

    A second tile costs instructions and waits. By measurement on Hopper (docs/facts.md) 64 + 16 and 64 + 32 are faster than
    128, and 32 + 16 than 64 in the backward without masks; 64 + 32 + 16 is slower. On sm_80 and sm_100 they spill.
    """
    cols = 16 * cdiv(d, 16)
    pays = cols in (80, 96) or (cols == 48 and kind in ("dq", "dkdv") and not masked)
    return cols if pays and target.arch == 90 and dtype != "float32" else max(16, next_power_of_2(d))


def tiles(kind: str, cols: int, dtype: str, precision: str) -> tuple[dict[str, int], int, int]:
    """Tile, warps and stages of a kernel ("dkdv", "dq", or "fwd" with a running maximum).

    IEEE float32 dots run on the FMA pipes with whole operand rows in registers: small tiles and 8 warps, or they spill by the
    kilobyte; 32 columns at least, for `tile_products` to halve.
    """
    if dtype == "float32" and precision == "ieee":
        cols = max(32, cols)
        size = 32 if cols == 32 else 16
        return dict(QUERIES=size, KEYS=size, COLS=cols), 8, 1
    if dtype == "float32" and cols == 128:  # in tf32 an operand is held twice, and 64 of each would not fit an A100
        return dict(QUERIES=32, KEYS=32, COLS=cols), 8, 1
    keys = 32 if kind == "fwd" and cols <= 32 else 64  # 64 spill
    return dict(QUERIES=64, KEYS=keys, COLS=cols), 8 if cols == 128 else 4, 2 if dtype != "float32" else 1


SHORT = 256  # joint lengths up to which narrow heads load all their keys at once, and few queries a program pay
MIDDLE = 1024  # up to which few queries a program keep the GPU busy


def unshifted_tiles(cols: int, dtype: str, keys: int, masked: bool) -> tuple[dict[str, int], int, int]:
    """Tile, warps and stages of the forward without a running maximum.

    Measured in docs/facts.md. Below head width 64 instruction issue binds, and what counts is how many warps share the issue
    slots: few registers for short sequences, more queries a warp for long ones. Above, the tensor cores bind, and wgmma wants
    as many queries as registers hold.
    """
    if dtype == "float32":
        return dict(QUERIES=64 if cols <= 64 else 32, KEYS=64, COLS=cols), 8 if cols > 64 else 4, 1
    if keys <= SHORT and cols <= 32:
        return dict(QUERIES=64, KEYS=64, COLS=cols), 4, 1
    if cols == 16:
        return dict(QUERIES=64 if keys <= MIDDLE else 128, KEYS=64, COLS=cols), 2, 3
    if cols == 32:
        return dict(QUERIES=64, KEYS=64, COLS=cols), 4, 3
    if keys <= SHORT and cols < 128:
        return dict(QUERIES=64, KEYS=64 if cols == 64 else 32, COLS=cols), 4, 3
    if cols < 128:
        return dict(QUERIES=128, KEYS=32 if masked else 64, COLS=cols), 4, 4 if cols == 64 or masked else 3  # 64 spill with masks
    return dict(QUERIES=128, KEYS=64, COLS=cols), 8, 3


TOKENS = 64  # of a block in the kernels that keep a whole head, the forward in shared memory, the backward in registers
BLOCKS = 4  # most that they keep: more were slower, or spill
MASKED_BLOCKS = 6  # on Hopper with key masks, where the forward by blocks of queries is much slower


def backward_tiles(kind: str, cols: int, keys: int, masked: bool) -> tuple[dict[str, int], int, int]:
    """Tile, warps and stages of a backward kernel in 16 bits ("single", "dkdv" or "dq"), by measurement (docs/facts.md).

    Every kernel waits for its products and exponentials in turn, so what counts is how many programs share a multiprocessor:
    tiles of 64 x 64, or half of that for short sequences, and three stages, which hide the loads.
    """
    tile = lambda queries, keys: dict(QUERIES=queries, KEYS=keys, COLS=cols)
    if kind == "single":
        return tile(TOKENS, TOKENS), 4, 1
    if cols == 16 and keys <= MIDDLE:
        return (tile(32, 64) if kind == "dkdv" else tile(64, 32)), 2, 3
    if cols < 128:
        return tile(64, 64), 4, 3
    if kind == "dkdv":
        return tile(64, 64), 4, 2
    return (tile(64, 64), 8, 2) if masked else (tile(128, 64), 8, 3)  # a mask's registers spill there


def rule(kind: str, cols: int, dtype: str, keys: int, masked: bool) -> tuple[dict[str, int], int, int]:
    """What `configuration` takes of a kernel that can be tuned, where nobody has."""
    return unshifted_tiles(cols, dtype, keys, masked) if kind == "unshifted" else backward_tiles(kind, cols, keys, masked)


SMALLER = ((64, 64), (64, 32), (32, 32))
"""Queries and keys of the tiles that follow where shared memory holds no larger ones, 99 KB on an RTX 3090, 4090 or 5090. At head
width 128 in bfloat16 dq takes the first, which spills nothing on sm_86, sm_89 and sm_120, in place of 128 queries."""


def shared_bytes(a, kind: str, tile: dict[str, int], stages: int) -> int:
    """Bytes of shared memory that "fwd", "unshifted", "dq" or "dkdv" asks for, at most: tests/test_plans.py asks the compiler.

    A program keeps tiles of its own, q (and do), or k and v; it walks the others, of which as many copies are in flight as are
    loaded ahead. Besides, threads exchange P and dS, or what they walk once more: transposed, silenced by a key mask, in tf32.
    This holds where tensor cores read registers. Those that read shared memory ask for up to half as much again, and have it:
    such GPUs have 227 KB.
    """
    size = lambda x: 4 if spec(x).dtype == "float32" else 2
    q, k, v = size(a.q[0]), size(a.k[0]), size(a.v[0])
    own, walked = (tile["KEYS"], tile["QUERIES"]) if kind == "dkdv" else (tile["QUERIES"], tile["KEYS"])
    forward = kind in ("fwd", "unshifted")
    kept = own * tile["COLS"] * v * (1 if forward else 2)
    row = tile["COLS"] * (q + v) + 8 if kind == "dkdv" else tile["COLS"] * (k + v)  # with two statistics
    in_flight = max(1, stages - 1) * walked * row
    exchanged = 0 if kind == "unshifted" else max(2 * tile["QUERIES"] * tile["KEYS"] * v, walked * tile["COLS"] * v)
    if kind != "unshifted" and (v == 4 or (has_key_masks(a) and kind != "dkdv")):
        exchanged = max(exchanged, 2 * walked * tile["COLS"] * v)
    return max(32 * 1024, kept + in_flight + exchanged)


def fitting(target: Target, a, kind: str, best: tuple[dict[str, int], int, int]) -> tuple[dict[str, int], int, int]:
    """The best configuration where the GPU has the shared memory for it, else with fewer stages, else in a smaller tile."""
    tile, warps, stages = best
    ladder = [(tile, warps, n) for n in range(stages, 0, -1)]
    for queries, keys in SMALLER:
        smaller = tile | dict(QUERIES=min(queries, tile["QUERIES"]), KEYS=min(keys, tile["KEYS"]))
        ladder.append((smaller, warps, min(stages, 2)))
    return next((c for c in ladder if shared_bytes(a, kind, c[0], c[2]) <= target.shared), ladder[-1])


def configuration(target: Target, a, kind: str, causal: bool, precision: str) -> tuple[dict[str, int], int, int]:
    """Tile, warps and stages of a kernel: "fwd", with a running maximum, "unshifted", "single", "dq" or "dkdv"."""
    best = preferred(target, a, kind, causal, precision)
    return best if kind == "single" or is_exact(a, precision) else fitting(target, a, kind, best)


def preferred(target: Target, a, kind: str, causal: bool, precision: str) -> tuple[dict[str, int], int, int]:
    """`configuration` where shared memory is no limit."""
    d, dtype, keys = a.q[0].shape[3], spec(a.v[0]).dtype, sum(lengths(a))
    masked = a.attn_mask is not None or causal or (kind == "unshifted" and has_key_masks(a))
    cols = columns(target, kind, d, dtype, masked)
    if kind == "fwd" or (dtype == "float32" and kind != "unshifted"):
        return tiles(kind, cols, dtype, precision)
    reach = "short" if keys <= SHORT else "middle" if keys <= MIDDLE else "long"
    key = tuned.Key(f"joint_attention_{kind}-{reach}{'-masked' * masked}", cols, dtype, target.arch)
    measured = None if dtype == "float32" else tuned.lookup(key)
    return measured or rule(kind, cols, dtype, keys, masked)


def candidates(key: tuned.Key) -> list[tuple[dict[str, int], int, int]]:
    """What tuning should try: 16 to 128 scores a thread, and stages where there is a loop for them."""
    kind, _, reach = key.kernel.removeprefix("joint_attention_").partition("-")
    if kind not in ("unshifted", "single", "dq", "dkdv"):
        return []
    queries = (64, 128) if kind == "unshifted" else (TOKENS,) if kind == "single" else (32, 64, 128)
    at_once = kind == "single" or (kind == "unshifted" and reach == "short" and key.width <= 32)
    stages = (1,) if at_once else (1, 2, 3, 4)
    tiles = [(q, k, w) for q in queries for k in (32, 64, 128) for w in (2, 4, 8) if 16 <= q * k // (32 * w) <= 128]
    return [(dict(QUERIES=q, KEYS=k, COLS=key.width), w, s) for q, k, w in tiles for s in stages]


def folded_scale(scale: float, dtype: str) -> float | None:
    """The factor that whoever makes q may multiply it by before rounding, in place of a multiplication per score; None where q
    might leave the dtype's range, or float32 show the rounding."""
    factor = scale * LOG2E
    return factor if dtype == "bfloat16" and 2.0**-6 <= factor <= 2.0**6 else None


def meta(
    target: Target, a, kind: str, *, causal: bool, scale: float, precision: str, v_at: int = 0, folded: bool = False, **more
) -> tuple[dict, int, int]:
    n = len(a.q)
    exact = is_exact(a, precision)
    tile, warps, stages = configuration(target, a, kind, causal, precision)
    constants = dict(
        V_AT=v_at,
        HEADS=a.q[0].shape[2],
        GROUP=heads_per_key(a),
        WIDTH=a.q[0].shape[3],
        SCALE=1.0 if folded else scale if exact else scale * LOG2E,
        CAUSAL=causal,
        MASKED=0 if a.attn_mask is None else 1 if n == 1 else 2,
        PRECISION=precision,
        EXACT=exact,
    )
    for i in range(n):
        constants |= {f"Q_STRIDE{i}": row_stride(a.q[i], 2), f"K_STRIDE{i}": row_stride(a.k[i], 2)}
        constants |= {
            f"V_STRIDE{i}": row_stride(a.v[i], 3 if len(a.v[i].shape) == 5 else 2),
            f"KEY_MASK{i}": a.key_masks[i] is not None,
        }
    return constants | more | tile, warps, stages


@remembered
def plan(
    body,
    lengths: tuple[int, ...],
    programs: int,
    block: int | None,
    outs: tuple[Spec, ...],
    constants: tuple,
    warps: int,
    stages: int,
) -> Plan:
    """`programs` are launched, for each block of `block` tokens of each stream if there is one."""
    return Plan(
        over_streams(body, len(lengths)),
        grid=(programs * sum(cdiv(L, block) for L in lengths) if block else programs,),
        outs=outs,
        ints=integers(LENGTHS=lengths),
        meta=dict(constants),
        warps=warps,
        stages=stages,
    )


@remembered
def delta_plan(
    lengths: tuple[int, ...],
    statistics: tuple[Spec, ...],
    H: int,
    d: int,
    shifted: bool,
    exact: bool,
    lock_tokens: int = 0,
    locks: Spec = UNUSED,
    scale: float = 0.0,
) -> Plan:
    """lock_tokens, locks, scale: the queries of a block, the locks and the SCALE of joint_attention_hopper_bwd_body."""
    cols = next_power_of_2(d)
    rows = max(1, 2048 // cols)
    reach = [L if exact else cdiv(L, PAD.value) * PAD.value for L in lengths]
    return Plan(
        over_streams(attention_delta_body, len(lengths)),
        grid=(statistics[0].shape[0] * sum(cdiv(L * H, rows) for L in reach),),
        outs=(*statistics, locks),
        ints=integers(LENGTHS=lengths),
        meta=dict(HEADS=H, WIDTH=d, SHIFTED=shifted, EXACT=exact, LOCK_TOKENS=lock_tokens, SCALE=scale, ROWS=rows, COLS=cols),
        warps=4,
    )


@remembered
def walking_plan(
    kernel, lengths: tuple[int, ...], B: int, programs: int, outs: tuple[Spec, ...], constants: tuple,
    warps: int = 4, stages: int = 1, aliases: tuple[tuple[int, int], ...] = (),
) -> Plan:  # fmt: skip
    """A launch of programs that walk the heads of B samples, or tiles of them."""
    n = len(lengths)
    ints = integers(LENGTHS=lengths, SAMPLES=(B,) * n)
    return Plan(over_streams(kernel, n), (programs,), outs, ints, dict(constants), warps, stages, dict(aliases))


def statistics_specs(a) -> tuple[Spec, ...]:
    """Two numbers for each row that the backward computes first."""
    B, _, H, _ = a.q[0].shape
    return tuple(Spec((B, H, cdiv(L, PAD.value) * PAD.value, 2), "float32") for L in lengths(a))


def heads_per_key(a) -> int:
    """Heads of q that share one of k and v: grouped-query attention, Ainslie et al. 2023, arXiv:2305.13245."""
    return a.q[0].shape[2] // a.k[0].shape[2]


def lengths(a) -> tuple[int, ...]:
    return tuple(q.shape[1] for q in a.q)


def has_key_masks(a) -> bool:
    return any(m is not None for m in a.key_masks)


def key_mask_inputs(a) -> tuple:
    """Key masks; an absent one is replaced by an array that is not read, of the same dtype for all streams."""
    absent = next((m for m in a.key_masks if m is not None), a.q[0])
    return tuple(absent if m is None else m for m in a.key_masks)


def mask_inputs(a, anys) -> tuple:
    """Key masks, mask, and any() of its rows and columns; an absent one is replaced by an array that is not read."""
    rows, cols = anys or (a.q[0], a.q[0])
    return (*key_mask_inputs(a), a.q[0] if a.attn_mask is None else a.attn_mask, rows, cols)


@remembered
def any_plan(mask: Spec) -> Plan:
    B, L, _ = mask.shape
    lines = 16
    outs = (Spec((B, L), "bool"),) * 2
    return Plan(
        mask_any_kernel,
        grid=(2 * B * cdiv(L, lines),),
        outs=outs,
        ints=dict(LENGTH=L),
        meta=dict(LINES=lines, ALONG=128),
        warps=4,
    )


def o_specs(a) -> tuple[Spec, ...]:
    return tuple(Spec(tuple(q.shape), spec(a.v[0]).dtype) for q in a.q)


def is_exact(a, precision: str) -> bool:
    """Whether float32 is wanted to the last bit, and scores are in base e, not 2."""
    return spec(a.v[0]).dtype == "float32" and precision == "ieee"


def log_specs(a) -> tuple[Spec, ...]:
    return tuple(Spec((q.shape[0], q.shape[2], q.shape[1]), "float32") for q in a.q)


def lse_specs(a, precision: str) -> tuple[Spec, ...]:
    """What the backward needs of each row: the log-sum-exp, or the largest score and the sum."""
    return tuple(Spec((*s.shape, 2), s.dtype) if is_exact(a, precision) else s for s in log_specs(a))


def any_specs(a) -> tuple[Spec, ...]:
    augmented = a.attn_mask is not None and len(a.q) > 1
    return (Spec(tuple(a.attn_mask.shape[:2]), "bool"),) * 2 if augmented else ()


def attention_forward(run, a, *, return_lse: bool, precision: str, **static):
    """Outputs, followed by the log-sum-exps where they are wanted, and residuals: what `lse_specs` says of each
    row, and the mask's any() vectors.

    folded: q has been multiplied by scale * log2(e) (see folded_scale). dq is the gradient of q before that.
    """
    if on_hopper(run.target, a, static["causal"]):
        return hopper_forward(run, a, return_lse=return_lse, precision=precision, **static)
    if spec(a.v[0]).dtype != "float32" and a.attn_mask is None and not static["causal"] and is_short(run.target, a):
        return short_forward(run, a, return_lse=return_lse, precision=precision, **static)
    B, _, H, _ = a.q[0].shape
    anys = tuple(run(any_plan(spec(a.attn_mask)), a.attn_mask)) if any_specs(a) else ()
    n = len(a.q)
    # A row of a mask that is empty would send its block the long way for nothing.
    shifted = is_exact(a, precision) or a.attn_mask is not None
    more = dict(LOGS=return_lse, SHIFTED=shifted)
    constants, warps, stages = meta(run.target, a, "fwd" if shifted else "unshifted", precision=precision, **more, **static)
    at_once = not shifted and not static["causal"] and constants["COLS"] <= 32 and sum(lengths(a)) <= SHORT
    constants |= {f"KEY_BLOCK{i}": cdiv(L, constants["KEYS"]) if at_once else 0 for i, L in enumerate(lengths(a))}
    # With more streams than one, more loops bid for registers, and how many programs run at once hangs on that (docs/facts.md).
    small = n > 1 and constants["COLS"] == 16 and sum(lengths(a)) <= MIDDLE
    constants |= dict(SHIFTED_QUERIES=32 if small else min(64, constants["QUERIES"]), SHIFTED_KEYS=16 if small else 32)
    outs = forward_specs(a, return_lse, precision)
    p = plan(joint_attention_fwd_body, lengths(a), B * H, constants["QUERIES"], outs, tuple(constants.items()), warps, stages)
    results = tuple(run(p, *a.q, *a.k, *a.v, *mask_inputs(a, anys)))
    o, lse, log = results[:n], results[n : 2 * n], results[2 * n :]
    return (o + log if return_lse else o), lse + anys


def blocks_of(a) -> dict[str, int]:
    return {f"BLOCK{i}": cdiv(L, TOKENS) for i, L in enumerate(lengths(a))}


def fits(target: Target, a) -> bool:
    """Whether a head is small enough for a program to keep all of it."""
    most = MASKED_BLOCKS if has_key_masks(a) and target.arch == 90 else BLOCKS
    return a.q[0].shape[3] <= 16 and 1 <= sum(blocks_of(a).values()) <= most


def is_short(target: Target, a) -> bool:
    """Whether the forward takes one program a head: fewer heads leave multiprocessors idle that blocks of queries would use."""
    return fits(target, a) and a.q[0].shape[0] * a.q[0].shape[2] >= target.sms


def short_forward(run, a, *, return_lse: bool, precision: str, **static):
    """attention_forward where `is_short`. 4 warps, no loop that stages could serve (docs/facts.md)."""
    B, _, H, _ = a.q[0].shape
    n, unused = len(a.q), ("CAUSAL", "MASKED", "EXACT", "QUERIES")
    constants, _, _ = meta(run.target, a, "fwd", precision=precision, LOGS=return_lse, **static)
    # What takes most registers is the way with a running maximum, with masks the more: how many programs run at once hangs on it.
    keys = 16 if has_key_masks(a) else 32
    constants = {name: x for name, x in constants.items() if name not in unused} | blocks_of(a) | dict(TOKENS=TOKENS, KEYS=keys)
    outs = forward_specs(a, return_lse, precision)
    p = plan(joint_attention_short_fwd_body, lengths(a), B * H, None, outs, tuple(constants.items()), 4, 1)
    results = tuple(run(p, *a.q, *a.k, *a.v, *key_mask_inputs(a)))
    return (results[:n] + results[2 * n :] if return_lse else results[:n]), results[n : 2 * n]


def forward_specs(a, return_lse: bool, precision: str) -> tuple[Spec, ...]:
    return o_specs(a) + lse_specs(a, precision) + (log_specs(a) if return_lse else (UNUSED,) * len(a.q))


WORTHWHILE = 48  # blocks of keys for each multiprocessor to walk, below which the kernel for Hopper gains nothing


def is_loadable(target: Target, a, *others) -> bool:
    """Whether there is Gluon for Hopper, and it can load q, k, v and the others: bfloat16, rows of whole pieces of 16 bytes."""
    return (
        target.gluon
        and target.arch == 90
        and all(spec(x).dtype == "bfloat16" for x in (a.q[0], a.k[0], a.v[0]))
        and all(aligned(x, 3 if len(x.shape) == 5 else 2) for x in (*a.q, *a.k, *a.v, *others))
    )


def for_hopper(target: Target, a, causal: bool, *others) -> bool:
    """Whether a call is one that the kernels for long sequences on Hopper know; others: what they load besides q, k and v."""
    if a.attn_mask is not None or causal or has_key_masks(a):
        return False
    if len(a.q) > 2 or heads_per_key(a) > 1 or a.q[0].shape[0] == 0 or min(lengths(a)) < 128:
        return False
    return is_loadable(target, a, *others)


def on_hopper(target: Target, a, causal: bool) -> bool:
    """Whether the forward takes the kernel for Hopper, which is worth it if there is enough to do."""
    B, _, H, d = a.q[0].shape
    return d in (32, 64, 128) and for_hopper(target, a, causal) and is_worthwhile(target, lengths(a), B * H, d)


def is_worthwhile(target: Target, lengths: tuple[int, ...], heads: int, d: int) -> bool:
    """Whether the kernel for Hopper is faster, by measurement (docs/facts.md). At width 32, where it gains least, only on long
    sequences, and where the rounds of tiles of all multiprocessors are at least 90% full."""
    tiles, blocks = hopper_tiles(lengths, heads), sum(cdiv(L, hopper_keys(d)) for L in lengths)
    room = cdiv(tiles, target.sms) * target.sms * CONSUMERS.value * ROWS.value
    full = sum(lengths) >= MIDDLE and heads * sum(lengths) >= 0.9 * room
    return tiles * blocks >= WORTHWHILE * target.sms and (d > 32 or full)


def hopper_keys(d: int) -> int:
    """Keys of a block: three stages of k and v, and 192 queries, fill the shared memory; below width 64, registers."""
    return min(128, 8192 // d)


def hopper_tiles(lengths: tuple[int, ...], heads: int) -> int:
    """Tiles of queries, of all heads of all samples."""
    return heads * cdiv(sum(cdiv(L, ROWS.value) for L in lengths), CONSUMERS.value)


def picked(constants: dict, *names: str) -> dict:
    """Those of meta's constants that a kernel for Hopper takes: these, and the row strides."""
    return {name: x for name, x in constants.items() if name in names or "STRIDE" in name}


def hopper_forward(run, a, *, return_lse: bool, precision: str, **static):
    """attention_forward in two launches, the second of which repairs what the first found out of range."""
    B, _, H, d = a.q[0].shape
    n = len(a.q)
    constants, _, _ = meta(run.target, a, "fwd", precision=precision, LOGS=return_lse, **static)
    outs = forward_specs(a, return_lse, precision)
    shared = tuple(picked(constants, "V_AT", "HEADS", "WIDTH", "SCALE", "LOGS").items())
    programs = min(run.target.sms, hopper_tiles(lengths(a), B * H))
    first = walking_plan(joint_attention_hopper_body, lengths(a), B, programs, outs, (*shared, ("KEYS", hopper_keys(d))))
    results = tuple(run(first, *a.q, *a.k, *a.v))
    reach = 64  # queries of a program: enough programs for the GPU, few enough that most have nothing to do at little cost
    while reach < 512 and reach < B * H * sum(lengths(a)) // (4 * run.target.sms):
        reach *= 2
    tile = dict(REACH=reach, QUERIES=64, KEYS=32, COLS=d)
    repair = repair_plan(lengths(a), outs, (*shared, *tile.items()))
    results = tuple(run(repair, *a.q, *a.k, *a.v, *results))
    return (results[:n] + results[2 * n :] if return_lse else results[:n]), results[n : 2 * n]


@remembered
def repair_plan(lengths: tuple[int, ...], outs: tuple[Spec, ...], constants: tuple) -> Plan:
    constants, n = dict(constants), len(lengths)
    grid = outs[0].shape[0] * constants["HEADS"] * sum(cdiv(L, constants["REACH"]) for L in lengths)
    aliases = {i: 3 * n + i for i in range(3 * n)}
    kernel = over_streams(joint_attention_repair_body, n)
    return Plan(
        kernel,
        (grid,),
        outs,
        integers(LENGTHS=lengths),
        constants,
        warps=8 if constants["COLS"] == 128 else 4,
        stages=2,
        aliases=aliases,
    )


LEAST_SCALE = 1e-6  # that a kernel may divide lse by


def is_single_pass(target: Target, a, causal: bool, scale: float) -> bool:
    """Whether one launch does the backward: dq of all queries of a head must fit the registers of a program, on sm_100 its tensor
    memory, where more compiles to a trap without a word. It divides by the scale, and knows no head without tokens."""
    columns = max(16, next_power_of_2(a.q[0].shape[3])) * sum(blocks_of(a).values())
    plain = a.attn_mask is None and not causal and scale > LEAST_SCALE and heads_per_key(a) == 1
    return 0 < columns <= (48 if target.arch >= 100 else 96) and spec(a.v[0]).dtype == "bfloat16" and plain


def attention_backward(run, a, outs, residuals, douts, *, precision: str, wide: bool = False, **static):
    """dq, dk, dv of every stream, from what attention_forward returned.

    wide: an op goes on with dq and dk, so no launch rounds a sum that is float32 anyway, and neither is float16, whose small
    numbers are rounded most (docs/facts.md).
    """
    n = len(a.q)
    o, do, dlse, lse, anys = outs[:n], douts[:n], douts[n:], residuals[:n], residuals[n:]
    static |= dict(precision=precision)
    like = lambda xs: tuple(Spec(tuple(x.shape), "float32" if wide and spec(x).dtype == "float16" else spec(x).dtype) for x in xs)
    gradients = like(a.q), like(a.k), tuple(Spec(tuple(x.shape), spec(a.v[0]).dtype) for x in a.k)
    if is_single_pass(run.target, a, static["causal"], static["scale"]):
        if short_backward_on_hopper(run.target, a, o, do):
            return hopper_short_backward(run, a, o, do, lse, dlse, gradients, static)
        return single_pass(run, a, o, do, lse, dlse, gradients, static)
    if backward_on_hopper(run.target, a, do, static["causal"], static["scale"]):
        return hopper_backward(run, a, o, do, lse, dlse, gradients, wide, static)
    return two_passes(run, a, mask_inputs(a, anys), o, do, lse, dlse, gradients, static)


def gradient_scales(scale: float, folded: bool = False, **_) -> dict[str, float]:
    """What dS k and dS^T q are multiplied by; a folded q has the scale in it, and log2(e) too much."""
    return dict(DQ_SCALE=scale, DK_SCALE=1 / LOG2E if folded else scale)


def single_pass(run, a, o, do, lse, dlse, gradients, static):
    B, _, H, _ = a.q[0].shape
    heads, n = B * H, len(a.q)
    unused = ("GROUP", "CAUSAL", "MASKED", "PRECISION", "EXACT")
    scales = gradient_scales(**static)
    constants, warps, stages = meta(run.target, a, "single", SHIFTED=bool(dlse), **scales, **static)
    constants = {name: x for name, x in constants.items() if name not in unused}
    # Masks are not loaded ahead; heads with columns to spare take so few registers that more programs serve them better; and
    # on other architectures straight code spills.
    spare = a.q[0].shape[3] + 3 <= constants["COLS"]
    loop = run.target.arch != 90 or not fits(run.target, a) or spare or has_key_masks(a)
    loop |= constants["KEYS"] != TOKENS
    blocks = blocks_of(a)
    constants |= blocks | dict(LOOP=loop)
    outs = tuple(x for grads in gradients for x in grads)
    if loop:
        programs = heads
    else:
        programs, stages = min(heads, run.target.sms * (2 if sum(blocks.values()) > 1 else 4)), 2  # as many as registers let run
    p = walking_plan(joint_attention_bwd_body, lengths(a), B, programs, outs, tuple(constants.items()), warps, stages)
    results = tuple(run(p, *a.q, *a.k, *a.v, *key_mask_inputs(a), *o, *do, *lse, *(dlse or lse)))
    return results[:n], results[n : 2 * n], results[2 * n :]


def short_backward_on_hopper(target: Target, a, o, do) -> bool:
    """Whether a backward in one pass takes the kernel for Hopper: it was faster from two blocks a head on (docs/facts.md). Fewer
    heads than multiprocessors were not measured."""
    B, _, H, d = a.q[0].shape
    if d != 16 or target.sms > B * H or sum(blocks_of(a).values()) <= 1:
        return False
    return is_loadable(target, a, *o, *do)


def hopper_short_backward(run, a, o, do, lse, dlse, gradients, static):
    """attention_backward in one launch, of which a multiprocessor holds two programs, that walk heads."""
    B, _, H, _ = a.q[0].shape
    n = len(a.q)
    blocks = blocks_of(a)
    total = sum(blocks.values())
    constants, _, _ = meta(run.target, a, "fwd", SHIFTED=bool(dlse), **static)
    masks = [f"KEY_MASK{i}" for i in range(n)]
    constants = picked(constants, "V_AT", "HEADS", "SCALE", "SHIFTED", *masks) | gradient_scales(**static) | blocks
    # The next head does not fit beside one of six blocks, and beside one of five it gains nothing. Up to three, steps of half a
    # block were faster.
    constants |= dict(QUERIES=TOKENS // 2 if total <= 3 else TOKENS, AHEAD=total <= 4)
    outs = tuple(x for grads in gradients for x in grads)
    programs = min(B * H, 2 * run.target.sms)
    p = walking_plan(joint_attention_hopper_short_bwd_body, lengths(a), B, programs, outs, tuple(constants.items()))
    results = tuple(run(p, *a.q, *a.k, *a.v, *key_mask_inputs(a), *o, *do, *lse, *(dlse or lse)))
    return results[:n], results[n : 2 * n], results[2 * n :]


def two_passes(run, a, masks, o, do, lse, dlse, gradients, static):
    B, _, H, d = a.q[0].shape
    n = len(a.q)
    exact = is_exact(a, static["precision"])
    statistics = log_specs(a) if exact else statistics_specs(a)
    delta = tuple(run(delta_plan(lengths(a), statistics, H, d, bool(dlse), exact), *o, *do, *lse, *(dlse or lse)))[:n]
    inputs = (*a.q, *a.k, *a.v, *masks, *do, *lse)
    dq, dk, dv = gradients
    scales = gradient_scales(**static)
    constants, warps, stages = meta(run.target, a, "dq", DQ_SCALE=scales["DQ_SCALE"], **static)
    outs = dq + (statistics if exact else (UNUSED,) * n)
    p = plan(joint_attention_bwd_dq_body, lengths(a), B * H, constants["QUERIES"], outs, tuple(constants.items()), warps, stages)
    results = tuple(run(p, *inputs, *delta))
    dq, delta = results[:n], results[n:] if exact else delta
    constants, warps, stages = meta(run.target, a, "dkdv", DK_SCALE=scales["DK_SCALE"], **static)
    outs = dk + dv
    programs = B * a.k[0].shape[2]
    p = plan(
        joint_attention_bwd_dkdv_body, lengths(a), programs, constants["KEYS"], outs, tuple(constants.items()), warps, stages
    )
    dkdv = tuple(run(p, *inputs, *delta))
    return dq, dkdv[:n], dkdv[n:]


def hopper_queries(d: int) -> int:
    """Queries of a block: as many as registers hold beside dk and dv."""
    return min(128, 4096 // d)


def backward_on_hopper(target: Target, a, do, causal: bool, scale: float) -> bool:
    """Whether the backward takes the kernel for Hopper, which divides by the scale."""
    B, _, H, d = a.q[0].shape
    if d not in (16, 32, 64, 128) or abs(scale) < LEAST_SCALE or not for_hopper(target, a, causal, *do):
        return False
    return backward_is_worthwhile(target, lengths(a), B * H)


def backward_is_worthwhile(target: Target, lengths: tuple[int, ...], heads: int) -> bool:
    """Whether the kernel for Hopper was faster than the two of `two_passes` (docs/facts.md). Not measured: short sequences, few
    heads, whose tiles wait for one another, and fewer than 30 products of 128 keys and queries a multiprocessor."""
    tiles = sum(cdiv(L, KEYS.value) for L in lengths)
    return sum(lengths) >= MIDDLE and heads >= 8 and heads * tiles**2 >= 30 * target.sms


def hopper_backward(run, a, o, do, lse, dlse, gradients, wide: bool, static):
    """attention_backward in one pass over the scores. dq is summed in float32; a launch rounds it if not `wide`."""
    B, _, H, d = a.q[0].shape
    n, queries = len(a.q), hopper_queries(d)
    locks = Spec((1 + B * H * sum(cdiv(L, queries) for L in lengths(a)),), "int32")
    constants, _, _ = meta(run.target, a, "fwd", **static)
    constants = picked(constants, "V_AT", "HEADS", "WIDTH", "SCALE") | gradient_scales(**static) | dict(QUERIES=queries)
    rows = tuple(Spec((*x.shape[:3], PARTS.value), "bfloat16") for x in statistics_specs(a))
    first = delta_plan(lengths(a), rows, H, d, bool(dlse), False, queries, locks, constants["SCALE"])
    *parts, zeros = run(first, *o, *do, *lse, *(dlse or lse))
    dq, dk, dv = gradients
    sums = tuple(Spec(x.shape, "float32") for x in dq)
    outs, aliases = (*sums, *dk, *dv, locks), ((3 * n, 5 * n),)
    programs = min(run.target.sms, B * H * sum(cdiv(L, KEYS.value) for L in lengths(a)))
    p = walking_plan(joint_attention_hopper_bwd_body, lengths(a), B, programs, outs, tuple(constants.items()), aliases=aliases)
    results = tuple(run(p, *a.q, *a.k, *a.v, *do, *parts, zeros))
    summed, dk, dv = results[:n], results[n : 2 * n], results[2 * n : 3 * n]
    return summed if wide else tuple(run(round_plan(lengths(a), dq), *summed)), dk, dv


@remembered
def round_plan(lengths: tuple[int, ...], outs: tuple[Spec, ...]) -> Plan:
    B, _, H, d = outs[0].shape
    size = 4096
    grid = (B * sum(cdiv(L * H * d, size) for L in lengths),)
    constants = dict(HEADS=H, WIDTH=d, SIZE=size)
    return Plan(over_streams(attention_round_body, len(lengths)), grid, outs, integers(LENGTHS=lengths), constants, warps=4)
