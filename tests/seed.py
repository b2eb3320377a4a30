"""The seed's attention and block, restated from their formulas in plain torch over dicts of named weights.

Shares nothing with the packages under test: names, shapes and mathematics are written out here once more.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

RMS_EPS = 1.1920929e-7


def linear_shapes(name: str, d_in: int, d_out: int) -> dict:
    return {f"{name}.weight": (d_out, d_in), f"{name}.bias": (d_out,)}


def attention_shapes(dim: int, context: bool, prefix: str = "") -> dict:
    shapes = {}
    for stream in ("", "c_") if context else ("",):
        at = prefix + stream
        shapes |= linear_shapes(f"{at}to_qkv", dim, 3 * dim) | linear_shapes(f"{at}to_out.0", dim, dim)
        shapes |= {f"{at}{norm}.weight": (dim,) for norm in ("rms_norm_q", "rms_norm_k", "to_out.1")}
    return shapes


def block_shapes(dim: int, hidden: int, conditioning: bool, cross: bool) -> dict:
    shapes = attention_shapes(dim, cross, "cross_attn." if cross else "attn.")
    for at in ("", "context_layers.") if cross else ("",):
        shapes |= linear_shapes(f"{at}mlp.0", dim, hidden) | linear_shapes(f"{at}mlp.2", hidden, dim)
        if conditioning:
            shapes |= linear_shapes(f"{at}adaLN_modulation.1", dim, 6 * dim)
        else:
            shapes |= {f"{at}{norm}.{kind}": (dim,) for norm in ("ln_1", "ln_2") for kind in ("weight", "bias")}
    return shapes


def random_weights(shapes: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    draw = lambda name, shape: torch.randn(shape, generator=g) * (shape[-1] ** -0.5 if len(shape) == 2 else 0.3)
    norm = lambda name: "rms_norm" in name or "ln_" in name or name.endswith("to_out.1.weight")
    return {name: draw(name, shape) + (1.0 if norm(name) and name.endswith("weight") else 0.0) for name, shape in shapes.items()}


def rms_norm(x, weight):
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + RMS_EPS)


def rotate(x, start):
    """x (B, H, L, d): pairs (2i, 2i + 1) as complex numbers, turned by position * 10000^(-2i / d)."""
    B, _, L, d = x.shape
    frequency = 1.0 / (10000.0 ** (torch.arange(0, d, 2).float() / d))
    position = torch.arange(L)[None] + (torch.zeros(B, 1) if start is None else start[:, None])
    angle = (position.float()[:, :, None] * frequency)[:, None]
    turned = torch.view_as_complex(x.reshape(B, -1, L, d // 2, 2)) * torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(turned).reshape(x.shape)


def augment(mask, C: int):
    """(B, L, L) -> (B, L + C, L + C)."""
    B, L, _ = mask.shape
    full = torch.ones(B, L + C, L + C, dtype=torch.bool)
    full[:, :L, :L] = mask
    full[:, :L, L:] = mask.any(2)[:, :, None]
    full[:, L:, :L] = mask.any(1)[:, None, :]
    return full


def attention(w, x, context=None, mask=None, start=None, *, heads: int, prefix: str = "", linear: bool = False):
    def project(stream, at):
        q, k, v = F.linear(stream, w[f"{at}to_qkv.weight"], w[f"{at}to_qkv.bias"]).chunk(3, -1)
        q, k = rms_norm(q, w[f"{at}rms_norm_q.weight"]), rms_norm(k, w[f"{at}rms_norm_k.weight"])
        return (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))

    def out(o, at):
        o = F.linear(o.transpose(1, 2).flatten(2), w[f"{at}to_out.0.weight"], w[f"{at}to_out.0.bias"])
        return rms_norm(o, w[f"{at}to_out.1.weight"])

    L = x.shape[1]
    q, k, v = project(x, prefix)
    q, k = rotate(q, start), rotate(k, start)
    mask = None if mask is None else mask.bool()
    if context is not None:
        q, k, v = (torch.cat(pair, 2) for pair in zip((q, k, v), project(context, f"{prefix}c_"), strict=True))
        mask = None if mask is None else augment(mask, context.shape[1])
    if linear:
        q, k = q.relu(), k.relu()
        if mask is not None:
            k = k * mask[:, None, 0, :, None]
        numerator = q @ (k.transpose(2, 3) @ v)
        o = numerator / (q @ k.sum(2)[..., None] + 1e-6)
    else:
        scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], -1e30)
        o = scores.softmax(-1) @ v
        if mask is not None:
            o = o * mask.any(-1)[:, None, :, None]
    if context is None:
        return out(o, prefix), None
    return out(o[:, :, :L], prefix), out(o[:, :, L:], f"{prefix}c_")


def block(w, x, y=None, mask=None, context=None, start=None, *, heads: int):
    def modulation(at):
        if y is None:
            return (0, 0, 1, 0, 0, 1)
        return F.linear(F.silu(y), w[f"{at}adaLN_modulation.1.weight"], w[f"{at}adaLN_modulation.1.bias"]).chunk(6, -1)

    def layer_norm(s, at, norm):
        return F.layer_norm(s, s.shape[-1:], w.get(f"{at}{norm}.weight"), w.get(f"{at}{norm}.bias"), 1e-6)

    def mlp(s, at):
        return F.linear(
            F.silu(F.linear(s, w[f"{at}mlp.0.weight"], w[f"{at}mlp.0.bias"])), w[f"{at}mlp.2.weight"], w[f"{at}mlp.2.bias"]
        )

    streams = {"": x} if context is None else {"": x, "context_layers.": context}
    rows = {at: modulation(at) for at in streams}
    h = [layer_norm(s, at, "ln_1") * (1 + rows[at][0]) + rows[at][1] for at, s in streams.items()]
    attended = attention(w, *h, mask=mask, start=start, heads=heads, prefix="attn." if context is None else "cross_attn.")
    outs = []
    for (at, s), o in zip(streams.items(), attended, strict=False):
        _, _, gate_1, scale, shift, gate_2 = rows[at]
        s = s + gate_1 * o
        outs.append(s + gate_2 * mlp(layer_norm(s, at, "ln_2") * (1 + scale) + shift, at))
    return (*outs, None)[:2]
