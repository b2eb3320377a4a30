"""The one case table: every call that both frameworks make, kernels against float64, on the CPU and on a GPU.

A case is a call of a public function whose operands are data: what shape, which values. `gpu` marks the cases that are too
large for the interpreter, which gets tiles of at least 64, at most 4 heads and 130 tokens, and one production width per op.
"""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import numpy as np

from mmattn import Row
from mmattn.op import FLOATS


class Normal(NamedTuple):
    """A differentiable operand: normal values in the case's dtype, or in its own.

    lengths: of each sample, the tokens that are real; the others are NaN, and must be silent.
    gap: keeps values away from 0, where relu has no slope.
    """

    shape: tuple[int, ...]
    std: float = 1.0
    mean: float = 0.0
    dtype: str | None = None
    lengths: tuple[int, ...] = ()
    gap: float = 0.0
    differentiable = True

    def draw(self, rng):
        x = self.mean + self.std * rng.standard_normal(self.shape)
        x += np.copysign(self.gap, x)
        for sample, length in enumerate(self.lengths):
            x[sample, length:] = np.nan
        return x

    def view(self, x):
        return x


SCALES = (0.0, 1.0, 1e-20, 1e-30, 1e-10)  # squares of the third and fourth are no float32


class Scaled(Normal):
    """Normal values around the mean, those of each token times one of SCALES."""

    def draw(self, rng):
        x = self.std * rng.standard_normal(self.shape)
        return self.mean + x * np.resize(SCALES, x.shape[1]).reshape(-1, *[1] * (x.ndim - 2))


class Packed(NamedTuple):
    """Row `row` of a packed (B, M, D) operand, named by position."""

    shape: tuple[int, ...]
    row: int
    dtype: str | None = None
    std, mean, gap, lengths = 1.0, 0.0, 0.0, ()
    differentiable = True
    draw = Normal.draw

    def view(self, x):
        return Row(x, self.row)


class Chunk(NamedTuple):
    """Columns [at, at + width) of a (B, M * D) operand: in torch a strided view, as `chunk` makes it."""

    shape: tuple[int, ...]
    at: int
    width: int
    dtype: str | None = None
    std, mean, gap, lengths = 1.0, 0.0, 0.0, ()
    differentiable = True
    draw = Normal.draw

    def view(self, x):
        return x[:, self.at : self.at + self.width]


class Tokens(Chunk):
    """The same columns of every token of a (B, L, M * D) operand."""

    def view(self, x):
        return x[:, :, self.at : self.at + self.width]


class Part(NamedTuple):
    """q, k or v of packed projections (B, L, 3, H, d): in torch a strided view."""

    shape: tuple[int, ...]
    part: int
    dtype: str | None = None
    std, mean, gap, lengths = 1.0, 0.0, 0.0, ()
    differentiable = True
    draw = Normal.draw

    def view(self, x):
        return x[:, :, self.part]


class Constant(NamedTuple):
    """An operand without a gradient: a mask, positions, a table."""

    values: np.ndarray
    differentiable = False

    @property
    def shape(self):
        return self.values.shape

    @property
    def dtype(self):
        return str(self.values.dtype)

    def view(self, x):
        return x


LARGE = dict(gpu=True)
PRODUCTION = dict(dtypes=("bfloat16",))


class Case(NamedTuple):
    call: str  # the public function
    label: str
    operands: dict[str, Any]  # leaves, tuples of leaves (one per stream), None
    static: dict[str, Any] = {}  # noqa: RUF012
    gpu: bool = False
    dtypes: tuple[str, ...] = FLOATS

    def __str__(self):
        return f"{self.call}-{self.label}"

    def __hash__(self):
        return hash(str(self))

    def __eq__(self, other):
        return str(self) == str(other)

    def rng(self):
        return np.random.default_rng(zlib.crc32(str(self).encode()))


def table(positions: int, width_head: int, function) -> Constant:
    """cos or sin of RoPE's angles."""
    frequency = 1e4 ** (-np.arange(0, width_head, 2) / width_head)
    return Constant(function(np.arange(positions)[:, None] * frequency).astype(np.float32))


def rope(positions: int, width_head: int, *rotated: bool) -> dict:
    """cos and sin, one per stream, None for a stream that is not rotated."""
    return {
        name: tuple(table(positions, width_head, f) if turn else None for turn in rotated)
        for name, f in dict(cos=np.cos, sin=np.sin).items()
    }


def int32(*values: int) -> Constant:
    return Constant(np.array(values, np.int32))


def sample(B: int, D: int, *names: str, **how) -> dict:
    """One vector (B, D) per sample for each name."""
    return {name: Normal((B, D), **how) for name in names}


