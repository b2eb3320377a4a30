"""Random calls of every op, valid and not, in both frameworks and on both paths, against float64.

    python tests/fuzz.py [--seconds 60] [--seed 0] [--op NAME] [--framework torch|jax] [--call "TEXT"]

A call is a set of named choices: how many streams, how long, which mask. A choice that has no name in the call's text is the
simplest of its options, so the text of a call is short, makes the call again (`--call`), and a call that fails is shrunk by
making its choices simpler, one after the other. Values are drawn from the choices too: nothing depends on the time but how
many calls there are.

A valid call is a `Case`, judged as test_ops judges its own: outputs and gradients of the kernels and of the formula against
float64, and both frameworks' kernels bit for bit. A call that one mutation has made invalid either works after all, with one
result on both paths, or raises a TypeError or ValueError that names the argument.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import Any, NamedTuple

from conftest import running_kernels  # sets the environment in which both frameworks are tested  # isort: skip

import frameworks
import numpy as np
from cases import Case, Constant
from frameworks import EPS, GPU, INSTALLED, Result, walk

from mmattn import Row
from mmattn.op import FLOATS, next_power_of_2

# Sizes. The interpreter takes some ten milliseconds for each tile of a kernel; float64 takes the memory of the host.
TILES = 4096 if GPU else 16  # of 1024 elements in a norm, of 64 by 64 scores in attention
LENGTHS = (3, 1, 2, 5, 8, 16, 17, 31, 37, 64, 65, 0, 100, 130, 257, 400) + (777, 1024, 2047) * GPU
BATCHES = (2, 1, 3, 0, 5, 9) + (40, 257) * GPU
WIDTHS = (16, 8, 24, 48, 64, 72, 96, 128, 136, 200, 256, 384, 520, 768, 1024, 1104) + (1536, 3072, 4104, 8200, 16384) * GPU
HEAD_WIDTHS = (16, 8, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120, 128)


class Choices:
    """Named choices. Each is made by `given`, the texts of options by name, or else at random, or else is the simplest."""

    def __init__(self, given: dict[str, str] | None = None, rng: np.random.Generator | None = None):
        self.given, self.rng, self.made = given or {}, rng, {}

    def __call__(self, name: str, options, simplest: float = 0.0):
        """One of the options, of which the first is the simplest; `simplest` is what is added to its probability."""
        options = tuple(options)
        texts = list(map(text_of, options))
        index = 0
        if self.given.get(name) in texts:
            index = texts.index(self.given[name])
        elif self.rng is not None and self.rng.random() >= simplest:
            index = int(self.rng.integers(len(options)))
        self.made[name] = index, texts
        return options[index]

    def text(self) -> str:
        """The choices that are not the simplest."""
        return " ".join(f"{name}={texts[index]}" for name, (index, texts) in self.made.items() if index)

    def simpler(self) -> Iterator[dict[str, str]]:
        """The choices with one of them made simpler."""
        given = {name: texts[index] for name, (index, texts) in self.made.items() if index}
        for name, (index, texts) in self.made.items():
            for smaller in dict.fromkeys((0, index // 2, index - 1)):
                if 0 <= smaller < index:
                    yield given | {name: texts[smaller]}


def text_of(option) -> str:
    return getattr(option, "__name__", str(option)).replace(" ", "")


def parsed(text: str) -> dict[str, str]:
    return dict(part.split("=", 1) for part in text.split())


# Operands


VALUES: dict[str, Callable] = dict(
    normal=lambda rng, shape: rng.standard_normal(shape),
    zeros=lambda rng, shape: np.zeros(shape),
    thousands=lambda rng, shape: 1e3 * rng.standard_normal(shape),
    far=lambda rng, shape: 30.0 + rng.standard_normal(shape),
    tiny=lambda rng, shape: 1e-6 * rng.standard_normal(shape),
    flat=lambda rng, shape: np.broadcast_to(rng.standard_normal((*shape[:-1], 1)), shape),
    spikes=lambda rng, shape: rng.standard_normal(shape) * np.where(rng.random(shape) < 0.02, 300.0, 1.0),
    sparse=lambda rng, shape: rng.standard_normal(shape) * (rng.random(shape) < 0.1),
    # Of these the squares, or products of three, are beyond float16; float32 and bfloat16 hold them.
    huge=lambda rng, shape: 1e12 * rng.standard_normal(shape),
    minute=lambda rng, shape: 1e-12 * rng.standard_normal(shape),
)
GARBAGE = dict(nan=np.nan, inf=np.inf, negative_inf=-np.inf, large=3e4)


class View(NamedTuple):
    """How an operand of some shape lies in a larger array."""

    memory: Callable  # shape -> the larger array's
    cut: Callable  # the larger array -> the operand

    def __call__(self, x):
        return self.cut(x)


def widened(shape, axis: int, size: int) -> tuple[int, ...]:
    axis %= len(shape)
    return *shape[:axis], size, *shape[axis + 1 :]


def inserted(shape, axis: int, size: int) -> tuple[int, ...]:
    return *shape[:axis], size, *shape[axis:]


def expanded(x, n: int):
    """x (1, ...) as n samples that are one and the same in memory."""
    return x.expand(n, *x.shape[1:]) if hasattr(x, "expand") else x.repeat(n, 0)


def views(shape: tuple[int, ...], *, row: bool, shared: bool) -> dict[str, View]:
    """Views of an operand; row: whether it may be a Row of a packed array, shared: one sample in memory that stands for all."""
    rank, last = len(shape), shape[-1]
    found = dict(
        whole=View(lambda s: s, lambda x: x),
        columns=View(lambda s: widened(s, -1, 3 * last), lambda x: x[..., last : 2 * last]),
        unaligned=View(lambda s: widened(s, -1, last + 3), lambda x: x[..., 1 : last + 1]),
        every_second=View(lambda s: widened(s, -1, 2 * last), lambda x: x[..., ::2]),
    )
    if rank > 1:
        found |= dict(
            later=View(lambda s: widened(s, 0, s[0] + 1), lambda x: x[1:]),
            packed=View(lambda s: inserted(s, 1, 3), lambda x: x[:, 1]),
            transposed=View(lambda s: (*s[1:], s[0]), lambda x: x.swapaxes(0, 1) if rank == 2 else moved(x)),
        )
        if shared and shape[0] > 0:
            found |= dict(expanded=View(lambda s: widened(s, 0, 1), partial(expanded, n=shape[0])))
    if rank > 2:
        found |= dict(
            tokens=View(lambda s: widened(s, 1, s[1] + 2), lambda x: x[:, 1:-1]),
            part=View(lambda s: inserted(s, 2, 3), lambda x: x[:, :, 1]),
        )
    if row and rank == 2:
        found |= dict(row=View(lambda s: inserted(s, 1, 6), lambda x: Row(x, 4)))
    return found


def moved(x):
    """The last axis first: a view that no row stride describes."""
    axes = (len(x.shape) - 1, *range(len(x.shape) - 1))
    return x.permute(axes) if hasattr(x, "permute") else x.transpose(axes)


WHOLE = View(lambda s: s, lambda x: x)


class Drawn(NamedTuple):
    """A differentiable operand. What its array holds besides it is NaN, and its silent tokens hold garbage."""

    shape: tuple[int, ...]  # of the array
    draw_values: Callable
    seed: int
    view: View
    dtype: str | None = None
    silent: np.ndarray | None = None  # (B, L)
    garbage: float = np.nan
    differentiable = True

    def draw(self, rng):
        rng = np.random.default_rng(self.seed)
        places = np.arange(int(np.prod(self.shape))).reshape(self.shape)
        viewed = self.view(places)
        viewed = viewed.array[:, viewed.index] if isinstance(viewed, Row) else viewed
        values = self.draw_values(rng, viewed.shape)
        if self.silent is not None:
            values = np.where(self.silent.reshape(self.silent.shape + (1,) * (values.ndim - 2)), self.garbage, values)
        x = np.full(self.shape, np.nan)
        x.ravel()[viewed.ravel()] = np.ravel(values)
        return x


class Frozen(NamedTuple):
    """A vector without a gradient, in float32."""

    drawn: Drawn
    differentiable = False
    dtype = "float32"

    @property
    def values(self) -> np.ndarray:
        return self.drawn.draw(None).astype(np.float32)

    @property
    def shape(self):
        return self.drawn.shape

    def view(self, x):
        return self.drawn.view(x)


class Maker:
    """The operands of one call, from its choices."""

    def __init__(self, choose: Choices, example: int):
        self.choose, self.example = choose, example
        self.dtype = choose("dtype", FLOATS)
        self.data = choose("data", range(1000))
        self.examples = choose("examples", (0, 2, 3), simplest=0.8)  # of vmap; 0 without
        self.tiles = TILES / max(1, self.examples)
        self.mapped: set[str] = set()

    def seed(self, name: str, mask: str = "") -> int:
        """For the values of an operand: the examples of vmap differ in what is mapped. mask: says which of its tokens are silent,
        so that it is mapped if the mask is."""
        example = 0
        if mask in self.mapped or (self.examples and self.choose(f"{name}.mapped", (False, True))):
            self.mapped.add(name)
            example = self.example
        return zlib.crc32(f"{name} {self.data} {example}".encode())

    def constant(self, name: str, draw: Callable) -> Constant:
        return Constant(draw(np.random.default_rng(self.seed(name))))

    def own_dtype(self, name: str) -> str | None:
        """An operand's dtype, where it may have another than the call's."""
        dtype = self.choose(f"{name}.dtype", ("same", *FLOATS), simplest=0.5)
        return None if dtype == "same" else dtype

    def leaf(
        self, name: str, shape, *, vector: bool = False, dtype: str | None = None, row: bool = False, around: float = 0.0,
        gap: float = 0.0, mask: str = "", silent=None, garbage: float = np.nan, scores: bool = False,
    ) -> Drawn | Frozen:  # fmt: skip
        """vector: values are those of weights and modulations, around `around`; scores: products of values are exponents."""
        kinds = VALUES if not vector else {k: VALUES[k] for k in ("normal", "zeros", "tiny", "far", "sparse")}
        narrow = (dtype or self.dtype) == "float16" or self.dtype == "float16"
        if narrow or scores:  # of huge scores the gradients are 0 or noise
            kinds = {k: f for k, f in kinds.items() if k not in ("huge", "minute")}
        kind = self.choose(f"{name}.values", kinds, simplest=0.8)
        if narrow:
            garbage = np.clip(garbage, -3e4, 3e4)
        frozen = dtype == "float32" and vector and self.choose(f"{name}.frozen", (False, True), simplest=0.5)
        lying = views(shape, row=row, shared=frozen)
        view = lying[self.choose(f"{name}.view", lying, simplest=0.6)]
        spread = 0.3 if around else 1.0

        def values(rng, shape):
            x = around + spread * kinds[kind](rng, shape)
            return x + np.copysign(gap, x)

        drawn = Drawn(view.memory(shape), values, self.seed(name, mask), view, dtype, silent, garbage)
        return Frozen(drawn) if frozen else drawn


def within(options, cost: Callable, limit: float) -> list:
    """The options that are not too costly, or the cheapest."""
    return [n for n in options if cost(n) <= limit] or [min(options, key=cost)]


def token_shape(make: Maker, weight: float = 1.0) -> tuple[int, int, int]:
    D = make.choose("D", WIDTHS)
    cost = lambda B, L: weight * B * L * next_power_of_2(D) / 1024
    B = make.choose("B", within(BATCHES, lambda B: cost(B, 3), make.tiles))
    L = make.choose("L", within(LENGTHS, lambda L: cost(B, L), make.tiles))
    return B, L, D


def norm_eps(choose: Choices, name: str = "eps") -> float:
    return choose(name, (1e-6, 1e-5, 1.1920929e-7, 1e-3, 1.0))


def optional(make: Maker, name: str, shape, around: float = 0.0) -> dict:
    """A vector or a table by name, or nothing."""
    if not make.choose(name, (False, True)):
        return {}
    return {name: make.leaf(name, shape, vector=True, dtype=make.own_dtype(name), around=around)}


def shared_vector(make: Maker, name: str, D: int) -> dict:
    return optional(make, name, (D,), around=float("weight" in name))


def modulation(make: Maker, name: str, B: int, L: int, D: int) -> dict:
    """scale or shift in one of its forms, and its base."""
    forms = dict(none=None, sample=(B, D), sample_1=(B, 1, D), token=(B, L, D), shared=(D,))
    form = make.choose(name, forms)
    found = {} if form == "none" else {name: make.leaf(name, forms[form], vector=True, dtype=make.own_dtype(name), row=True)}
    return found | (shared_vector(make, f"{name}_base", D) if form != "shared" else {})


def tables(make: Maker, B: int, L: int, D: int) -> dict:
    """scale and shift as tables, the rows that tokens take of them, and their bases."""
    R = make.choose("R", (2, 1, 3, 7))
    shape = (B, R, D) if make.choose("table_per_sample", (False, True)) else (R, D)
    found = optional(make, "scale", shape) | optional(make, "shift", shape)
    if not found:
        return {}
    beyond = make.choose("rows_beyond", (0, 1, 100))
    rows = make.constant("rows", lambda rng: rng.integers(-beyond, R + beyond, (B, L)).astype(np.int32))
    bases = [shared_vector(make, f"{name}_base", D) for name in ("scale", "shift")]
    return found | dict(rows=rows) | bases[0] | bases[1]


def adaln(make: Maker):
    choose = make.choose
    B, L, D = token_shape(make)
    operands = dict(x=make.leaf("x", (B, L, D)))
    if choose("tables", (False, True), simplest=0.5):
        operands |= tables(make, B, L, D)
    else:
        operands |= modulation(make, "scale", B, L, D) | modulation(make, "shift", B, L, D)
    operands |= shared_vector(make, "weight", D) | shared_vector(make, "bias", D)
    static = dict(eps=norm_eps(choose), cast=choose("cast", ("after_weight", "before_weight", "none")))
    if "weight" in operands:
        static |= dict(zero_centered=choose("zero_centered", (False, True)))
    return operands, static


def plain_norm(make: Maker, *vectors: str):
    B, L, D = token_shape(make)
    operands = dict(x=make.leaf("x", (B, L, D)))
    for name in vectors:
        operands |= shared_vector(make, name, D)
    return operands, dict(eps=norm_eps(make.choose))


def row_per_sample(make: Maker, name: str, B: int, D: int) -> Drawn | Frozen:
    shape = (B, 1, D) if make.choose(f"{name}.rank", (2, 3)) == 3 else (B, D)
    return make.leaf(name, shape, vector=True, dtype=make.own_dtype(name), row=True)


def gated(make: Maker, B: int, L: int, D: int) -> dict:
    residual = make.leaf("residual", (B, L, D))
    h = make.leaf("h", (B, L, D), dtype=make.own_dtype("h"))
    return dict(residual=residual, h=h, gate=row_per_sample(make, "gate", B, D))


def gated_residual(make: Maker):
    return gated(make, *token_shape(make)), {}


def gated_residual_norm_adaln(make: Maker):
    choose = make.choose
    B, L, D = token_shape(make, 2.0)
    operands = gated(make, B, L, D)
    for name in ("scale", "shift"):
        if choose(name, (False, True)):
            operands |= {name: row_per_sample(make, name, B, D)}
    operands |= shared_vector(make, "h_weight", D)
    static = dict(center=choose("center", (True, False)), eps=norm_eps(choose), gate_fn=choose("gate_fn", ("identity", "tanh")))
    return operands, static | (dict(h_eps=norm_eps(choose, "h_eps")) if "h_weight" in operands else {})


class Streams(NamedTuple):
    """The sizes of an attention call."""

    B: int
    H: int
    d: int
    lengths: tuple[int, ...]
    bare: bool  # whether a lone stream is given as an array, and not as a tuple of one

    def __call__(self, operand: Callable) -> Any:
        """One operand per stream."""
        xs = tuple(operand(i, L) for i, L in enumerate(self.lengths))
        return xs[0] if self.bare else xs

    def named(self, name: str, i: int) -> str:
        return name if self.bare else f"{name}[{i}]"


def streams(make: Maker, cost: Callable) -> Streams:
    """cost: of (B, H, d, lengths), in tiles."""
    choose, tiles = make.choose, make.tiles
    d = choose("d", HEAD_WIDTHS)
    H = choose("H", within((1, 2, 3, 4) + (6, 8, 12) * GPU, lambda H: cost(1, H, d, (3,)), tiles))
    B = choose("B", within(BATCHES, lambda B: cost(B, H, d, (3,)), tiles))
    lengths: tuple[int, ...] = ()
    for i in range(choose("streams", within((1, 2, 3), lambda n: cost(B, H, d, (3,) * n), tiles))):
        lengths += (choose(f"L{i}", within(LENGTHS, lambda L, all=lengths: cost(B, H, d, (*all, L)), tiles)),)
    return Streams(B, H, d, lengths, len(lengths) == 1 and choose("bare", (True, False)))


def score_tiles(B: int, H: int, d: int, lengths) -> float:
    blocks = sum(-(-L // 64) for L in lengths)
    return B * H * blocks**2 * max(1, d / 64)


def norm_tiles(B: int, H: int, d: int, lengths) -> float:
    return 6 * B * next_power_of_2(H * d) * sum(lengths) / 1024


def key_masks(make: Maker, s: Streams) -> tuple[dict, list]:
    """Key masks, and per stream which tokens are silent (None: none)."""
    kinds = dict(
        none=None,
        lengths=lambda rng, L: np.arange(L) < rng.integers(0, L + 1, (s.B, 1)),
        scattered=lambda rng, L: rng.random((s.B, L)) < 0.7,
        some_samples=lambda rng, L: np.broadcast_to(rng.random((s.B, 1)) < 0.5, (s.B, L)).copy(),
        nobody=lambda rng, L: np.zeros((s.B, L), bool),
        everybody=lambda rng, L: np.ones((s.B, L), bool),
    )
    masks = []
    for i, L in enumerate(s.lengths):
        name = s.named("key_masks", i)
        draw = kinds[make.choose(name, kinds, simplest=0.4)]
        masks.append(None if draw is None else make.constant(name, lambda rng, L=L, draw=draw: draw(rng, L)))
    silent = [None if m is None else ~m.values for m in masks]
    if all(m is None for m in masks):
        return {}, silent
    return dict(key_masks=masks[0] if s.bare else tuple(masks)), silent


def attn_mask(make: Maker, B: int, L: int) -> dict:
    def scattered(rng):
        keep = rng.random((B, L, L)) < 0.6
        keep &= rng.random((B, L, 1)) < 0.9
        return keep & (rng.random((B, 1, L)) < 0.9)

    kinds = dict(
        none=None,
        scattered=scattered,
        triangle=lambda rng: np.tril(np.ones((B, L, L), bool)),
        block=lambda rng: np.broadcast_to((np.arange(L)[:, None] // 16 == np.arange(L) // 16), (B, L, L)).copy(),
        nothing=lambda rng: np.zeros((B, L, L), bool),
        everything=lambda rng: np.ones((B, L, L), bool),
    )
    draw = kinds[make.choose("attn_mask", kinds, simplest=0.4)]
    return {} if draw is None else dict(attn_mask=make.constant("attn_mask", draw))


def attention_static(choose: Choices) -> dict:
    return dict(
        causal=choose("causal", (False, True)),
        scale=choose("scale", (None, 1.0, 0.01, -0.3, 0.0)),
        return_lse=choose("return_lse", (False, True)),
    )


def heads(make: Maker, s: Streams, kv_heads: int, silent: list, *, gap: float = 0.0) -> dict:
    """q, k, v per stream."""
    dtypes = dict(q=make.own_dtype("q"), k=make.own_dtype("k"), v=None)
    garbage = GARBAGE[make.choose("garbage", GARBAGE)]

    def operand(name: str, i: int, L: int) -> Drawn:
        shape = (s.B, L, s.H if name == "q" else kv_heads, s.d)
        how = dict(mask=s.named("key_masks", i), silent=silent[i], garbage=garbage, gap=gap, scores=name != "v")
        return make.leaf(s.named(name, i), shape, dtype=dtypes[name], **how)

    return {name: s(partial(operand, name)) for name in ("q", "k", "v")}


def joint_attention(make: Maker):
    s = streams(make, score_tiles)
    kv_heads = make.choose("kv_heads", [n for n in range(s.H, 0, -1) if s.H % n == 0], simplest=0.3)
    masks, silent = key_masks(make, s)
    return heads(make, s, kv_heads, silent) | masks | attn_mask(make, s.B, s.lengths[0]), attention_static(make.choose)


def relu_linear_attention(make: Maker):
    s = streams(make, lambda B, H, d, lengths: B * H * sum(-(-L // 64) for L in lengths) * max(1, (d / 32) ** 2))
    masks, silent = key_masks(make, s)
    # At 0 relu has no slope, and a sum of products that are almost none has almost no digits.
    return heads(make, s, s.H, silent, gap=0.05) | masks, dict(eps=make.choose("eps", (1e-6, 1e-3, 1.0)))


def norm_and_rope(make: Maker, s: Streams, silent: list) -> tuple[dict, dict]:
    choose = make.choose
    over = choose("over", ("width", "head"))
    width = s.H * s.d if over == "width" else s.d
    garbage = GARBAGE[choose("garbage", GARBAGE)]
    qkv = s(
        lambda i, L: make.leaf(
            s.named("qkv", i), (s.B, L, 3, s.H, s.d), mask=s.named("key_masks", i), silent=silent[i], garbage=garbage
        )
    )

    def weight(name: str, i: int, L: int) -> Drawn | Frozen:
        name = s.named(name, i)
        return make.leaf(name, (width,), vector=True, dtype=make.own_dtype(name), around=1.0)

    weights = {name: s(partial(weight, name)) for name in ("q_weight", "k_weight")}
    static = dict(over=over, eps=norm_eps(choose), layout=choose("layout", ("interleaved", "half")))
    rotated = [choose(f"rotated{i}", ("no", "shared", "per_sample")) for i in range(len(s.lengths))]
    if set(rotated) == {"no"}:
        return dict(qkv=qkv, **weights), static
    operands = {}
    spare = choose("spare_positions", (0, 1, 9, 100))
    if choose("start_pos", (False, True)):
        operands["start_pos"] = make.constant("start_pos", lambda rng: rng.integers(0, spare + 1, s.B).astype(np.int32))
    columns = choose("columns", sorted({s.d // 2, s.d // 4, 1, s.d // 2 - 1}, reverse=True))

    def table(name: str, i: int, L: int) -> Constant | None:
        if rotated[i] == "no":
            return None
        P = max(1, L + spare)
        shape = (s.B, P, columns) if rotated[i] == "per_sample" else (P, columns)
        # cos and sin are independent here: what is turned need not keep its length.
        return make.constant(s.named(name, i), lambda rng: rng.uniform(-1, 1, shape).astype(np.float32))

    operands |= {name: s(partial(table, name)) for name in ("cos", "sin")}
    return dict(qkv=qkv, **weights) | operands, static


def qk_norm_rope(make: Maker):
    s = streams(make, norm_tiles)
    return norm_and_rope(make, s, [None] * len(s.lengths))


def qk_norm_rope_attention(make: Maker):
    s = streams(make, lambda *sizes: score_tiles(*sizes) + norm_tiles(*sizes))
    masks, silent = key_masks(make, s)
    operands, static = norm_and_rope(make, s, silent)
    return operands | masks | attn_mask(make, s.B, s.lengths[0]), static | attention_static(make.choose)


OPS: dict[str, Callable] = dict(
    layernorm_adaln=adaln,
    rmsnorm_adaln=adaln,
    layer_norm=lambda make: plain_norm(make, "weight", "bias"),
    rms_norm=lambda make: plain_norm(make, "weight"),
    gated_residual=gated_residual,
    gated_residual_norm_adaln=gated_residual_norm_adaln,
    qk_norm_rope=qk_norm_rope,
    joint_attention=joint_attention,
    qk_norm_rope_attention=qk_norm_rope_attention,
    relu_linear_attention=relu_linear_attention,
)


class Call(NamedTuple):
    """One call, of which there is a Case for every example of vmap; several differ in the operands `mapped`."""

    text: str
    dtype: str
    cases: list[Case]
    mapped: set[str]


def build(op: str, choose: Choices) -> Call:
    case, maker = example(op, choose, 0)
    text = f"{op} {choose.text()}".strip()
    if not maker.mapped:
        return Call(text, maker.dtype, [case._replace(label=text)], set())
    made = {name: texts[index] for name, (index, texts) in choose.made.items()}
    cases = [example(op, Choices(made), i)[0]._replace(label=f"{text} #{i}") for i in range(maker.examples)]
    return Call(text, maker.dtype, cases, maker.mapped)


def example(op: str, choose: Choices, number: int) -> tuple[Case, Maker]:
    maker = Maker(choose, number)
    operands, static = OPS[op](maker)
    return Case(op, "", operands, static), maker


# Judging


class Wrong(AssertionError):
    """What a call did that it must not do."""

    def __init__(self, kind: str, text: str):
        super().__init__(f"{kind}: {text}")
        self.kind = kind


def kind_of(error: Exception) -> str:
    """What shrinking keeps of a failure."""
    return getattr(error, "kind", type(error).__name__)


def results_of(framework, call: Call, implementation: str) -> list[Result]:
    """What the examples give: one call, or one under vmap."""
    if not call.mapped:
        return [frameworks.call(framework, call.cases[0], call.dtype, implementation)]
    return vmapped(framework, call, implementation)


def vmapped(framework, call: Call, implementation: str) -> list[Result]:
    """One call and its gradients under vmap over all examples."""
    case, dtype = call.cases[0], call.dtype
    transforms = framework.torch.func if framework.name == "torch" else framework.jax
    leaves = dict(walk(case.operands))
    examples = [frameworks.operands(c, dtype) for c in call.cases]
    stacked = lambda name: np.stack([x[name] for x in examples]) if name in call.mapped else examples[0][name]
    arrays = {name: framework.put(stacked(name), leaf.dtype or dtype) for name, leaf in leaves.items()}
    cotangents = [frameworks.cotangents(c, dtype) for c in call.cases]
    douts = {name: framework.put(np.stack([d[name] for d in cotangents]), "float32") for name in cotangents[0]}
    wanted = [name for name, leaf in leaves.items() if leaf.differentiable]
    function = getattr(framework.ops, case.call)

    def one(arrays, douts):
        def outs_of(some):
            operands = frameworks.fill(case.operands, arrays | some)
            return dict(walk(function(**operands, **case.static, implementation=implementation), "out"))

        outs, pullback = transforms.vjp(outs_of, {name: arrays[name] for name in wanted})
        (grads,) = pullback({name: cast_like(douts[name], out) for name, out in outs.items()})
        return outs | {f"d{name}": grad for name, grad in grads.items()}

    axes = {name: 0 if name in call.mapped else None for name in arrays}
    results = transforms.vmap(one, (axes, 0))(arrays, douts)
    dtypes = {name: frameworks.dtype_name(x) for name, x in results.items()}
    values = {name: framework.get(x) for name, x in results.items()}
    return [Result({name: x[i] for name, x in values.items()}, dtypes) for i in range(len(call.cases))]


def cast_like(x, y):
    return x.to(y.dtype) if hasattr(x, "to") and not hasattr(x, "astype") else x.astype(y.dtype)


def judge(call: Call, framework, implementation: str) -> list[Result]:
    """Run a call and compare it with float64."""
    where = f"{framework.name}, {implementation}"
    results = results_of(framework, call, implementation)
    for case, result in zip(call.cases, results, strict=True):
        for name, norm, error, budget in frameworks.judge(case, call.dtype, result):
            if implementation == "reference":  # sums in the framework's order; gradients are rounded where values are
                budget = 4 * budget + EPS[call.dtype]
            if not error <= budget and not error <= budget + 8 * noise(case, call.dtype, name, norm):
                raise Wrong(
                    "not finite" if np.isnan(error) else "inaccurate",
                    f"{where}: {name} has {norm} error {error:.3g}, budget {budget:.3g}",
                )
        for name, leaf in walk(case.operands):
            if getattr(leaf, "silent", None) is not None:
                d = leaf.view(result.values[f"d{name}"])
                if np.any(d[leaf.silent]):
                    raise Wrong("not silent", f"{where}: d{name} is not 0 at tokens that a key mask silences")
    return results


def noise(case: Case, dtype: str, name: str, norm: str) -> float:
    """How far the formula in float32 may be from float64, by chance, when every operand moves by an ulp.

    Where that is far, as in the norm of a constant row or the gradient of q where there is one key, float32 has not the digits,
    and how close two ways to compute the same come to float64 is luck.
    """
    exact = frameworks.formula_in(case, dtype, "float64").values[name]
    return max(frameworks.distance(moved[name], exact, frameworks.NORMS[norm]) for moved in moved_formulas(case, dtype))


@frameworks.recent
def moved_formulas(case: Case, dtype: str) -> list[dict[str, np.ndarray]]:
    """The formula in float32 at operands an ulp away: of float32, or half an ulp of dtype where something is rounded within."""
    softmax = case.call in frameworks.SOFTMAX
    within = softmax or case.call in frameworks.ROUNDS_WITHIN
    given = case.static.get("return_lse")
    place = lambda name: name if given else f"out[0]{name.removeprefix('out')}"  # of an output beside its log-sum-exp
    rounding = max(EPS[leaf.dtype or dtype] for leaf in dict(walk(case.operands)).values() if leaf.differentiable)
    ulp = max(EPS["float32"], rounding / 2 if within else 0.0)
    rng, leaves = case.rng(), dict(walk(case.operands))
    sign = lambda x: rng.choice((-1.0, 1.0), x.shape)
    dtypes = {name: "float32" if leaf.differentiable else leaf.dtype for name, leaf in leaves.items()}
    formula = frameworks.framework_of(INSTALLED[0]).formula
    results = []
    for _ in range(3):
        arrays = frameworks.operands(case, dtype)
        arrays = {name: x * (1 + ulp * sign(x)) if leaves[name].differentiable else x for name, x in arrays.items()}
        douts = frameworks.cotangents(case, dtype)
        if not softmax:
            results.append(formula(case, arrays, douts, dtypes, "float32").values)
            continue
        # The backward takes delta, the sum of o * do, from the rounded o. An error of delta is one of lse's gradient.
        outs = {place(name): x for name, x in frameworks.exact_outputs(case, dtype).items()}
        outs = {name: x for name, x in outs.items() if name.startswith("out[0]")}
        douts = {place(name): x for name, x in douts.items()}
        for name, o in outs.items():
            error = rounding * np.sqrt(np.sum((o * douts[name]) ** 2, -1)).swapaxes(1, 2)
            lse = name.replace("out[0]", "out[1]", 1)
            douts[lse] = douts.get(lse, 0.0) + error * sign(error)
        moved = formula(case._replace(static=case.static | dict(return_lse=True)), arrays, douts, dtypes, dtype).values
        names = {place(name): name for name in frameworks.cotangents(case, dtype)}
        results.append({names.get(name, name): x for name, x in moved.items()})
    return results


def same_bits(a: Result, b: Result, where: str) -> None:
    """On the CPU up to what subnormal terms may add to a sum: XLA's threads, in which its callbacks run, take them for 0."""
    if a.dtypes != b.dtypes:
        raise Wrong("dtypes", f"{where}: {a.dtypes} and {b.dtypes}")
    for name, x in a.values.items():
        y = b.values[name]
        differ = x.view("u8") != y.view("u8")
        if not GPU:
            with np.errstate(invalid="ignore"):
                differ &= ~(np.abs(x - y) <= 1e-30)
        if differ.any():
            raise Wrong("bits", f"{where}: {name} differs in {differ.sum()} of {differ.size} values")


