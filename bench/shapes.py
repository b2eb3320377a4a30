"""Named shapes. "target" is the model this project is for: 186 tokens and 64 of context, width 128, 8 heads."""

from __future__ import annotations

from typing import NamedTuple


class Norm(NamedTuple):
    batch: int
    tokens: int
    width: int


class Attention(NamedTuple):
    """Attention alone; the tokens of several streams add up."""

    batch: int
    heads: int
    tokens: tuple[int, ...]
    width: int  # of a head
    padded: bool = False  # whether a key mask hides up to three eighths of a sample's tokens


class Whole(NamedTuple):
    """QK-norm, RoPE and joint attention of packed projections of two streams."""

    batch: int
    heads: int
    tokens: tuple[int, int]
    width: int
    over: str  # what the norm runs over, "width" or "head"
    rotated: tuple[bool, bool]


class Model(NamedTuple):
    """GPT2Stack with conditioning and cross attention."""

    batch: int
    tokens: tuple[int, int] = (186, 64)
    width: int = 128
    heads: int = 8
    feedforward: int = 512
    depth: int = 12


NORM = {
    "target": Norm(128, 186, 128),
    "b1024": Norm(1024, 186, 128),
    "sd3": Norm(8, 4096, 1536),
    "flux": Norm(8, 4608, 3072),
}
ATTENTION = {
    "target": Attention(128, 8, (186,), 16),
    "target-ctx": Attention(128, 8, (186, 186), 16),
    "d16-long": Attention(4, 8, (4096,), 16),
    "d32-long": Attention(4, 16, (4096,), 32),
    "sd3": Attention(4, 24, (4096, 333), 64),
    "flux": Attention(2, 24, (4096, 512), 128),
}
ATTENTION |= {f"{name}-padded": ATTENTION[name]._replace(padded=True) for name in ("target", "d16-long", "sd3", "flux")}
WHOLE = {
    "target": Whole(128, 8, (186, 64), 16, "width", (True, False)),
    "sd3": Whole(4, 24, (4096, 333), 64, "head", (False, False)),
    "flux": Whole(2, 24, (4096, 512), 128, "head", (True, True)),
}
MODEL = {"b1": Model(1), "b16": Model(16), "target": Model(128), "b1024": Model(1024)}

OPS = {
    "layernorm_adaln": NORM,
    "rmsnorm_adaln": NORM,
    "rms_norm": NORM,
    "layer_norm": NORM,
    "gated_residual": NORM,
    "gated_residual_norm_adaln": NORM,
    "joint_attention": ATTENTION,
    "qk_norm_rope_attention": WHOLE,
    "model": MODEL,
}
GROUPS = {
    "norms": tuple(op for op, named in OPS.items() if named is NORM),
    "attention": ("joint_attention", "qk_norm_rope_attention"),
    "model": ("model",),
    "all": tuple(OPS),
}


def cases(what: str, names: list[str] | None) -> list[tuple[str, str]]:
    """(op, shape) of an op or a group, for the shapes named, all without."""
    return [(op, name) for op in GROUPS.get(what, (what,)) for name in names or OPS[op] if name in OPS[op]]


def text(shape) -> str:
    """Sizes alone: "4, 24, 4096 + 333, 64"."""
    sizes = (x for x in shape if not isinstance(x, str | bool) and not (isinstance(x, tuple) and isinstance(x[0], bool)))
    return ", ".join(" + ".join(map(str, x)) if isinstance(x, tuple) else str(x) for x in sizes)