def shared(D: int, *names: str, **how) -> dict:
    """One vector (D,) for each name; weights lie around 1."""
    return {name: Normal((D,), mean=float("weight" in name), **how) for name in names}


def adaln_cases():
    x = lambda *shape, **how: dict(x=Normal(shape, **how))
    yield Case("layernorm_adaln", "37x48", x(2, 37, 48) | sample(2, 48, "scale", "shift"))
    yield Case("layernorm_adaln", "bare", x(3, 5, 96))
    yield Case("layernorm_adaln", "scale-only-130x96", x(2, 130, 96) | sample(2, 96, "scale"))
    yield Case("layernorm_adaln", "shift-only", x(2, 37, 128) | dict(shift=Normal((2, 1, 128))))
    yield Case("layernorm_adaln", "one-token-width-8", x(1, 1, 8) | sample(1, 8, "scale", "shift"))
    yield Case("layernorm_adaln", "float32-vectors", x(2, 37, 48) | sample(2, 48, "scale", "shift", dtype="float32"))
    packed = dict(scale=Packed((2, 6, 48), 1), shift=Packed((2, 6, 48), 0))
    yield Case("layernorm_adaln", "packed", x(2, 37, 48) | packed)
    chunks = dict(scale=Chunk((2, 6 * 48), 96, 48), shift=Chunk((2, 6 * 48), 240, 48))
    yield Case("layernorm_adaln", "chunks", x(2, 37, 48) | chunks)
    yield Case("layernorm_adaln", "far-mean", x(2, 37, 96, mean=30.0) | sample(2, 96, "scale", "shift"), dict(eps=1e-5))
    yield Case("layernorm_adaln", "production", x(2, 70, 1152) | sample(2, 1152, "scale", "shift"), **PRODUCTION)
    yield Case("rmsnorm_adaln", "37x48", x(2, 37, 48) | sample(2, 48, "scale", "shift"))
    yield Case("rmsnorm_adaln", "at-zero", x(2, 37, 48, std=1e-5) | sample(2, 48, "scale", "shift"), dict(eps=1.1920929e-7))
    yield Case("layer_norm", "affine-130x128", x(2, 130, 128) | shared(128, "weight", "bias"))
    yield Case("layer_norm", "bias-only", x(3, 5, 48) | shared(48, "bias"))
    yield Case("layer_norm", "empty-batch", x(0, 5, 48) | shared(48, "weight", "bias"))
    yield Case("rms_norm", "weight-37x96", x(2, 37, 96) | shared(96, "weight"))
    yield Case("rms_norm", "float32-weight", x(2, 37, 48) | shared(48, "weight", dtype="float32"))
    yield Case("layer_norm", "bfloat16-weights", x(2, 37, 48) | shared(48, "weight", "bias", dtype="bfloat16"))
    yield from modulation_cases()
    for B, L, D in ((3, 333, 768), (2, 186, 1536), (1, 4100, 3072), (64, 3, 128), (1, 2, 16384)):
        yield Case("layernorm_adaln", f"{B}x{L}x{D}", x(B, L, D) | sample(B, D, "scale", "shift"), **LARGE)
        yield Case("rms_norm", f"{B}x{L}x{D}", x(B, L, D) | shared(D, "weight"), **LARGE)