def check_valid(call: Call, names: list[str]) -> None:
    """Both paths and all frameworks; raises whatever is wrong."""
    with running_kernels():
        kernels = [judge(call, frameworks.framework_of(name), "triton") for name in names]
        for other in kernels[1:]:
            for a, b in zip(kernels[0], other, strict=True):
                same_bits(a, b, "torch and jax")
        if GPU:
            for a, b in zip(kernels[0], judge(call, frameworks.framework_of(names[0]), "triton"), strict=True):
                same_bits(a, b, f"{names[0]}, twice")
    for name in names:
        judge(call, frameworks.framework_of(name), "reference")


# Invalid calls


class Mutation(NamedTuple):
    """One change of one argument."""

    kind: str
    target: str  # the argument
    entry: int  # of a tuple: which one changes
    axis: int


REPLACED: dict[str, Any] = dict(
    none=None, text="abc", number=0.5, negative=-1, nan=float("nan"), enormous=10**400, true=True, list=[], dict={},
    numbers=[0.5, 0.5], object=object(),
)  # fmt: skip
RESHAPED = ("rank_up", "rank_down", "scalar", "longer", "shorter", "empty")
CAST = ("float64", "float32", "bfloat16", "float16", "int32", "int64", "uint8", "bool", "complex64")
STREAMS = ("fewer", "more", "no_entries")


def mutation(op: str, choose: Choices, share: float, case: Case) -> Mutation | None:
    if not choose("mutated", (False, True), simplest=1 - 2 * share):
        return None
    names = [*inspect.signature(getattr(frameworks.mmattn, op)).parameters, "implementation"]
    hidden = ("precision", "start_extent")  # which the frameworks' functions do not have
    target = choose("target", [*case.operands, *(name for name in names if name not in hidden and name not in case.operands)])
    kinds = (*REPLACED, *RESHAPED, *CAST) if target in case.operands else (*REPLACED,)
    many = isinstance(case.operands.get(target), tuple) and not frameworks.is_leaf(case.operands[target])
    kind = choose("kind", kinds + STREAMS if many else kinds)
    return Mutation(kind, target, choose("entry", range(3)) if many else 0, choose("axis", range(5)) if kind in RESHAPED else 0)


def mutated(framework, x, m: Mutation):
    """The argument x, changed; as it was where the change does not apply to it."""
    if m.kind in STREAMS:
        if not isinstance(x, tuple):
            return x
        return dict(fewer=x[:-1], more=x + x[:1], no_entries=())[m.kind]
    if isinstance(x, tuple) and not isinstance(x, Row) and m.entry < len(x):
        return tuple(mutated(framework, y, m) if i == m.entry else y for i, y in enumerate(x))
    if m.kind in REPLACED:
        return REPLACED[m.kind]
    if not hasattr(x, "shape") or isinstance(x, Row):
        return x
    if m.kind in CAST:
        if framework.name == "torch":
            return x.to(getattr(framework.torch, m.kind))
        return x if m.kind in ("float64", "int64") else x.astype(m.kind)
    if m.kind == "rank_up":
        return x[None]
    if not x.shape or 0 in x.shape:
        return x
    if m.kind in ("rank_down", "scalar"):
        return x[0] if m.kind == "rank_down" else x.reshape(-1)[0]
    axis = m.axis % len(x.shape)
    cut = lambda part: x[(slice(None),) * axis + (part,)]
    if m.kind == "longer":
        xp = framework.torch if framework.name == "torch" else framework.jax.numpy
        return xp.concatenate([x, cut(slice(0, 1))], axis)
    return cut(slice(0, 0) if m.kind == "empty" else slice(0, -1))