def picks(B: int, L: int, R: int) -> dict:
    """rows: for each token one of R; the first half of a sample one row throughout, then any. Row R - 1 of sample 0 is unused."""
    rows = np.random.default_rng(L).integers(0, R, (B, L), dtype=np.int32)
    rows[:, : L // 2] = 0
    rows[0][rows[0] == R - 1] = 0
    return dict(rows=Constant(rows))


def modulation_cases():
    """Every form of scale and shift, and the options of a norm with a weight."""
    x = lambda *shape, **how: dict(x=Normal(shape, **how))
    both = lambda *shape, **how: dict(scale=Normal(shape, **how), shift=Normal(shape, **how))
    affine = lambda D, **how: shared(D, "weight", "bias", **how)
    base = lambda D, **how: shared(D, "scale_base", "shift_base", **how)
    yield Case("layernorm_adaln", "per-token", x(2, 37, 48) | both(2, 37, 48))
    yield Case(
        "layernorm_adaln",
        "per-token-chunks",
        x(2, 37, 48) | dict(scale=Tokens((2, 37, 96), 0, 48), shift=Tokens((2, 37, 96), 48, 48)),
    )
    yield Case("layernorm_adaln", "per-token-everything", x(2, 70, 48) | both(2, 70, 48) | affine(48) | base(48))
    yield Case("rmsnorm_adaln", "per-token-scale-alone", x(2, 37, 96) | dict(scale=Normal((2, 37, 96))) | shared(96, "weight"))
    yield Case("layernorm_adaln", "shift-per-token", x(2, 37, 48) | sample(2, 48, "scale") | dict(shift=Normal((2, 37, 48))))
    yield Case("layernorm_adaln", "for-all", x(2, 37, 48) | both(48))
    yield Case("layernorm_adaln", "base", x(2, 130, 48) | sample(2, 48, "scale", "shift") | base(48, dtype="float32"))
    yield Case("layernorm_adaln", "base-alone", x(2, 37, 48) | base(48) | shared(48, "bias"))
    yield Case("layernorm_adaln", "rows", x(2, 130, 48) | both(3, 48) | picks(2, 130, 3))
    beyond = dict(rows=Constant(np.array([[-1, 0, 1, 2, 3], [3, 2, 1, 0, -7]], np.int32)))
    yield Case("layernorm_adaln", "rows-beyond", x(2, 5, 48) | both(3, 48) | beyond)
    yield Case("layernorm_adaln", "rows-of-samples-beyond", x(2, 5, 48) | both(2, 3, 48) | beyond)
    yield Case("layernorm_adaln", "rows-of-samples", x(2, 130, 48) | both(2, 3, 48) | picks(2, 130, 3))
    yield Case("rmsnorm_adaln", "rows-one-token", x(2, 1, 48) | dict(scale=Normal((2, 48))) | picks(2, 1, 2))
    yield Case("layernorm_adaln", "rows-everything", x(2, 70, 48) | both(2, 48) | picks(2, 70, 2) | affine(48) | base(48))
    yield Case(
        "rmsnorm_adaln", "rows-of-samples-everything", x(2, 70, 48) | both(2, 3, 48) | picks(2, 70, 3) | affine(48) | base(48)
    )
    everything = x(2, 70, 48) | sample(2, 48, "scale", "shift") | affine(48) | base(48)
    yield Case("layernorm_adaln", "everything", everything)
    yield Case("rmsnorm_adaln", "before-weight", everything, dict(cast="before_weight", eps=1e-5))
    yield Case("layernorm_adaln", "no-cast", everything, dict(cast="none"))
    yield Case("rmsnorm_adaln", "zero-centered", everything, dict(zero_centered=True))
    # Vectors in every dtype beside an x in every dtype: the float32 stream of 16-bit layers, and the reverse.
    for dtype in FLOATS[1:]:
        packed = dict(scale=Packed((2, 6, 48), 1, dtype=dtype), shift=Packed((2, 6, 48), 0, dtype=dtype))
        yield Case("layernorm_adaln", f"{dtype}-vectors", x(2, 37, 48) | packed | affine(48, dtype=dtype) | base(48, dtype=dtype))
    own = dict(scale=Normal((2, 37, 48), dtype="bfloat16"), shift=Normal((2, 37, 48), dtype="float16"))
    yield Case("layernorm_adaln", "per-token-each-its-own", x(2, 37, 48) | own | affine(48, dtype="float32"))
    own = dict(scale=Normal((3, 48), dtype="float16"), shift=Normal((3, 48), dtype="bfloat16"))
    yield Case("rmsnorm_adaln", "rows-each-its-own", x(2, 37, 48) | own | picks(2, 37, 3) | base(48, dtype="float32"))
    for B, L, D in ((3, 333, 768), (64, 186, 128)):
        yield Case("layernorm_adaln", f"per-token-{B}x{L}x{D}", x(B, L, D) | both(B, L, D) | affine(D), **LARGE)
        yield Case("layernorm_adaln", f"rows-{B}x{L}x{D}", x(B, L, D) | both(4, D) | picks(B, L, 4) | base(D), **LARGE)


def gated_residual_cases():
    both = lambda *shape: dict(residual=Normal(shape), h=Normal(shape))
    yield Case("gated_residual", "37x48", both(2, 37, 48) | sample(2, 48, "gate"))
    yield Case("gated_residual", "one-token", both(1, 1, 96) | dict(gate=Normal((1, 1, 96))))
    yield Case("gated_residual", "float32-gate", both(2, 37, 48) | sample(2, 48, "gate", dtype="float32"))
    for dtype, gate in zip(FLOATS, FLOATS[1:] + FLOATS, strict=False):
        h = dict(h=Normal((2, 37, 48), dtype=dtype))
        yield Case("gated_residual", f"{dtype}-branch", both(2, 37, 48) | h | sample(2, 48, "gate", dtype=gate))
    yield Case("gated_residual", "packed", both(2, 37, 128) | dict(gate=Packed((2, 6, 128), 5)))
    yield Case("gated_residual", "chunk", both(2, 37, 48) | dict(gate=Chunk((2, 6 * 48), 96, 48)))
    yield Case("gated_residual", "empty-batch", both(0, 37, 48) | sample(0, 48, "gate"))
    yield Case("gated_residual", "production", both(2, 70, 1152) | sample(2, 1152, "gate"), **PRODUCTION)
    for B, L, D in ((3, 333, 768), (1, 4100, 3072), (64, 3, 128)):
        yield Case("gated_residual", f"{B}x{L}x{D}", both(B, L, D) | sample(B, D, "gate"), **LARGE)


def gated_residual_norm_adaln_cases():
    def case(label, B, L, D, *vectors, weight=False, operands=None, row=None, **static):
        both = dict(residual=Normal((B, L, D)), h=Normal((B, L, D)))
        given = sample(B, D, "gate", *vectors) | (shared(D, "h_weight") if weight else {}) | (operands or {})
        return Case("gated_residual_norm_adaln", label, both | given, static, **(row or {}))

    modulated = ("scale", "shift")
    yield case("37x48", 2, 37, 48, *modulated)
    yield case("bare-rms", 2, 130, 96, center=False, eps=1e-5)
    yield case("scale-alone-tanh", 3, 5, 48, "scale", gate_fn="tanh")
    yield case("gate-at-zero", 2, 37, 48, operands=sample(2, 48, "gate", dtype="float32", std=1e-5), gate_fn="tanh")
    yield case("post-norm", 2, 130, 48, *modulated, weight=True)
    yield case("lumina", 2, 37, 128, "scale", weight=True, center=False, gate_fn="tanh", eps=1e-5, h_eps=1e-5)
    yield case("one-token", 1, 1, 8, "shift", weight=True)
    rows = {name: Normal((2, 1, 48), dtype="float32") for name in ("gate", "scale", "shift")}
    yield case("float32-vectors", 2, 37, 48, operands=rows, gate_fn="tanh")
    for dtype in FLOATS[:2]:
        branch = sample(2, 48, "gate", "scale", "shift", dtype=dtype) | dict(h=Normal((2, 37, 48), dtype=dtype))
        yield case(f"{dtype}-branch", 2, 37, 48, operands=branch)
        yield case(f"{dtype}-branch-post-norm", 2, 37, 48, operands=branch | shared(48, "h_weight", dtype=dtype), gate_fn="tanh")
    own = {name: Normal((2, 48), dtype=dtype) for name, dtype in zip(("gate", "scale", "shift"), FLOATS, strict=True)}
    yield case("each-its-own", 2, 37, 48, operands=own | dict(h=Normal((2, 37, 48), dtype="bfloat16")))
    packed = {name: Packed((2, 6, 48), i) for i, name in enumerate(("scale", "shift", "gate"))}
    yield case("packed", 2, 37, 48, operands=packed)
    chunks = {name: Chunk((2, 6 * 48), 48 * i, 48) for i, name in enumerate(("scale", "shift", "gate"))}
    yield case("chunks", 2, 37, 48, weight=True, operands=chunks)
    yield case("empty-batch", 0, 37, 48, *modulated, weight=True)
    yield case("production", 2, 70, 1152, *modulated, weight=True, row=PRODUCTION)
    for B, L, D in ((3, 333, 768), (1, 4100, 3072), (64, 3, 128), (1, 2, 16384)):
        yield case(f"{B}x{L}x{D}", B, L, D, *modulated, row=LARGE)
        yield case(f"post-norm-{B}x{L}x{D}", B, L, D, *modulated, weight=True, row=LARGE)


def projections(B: int, H: int, d: int, *lengths: int, over: str, **how) -> dict:
    """Packed projections of each stream and the weights of their norms."""
    weight = lambda: tuple(Normal((H * d if over == "width" else d,), std=0.3, mean=1.0, **how) for _ in lengths)
    return dict(qkv=tuple(Normal((B, L, 3, H, d)) for L in lengths), q_weight=weight(), k_weight=weight())


def qk_norm_rope_cases():
    def case(label, B, H, d, *lengths, over, rotated=(), start=None, positions=64, how=None, extra=None, row=None, **static):
        operands = projections(B, H, d, *lengths, over=over, **(how or {}))
        operands |= rope(positions, d, *rotated) if rotated else {}
        operands |= (dict(start_pos=start) if start else {}) | (extra or {})
        return Case("qk_norm_rope", label, operands, dict(over=over) | static, **(row or {}))

    seed = dict(over="width", rotated=(True, False))
    yield case("seed", 2, 2, 24, 37, 5, **seed, start=int32(0, 9))
    yield case("seed-half", 2, 2, 24, 37, 5, **seed, layout="half")
    yield case("plain", 2, 3, 16, 1, over="width")
    yield case("heads", 2, 3, 32, 37, 70, over="head", rotated=(True, True), positions=80, eps=1e-6)
    yield case("heads-half", 1, 4, 64, 37, over="head", rotated=(True,), layout="half", start=int32(20))
    for layout in ("interleaved", "half"):
        part = {name: (Constant(t[0].values[:, :5]), None) for name, t in rope(64, 24, True).items()}
        yield case(f"partial-{layout}", 2, 2, 24, 37, 5, over="head", start=int32(0, 9), extra=part, layout=layout)
    own = lambda B: {
        name: (Constant(t[0].values[:40][None] * np.linspace(0.9, 1.1, B, dtype=np.float32)[:, None, None]), None)
        for name, t in rope(64, 24, True).items()
    }
    yield case("table-of-samples", 3, 2, 24, 37, 5, over="head", start=int32(0, 3, 1), extra=own(3))
    yield case("table-of-no-samples", 0, 2, 24, 37, 5, over="head", extra=own(0))
    for dtype in FLOATS:
        yield case(f"{dtype}-weights", 2, 2, 24, 37, **dict(over="width", rotated=(True,)), how=dict(dtype=dtype))
    weights = Normal((24,), dtype="bfloat16"), Normal((24,), dtype="float32")
    own = dict(q_weight=weights, k_weight=weights[::-1])
    yield case("weights-each-its-own", 2, 2, 24, 37, 5, over="head", extra=own)
    yield case("empty-batch", 0, 2, 24, 37, over="width")
    yield case("production", 1, 18, 64, 40, over="width", rotated=(True,), row=PRODUCTION)
    for over, layout in (("width", "interleaved"), ("head", "half")):
        yield case(f"sd3-{over}", 2, 24, 64, 333, 154, over=over, rotated=(True, True), positions=400, layout=layout, row=LARGE)
        yield case(
            f"flux-{over}", 1, 24, 128, 1024, 186, over=over, rotated=(True, True), positions=1024, layout=layout, row=LARGE
        )


def heads(B: int, H: int, d: int, *lengths: int, qk: dict | None = None, real=(), **how) -> dict:
    """q, k, v of streams of the given lengths; `real`: per stream, the number of real tokens of each sample."""
    real = real or ((),) * len(lengths)
    stream = lambda **how: tuple(Normal((B, L, H, d), lengths=n, **how) for L, n in zip(lengths, real, strict=True))
    return dict(q=stream(**how, **(qk or {})), k=stream(**how, **(qk or {})), v=stream(**how))


def key_masks(lengths, real) -> dict:
    """Which tokens are real, per stream; None for a stream without a mask."""
    mask = lambda L, n: Constant(np.arange(L) < np.array(n)[:, None]) if n else None
    return dict(key_masks=tuple(mask(L, n) for L, n in zip(lengths, real, strict=True)))


def scattered(B: int, *lengths: int) -> dict:
    """Key masks with holes."""
    rng = np.random.default_rng(sum(lengths))
    return dict(key_masks=tuple(Constant(rng.random((B, L)) < 0.7) for L in lengths))


def mask(B: int, L: int, empty_rows=(3,), empty_cols=(5,)) -> dict:
    """A random mask (B, L, L) with rows and columns that attend to nothing."""
    keep = np.random.default_rng(L).random((B, L, L)) < 0.6
    keep[:, list(empty_rows)] = False
    keep[:, :, list(empty_cols)] = False
    return dict(attn_mask=Constant(keep))


def joint_attention_cases():
    case = lambda label, operands, static=None, **row: Case("joint_attention", label, operands, static or {}, **row)
    yield case("seed", heads(2, 2, 16, 37, 5))
    yield case("one-stream-130", heads(1, 1, 64, 130))
    yield case("three-streams", heads(1, 1, 24, 1, 70, 20))
    yield case("three-short-streams", heads(1, 2, 16, 37, 5, 1), **PRODUCTION)
    yield case("four-blocks", heads(1, 2, 16, 186, 64), dict(return_lse=True), **PRODUCTION)
    yield case("width-8", heads(1, 2, 8, 70, 37), **PRODUCTION)
    yield case("one-token-each", heads(8, 2, 8, 1, 1, qk=dict(std=0.5)))
    yield case("width-128", heads(1, 1, 128, 37, 5))
    yield case("causal", heads(1, 1, 32, 130, 37), dict(causal=True))
    yield case("mask", heads(2, 1, 16, 37, 20) | mask(2, 37))
    yield case("mask-alone", heads(1, 1, 48, 70) | mask(1, 70, (0, 64, 69)))
    yield case("key-masks", heads(2, 1, 16, 37, 70, real=((37, 20), (1, 65))) | key_masks((37, 70), ((37, 20), (1, 65))))
    yield case("one-key-mask", heads(2, 2, 16, 70, 5, real=((), (0, 3))) | key_masks((70, 5), ((), (0, 3))))
    nobody = heads(2, 1, 16, 37, 5, real=((0, 30), (0, 5))) | key_masks((37, 5), ((0, 30), (0, 5)))
    yield case("lse-of-nobody", nobody, dict(return_lse=True))
    everything = heads(2, 1, 16, 37, 20, real=((37, 20), (1, 17))) | key_masks((37, 20), ((37, 20), (1, 17))) | mask(2, 37)
    yield case("everything", everything, dict(return_lse=True, causal=True, scale=0.3))
    yield case("lse", heads(2, 2, 32, 70), dict(return_lse=True))
    for dtype in FLOATS:
        yield case(f"{dtype}-qk", heads(2, 2, 16, 37, 5, qk=dict(dtype=dtype)))
    own = dict(q=(Normal((1, 37, 2, 32), dtype="float32"),), k=(Normal((1, 37, 2, 32), dtype="float16"),))
    yield case("each-its-own", heads(1, 2, 32, 37) | own, dict(return_lse=True, causal=True))
    yield case("negative-scale", heads(1, 2, 16, 37), dict(scale=-0.3))
    huge = heads(1, 1, 32, 70, 37)
    yield case("huge-logits", huge | dict(k=tuple(leaf._replace(mean=60.0) for leaf in huge["k"])))
    # Sums of exponentials beyond what a float32 or the gate of the unshifted softmax holds, both ways, in some rows or all.
    yield case("over-the-gate", heads(1, 2, 32, 130, 20, qk=dict(std=5.0)))
    yield case("over-the-gate-16", heads(1, 1, 16, 200, 70, qk=dict(std=6.0)), **PRODUCTION)
    yield case("over-the-gate-64", heads(1, 1, 64, 130, qk=dict(std=4.0)), dict(return_lse=True))
    opposite = lambda operands, mean: operands | dict(k=tuple(leaf._replace(mean=-mean) for leaf in operands["k"]))
    low = heads(1, 1, 16, 70, 37, qk=dict(mean=5.0))
    yield case("under-the-gate", opposite(low, 5.0), dict(return_lse=True))
    tiny = heads(1, 1, 16, 64, qk=dict(mean=4.8, std=0.05))  # exponentials are the smallest numbers that there are
    yield case("barely-under-the-gate", opposite(tiny, 4.8), dict(return_lse=True))
    small = heads(1, 1, 16, 70, 37, qk=dict(mean=1.86, std=0.3))  # small beside the ones of keys that are not there
    yield case("low-scores", opposite(small, 1.86), dict(return_lse=True))
    large = heads(1, 1, 16, 70, 37, qk=dict(mean=1.6))
    large |= dict(v=tuple(leaf._replace(std=1e36) for leaf in large["v"]))  # times exponentials of 2^15 more than float32 holds
    yield case("large-values", large, dtypes=("bfloat16",))
    over = heads(2, 1, 16, 37, 70, qk=dict(std=5.0), real=((37, 20), (1, 65))) | key_masks((37, 70), ((37, 20), (1, 65)))
    yield case("over-the-gate-key-masks", over)
    yield case("zeros", heads(1, 2, 16, 37, 5, qk=dict(std=0.0)))
    yield case("one-key", heads(2, 1, 16, 37, real=((1, 37),)) | key_masks((37,), ((1, 37),)))
    yield case("scattered-key-masks", heads(2, 1, 16, 70, 130) | scattered(2, 70, 130))
    yield case("scattered-key-masks-64", heads(1, 1, 64, 130) | scattered(1, 130))
    yield case("scattered-key-masks-causal", heads(1, 1, 64, 130) | scattered(1, 130), dict(causal=True))
    yield case("packed", {name: Part((2, 37, 3, 2, 16), part) for part, name in enumerate("qkv")})
    grouped = lambda B, H, *shape, **how: heads(B, H, *shape, **how) | {name: heads(B, 2, *shape, **how)[name] for name in "kv"}
    yield case("grouped", grouped(2, 4, 16, 70, 5), dict(return_lse=True))
    masked = grouped(1, 4, 64, 70, 37) | mask(1, 70) | key_masks((70, 37), ((50,), (37,)))
    yield case("grouped-masks", masked, dict(causal=True), **PRODUCTION)
    yield case("gpu-grouped", grouped(2, 16, 64, 700, 154), **LARGE)
    yield case("empty-batch", heads(0, 2, 16, 37, 5))
    yield case("no-tokens", heads(2, 2, 16, 0), dict(return_lse=True), **PRODUCTION)
    yield case("no-tokens-width-80", heads(1, 2, 80, 0), **PRODUCTION)
    yield case("no-tokens-of-a-stream", heads(2, 2, 16, 37, 0))
    yield case("production", heads(1, 3, 64, 186, 77), **PRODUCTION)
    # Widths that no power of two is: tiles side by side, of which the last may be wider than what is left; float32 is padded.
    yield case("width-48", heads(1, 2, 48, 70, 5), dict(return_lse=True))
    yield case("width-48-short", heads(1, 1, 48, 37), **PRODUCTION)
    masks = grouped(2, 4, 80, 37, 70, real=((37, 20), (1, 65))) | key_masks((37, 70), ((37, 20), (1, 65)))
    yield case("width-80-grouped-masks", masks, **PRODUCTION)
    yield case("width-88-causal", heads(1, 1, 88, 130), dict(causal=True), **PRODUCTION)
    yield case("width-96-mask", heads(1, 1, 96, 37, 70) | mask(1, 37), dict(return_lse=True), **PRODUCTION)
    yield case(
        "width-96-over-the-gate", heads(1, 1, 96, 130, qk=dict(std=4.0)), dict(return_lse=True), dtypes=("bfloat16", "float16")
    )
    for d in (8, 24, 32, 40, 48, 80, 96):
        yield case(f"gpu-width-{d}", heads(2, 4, d, 333, 154), **LARGE)
        yield case(f"gpu-everything-{d}", heads(2, 4, d, 333, 154) | mask(2, 333), dict(return_lse=True, causal=True), **LARGE)
    yield case("sd3", heads(2, 24, 64, 1024, 154), **LARGE)
    yield case("flux", heads(1, 8, 128, 1024, 512), **LARGE)
    yield case("target", heads(8, 8, 16, 186), **LARGE)
    yield case("one-block", heads(9, 8, 16, 64), **LARGE)
    # So many heads that programs walk them.
    yield case("heads-in-turn", heads(40, 8, 16, 186), dict(return_lse=True), **LARGE)
    yield case("heads-in-turn-64", heads(40, 8, 16, 186, 64), **LARGE)
    yield case("heads-in-turn-scattered-key-masks", heads(40, 8, 16, 70, 130) | scattered(40, 70, 130), **LARGE)
    low = heads(40, 8, 16, 70, 37, qk=dict(mean=5.0))
    yield case("heads-in-turn-under-the-gate", opposite(low, 5.0), dict(return_lse=True), **LARGE)
    yield case("long-causal", heads(1, 2, 64, 3000), dict(causal=True), **LARGE)
    long = heads(2, 4, 64, 700, 300, real=((700, 1), (299, 130))) | key_masks((700, 300), ((700, 1), (299, 130)))
    yield case("long-key-masks", long, dict(return_lse=True), **LARGE)


def qk_norm_rope_attention_cases():
    def case(label, B, H, d, *lengths, over, rotated=(), start=None, positions=64, real=(), extra=None, row=None, **static):
        operands = projections(B, H, d, *lengths, over=over)
        if real:
            operands["qkv"] = tuple(leaf._replace(lengths=n) for leaf, n in zip(operands["qkv"], real, strict=True))
            operands |= key_masks(lengths, real)
        operands |= rope(positions, d, *rotated) if rotated else {}
        operands |= (dict(start_pos=start) if start else {}) | (extra or {})
        return Case("qk_norm_rope_attention", label, operands, dict(over=over) | static, **(row or {}))

    seed = dict(over="width", rotated=(True, False))
    yield case("seed", 2, 2, 24, 37, 5, **seed, start=int32(0, 9), extra=mask(2, 37))
    yield case("heads-half", 1, 2, 32, 70, 37, over="head", rotated=(True, True), positions=80, layout="half", eps=1e-6)
    yield case("key-masks", 2, 1, 16, 37, 70, **seed, real=((37, 20), (1, 65)), return_lse=True)
    yield case("causal", 2, 1, 64, 70, over="head", rotated=(True,), positions=70, causal=True)
    gains = projections(2, 2, 16, 37, 5, over="head")
    large = {name: tuple(leaf._replace(mean=5.0) for leaf in gains[name]) for name in ("q_weight", "k_weight")}
    halves = dict(dtypes=("bfloat16", "float16"))  # which know a softmax without a shift
    yield case("large-gains", 2, 2, 16, 37, 5, over="head", extra=large, row=halves)
    yield case("width-80", 1, 2, 80, 37, 5, over="head", rotated=(True, False))
    own = {name: (Normal((24,), dtype="float32"), Normal((24,), dtype="bfloat16")) for name in ("q_weight", "k_weight")}
    yield case("weights-each-its-own", 2, 2, 24, 37, 5, over="head", extra=own)
    yield case("empty-batch", 0, 2, 24, 37, over="width")
    yield case("production", 1, 4, 32, 186, 20, **seed | dict(positions=186), row=PRODUCTION)
    yield case("sd3", 2, 24, 64, 1024, 154, over="head", row=LARGE)
    yield case("flux", 1, 8, 128, 1024, 512, over="head", rotated=(True, True), positions=1024, row=LARGE)
    yield case("target", 8, 8, 16, 186, 20, **seed | dict(positions=4096), extra=mask(8, 186), row=LARGE)


def relu_linear_attention_cases():
    case = lambda label, operands, **row: Case("relu_linear_attention", label, operands, **row)
    away = dict(gap=0.05)
    yield case("37-5", heads(2, 2, 16, 37, 5, **away))
    yield case("130-width-64", heads(1, 2, 64, 130, **away))
    yield case("three-streams", heads(1, 1, 24, 1, 70, 20, **away))
    yield case("width-128", heads(1, 1, 128, 70, **away))
    for dtype in FLOATS:
        yield case(f"{dtype}-qk", heads(2, 2, 16, 37, qk=dict(dtype=dtype), **away))
    real = ((37, 20), (1, 65))
    yield case("key-masks", heads(2, 2, 16, 37, 70, real=real, **away) | key_masks((37, 70), real))
    yield case("empty-batch", heads(0, 2, 16, 37, **away))
    yield case("production", heads(1, 4, 64, 186, 77, **away), **PRODUCTION)
    for B, H, d, *lengths in ((2, 24, 64, 1024, 154), (1, 8, 128, 512, 333), (8, 8, 16, 186), (7, 2, 16, 512), (1, 4, 40, 3000)):
        yield case(f"{B}x{H}x{d}-{lengths[0]}", heads(B, H, d, *lengths, **away), **LARGE)


CASES = [
    *adaln_cases(),
    *gated_residual_cases(),
    *gated_residual_norm_adaln_cases(),
    *qk_norm_rope_cases(),
    *joint_attention_cases(),
    *qk_norm_rope_attention_cases(),
    *relu_linear_attention_cases(),
]


def cases_without_eps():
    """Rows of zeros and of equal numbers, rows whose squares underflow, masked tokens, and queries that meet no key. (They are no
    part of CASES: at a row of zeros a norm without eps has no slope.)"""
    row = dict(dtypes=("float32", "bfloat16"))
    x, none = dict(x=Scaled((2, 37, 48))), dict(eps=0.0)
    for name, eps in (("none", none), ("tiny", dict(eps=1e-38))):
        yield Case("rms_norm", name, x | shared(48, "weight"), eps, **row)
        yield Case("layer_norm", name, x | shared(48, "weight", "bias"), eps, **row)
    yield Case("layer_norm", "equal", dict(x=Scaled((2, 37, 48), mean=2.7)) | shared(48, "weight", "bias"), none, **row)
    yield Case("layernorm_adaln", "per-token", x | dict(scale=Normal((2, 37, 48)), shift=Normal((2, 37, 48))), none, **row)
    both = dict(residual=Normal((2, 37, 48)), h=Scaled((2, 37, 48))) | sample(2, 48, "gate", "scale")
    yield Case("gated_residual_norm_adaln", "h", both | shared(48, "h_weight"), dict(h_eps=0.0), **row)
    both = dict(residual=Scaled((2, 37, 48)), h=Normal((2, 37, 48), std=0.0)) | sample(2, 48, "gate", "scale")
    yield Case("gated_residual_norm_adaln", "r", both, none, **row)
    packed = projections(2, 2, 24, 37, over="width") | dict(qkv=(Scaled((2, 37, 3, 2, 24)),))
    for layout in ("interleaved", "half"):
        yield Case("qk_norm_rope", layout, packed | rope(64, 24, True), dict(over="width", layout=layout) | none, **row)
    real = ((37, 20), (1, 65))
    masked = projections(2, 1, 16, 37, 70, over="head") | key_masks((37, 70), real)
    masked["qkv"] = tuple(leaf._replace(lengths=n) for leaf, n in zip(masked["qkv"], real, strict=True))
    yield Case("qk_norm_rope_attention", "masked", masked, dict(over="head") | none)
    away = heads(2, 2, 16, 37, gap=0.05)
    yield Case("relu_linear_attention", "queries", away | dict(q=(Scaled((2, 37, 2, 16)),)), none, dtypes=("float32", "bfloat16"))
    yield Case("relu_linear_attention", "no-keys", away | dict(k=(Normal((2, 37, 2, 16), mean=-9.0),)), none)


WITHOUT_EPS = list(cases_without_eps())