def check_mutated(call: Call, m: Mutation, names: list[str]) -> None:
    """The call either raises a TypeError or ValueError that names the argument, or gives the same on both paths."""
    case, dtype = call.cases[0], call.dtype
    for name in names:
        framework = frameworks.framework_of(name)
        dtypes = {key: leaf.dtype or dtype for key, leaf in walk(case.operands)}
        arrays = {key: framework.put(x, dtypes[key]) for key, x in frameworks.operands(case, dtype).items()}
        arguments = frameworks.fill(case.operands, arrays) | case.static
        with running_kernels():
            outcomes = {path: outcome(framework, case.call, arguments, m, path) for path in ("triton", "reference")}
        agree(name, m, arguments, **outcomes)


def outcome(framework, op: str, arguments: dict, m: Mutation, path: str):
    """What a call gives or raises."""
    changed = arguments | {m.target: mutated(framework, arguments.get(m.target), m)}
    try:
        outs = getattr(framework.ops, op)(**dict(implementation=path) | changed)
        return {key: framework.get(x) for key, x in walk(outs, "out")}
    except Exception as error:
        return error


def agree(framework: str, m: Mutation, arguments: dict, triton, reference) -> None:
    for path, result in dict(triton=triton, reference=reference).items():
        if not isinstance(result, Exception):
            continue
        text = str(result).split(": ", 1)[-1]  # what comes first is the function
        if path == "triton" and isinstance(result, RuntimeError) and "cannot be met: float64" in text:
            return
        # A changed size or dtype is another argument's mistake too.
        related = [] if m.kind in REPLACED else arguments
        if not isinstance(result, TypeError | ValueError) or not any(name in text for name in (m.target, *related)):
            raise Wrong("words", f"{framework}, {path}: {type(result).__name__}: {result}") from result
    if isinstance(triton, Exception) != isinstance(reference, Exception):
        raise Wrong("paths", f"{framework}: one path refuses what the other takes: {triton!r} and {reference!r}")
    if isinstance(triton, Exception):
        return
    for name, x in triton.items():
        if x.shape != reference[name].shape or not frameworks.distance(x, reference[name], frameworks.NORMS["l2"]) < 0.1:
            raise Wrong("paths", f"{framework}: {name} differs between the paths")


# Running


def attempt(op: str, choose: Choices, names: list[str], invalid: float = 0.0) -> str:
    """Make a call and look at what it does. Returns its text; raises what is wrong."""
    call = build(op, choose)
    m = mutation(op, choose, invalid, call.cases[0])
    if m:
        check_mutated(call, m, names)
    else:
        check_valid(call, names)
    return f"{op} {choose.text()}"


class Failure(NamedTuple):
    text: str
    error: Exception


def shrunk(op: str, choose: Choices, error: Exception, names: list[str], seconds: float) -> Failure:
    """The simplest call found that fails in the same way."""
    end = time.monotonic() + seconds
    candidates = choose.simpler()
    while time.monotonic() < end and (given := next(candidates, None)) is not None:
        smaller = Choices(given)
        try:
            attempt(op, smaller, names)
        except Exception as found:
            if kind_of(found) == kind_of(error):
                choose, error, candidates = smaller, found, smaller.simpler()
    return Failure(f"{op} {choose.text()}", error)


def calls(seed: int, ops: list[str]) -> Iterator[tuple[str, Choices]]:
    """Without end, the ops in turn."""
    for index in count():
        yield ops[index % len(ops)], Choices(rng=np.random.default_rng((seed, index)))


def search(
    seed: int, ops: list[str], names: list[str], seconds: float, most: int = sys.maxsize, invalid: float = 0.3,
    log: Callable[[str], None] = lambda line: None,
) -> tuple[int, Failure | None]:  # fmt: skip
    """Make calls until one fails, time is up or there are enough: how many, and the failure."""
    end = time.monotonic() + seconds
    for n, (op, choose) in enumerate(calls(seed, ops)):
        if n == most or time.monotonic() > end:
            return n, None
        begin = time.monotonic()
        try:
            attempt(op, choose, names, invalid)
        except Exception as error:
            log(f"failed: {op} {choose.text()}: {error}")
            return n + 1, shrunk(op, choose, error, names, 120)
        log(f"{time.monotonic() - begin:6.2f} s  {op} {choose.text()}")
    raise AssertionError("calls never end")


def report(failure: Failure) -> str:
    """What is wrong, and the command that shows it again."""
    return f"{type(failure.error).__name__}: {failure.error}\n    python tests/fuzz.py --call '{failure.text}'"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--op", choices=OPS, action="append")
    parser.add_argument("--framework", choices=INSTALLED, action="append")
    parser.add_argument("--invalid", type=float, default=0.3, help="share of calls that are mutated, at most a half")
    parser.add_argument("--call", help="the text of one call, to make it again")
    parser.add_argument("--verbose", action="store_true", help="print every call and how long it took")
    args = parser.parse_args()
    names = args.framework or INSTALLED
    if args.call:
        op, _, text = args.call.partition(" ")
        attempt(op, Choices(parsed(text)), names)
        print("nothing wrong")
        return 0
    log = (lambda line: print(line, flush=True)) if args.verbose else lambda line: None
    n, failure = search(args.seed, args.op or list(OPS), names, args.seconds, invalid=args.invalid, log=log)
    if failure is None:
        print(f"{n} calls of seed {args.seed}: nothing wrong")
        return 0
    print(f"call {n} of seed {args.seed} is wrong. Made simpler:\n{report(failure)}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
