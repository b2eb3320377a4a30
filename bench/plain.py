"""The formulas as users write them today, over either framework: what the kernels are compared with.

`Torch(attention)` and `Jax(attention)` have the public operations under their public names; `attention` takes and returns
(B, L, H, d), and a mask over the keys (B, L) where a problem has one.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

RMS_EPS = 1.1920929e-7


class Plain:
    def __init__(self, attention):
        self.attention = attention

    def layernorm_adaln(self, x, scale, shift):
        return self.layer(x) * (1 + scale[:, None]) + shift[:, None]

    def rmsnorm_adaln(self, x, scale, shift):
        return self.rms(x, None, 1e-6) * (1 + scale[:, None]) + shift[:, None]

    def rms_norm(self, x, weight):
        return self.rms(x, weight, 1e-6)

    def gated_residual(self, residual, h, gate):
        return residual + gate[:, None] * h

    def gated_residual_norm_adaln(self, residual, h, gate, scale, shift):
        r = self.gated_residual(residual, h, gate)
        return r, self.layernorm_adaln(r, scale, shift)

    def joint_attention(self, q, k, v, *, key_masks=()):
        return self.attention(q, k, v, *key_masks)

    def qk_norm_rope_attention(self, qkv, q_weight, k_weight, *, over, cos, sin):
        def joint(part, weights):
            streams = zip(qkv, weights, cos, sin, strict=True)
            return self.cat([self.rotate(self.qk_norm(x[:, :, part], w, over), c, s) for x, w, c, s in streams])

        v = self.cat([x[:, :, 2] for x in qkv])
        o = self.attention(joint(0, q_weight), joint(1, k_weight), v)
        first = qkv[0].shape[1]
        return o[:, :first], o[:, first:]

    def qk_norm(self, x, weight, over):
        row = x.reshape(*x.shape[:2], -1) if over == "width" else x
        return self.rms(row, weight, RMS_EPS).reshape(x.shape)

    def rotate(self, x, cos, sin):
        """RoPE of interleaved pairs at positions 0, 1, ..."""
        if cos is None:
            return x
        cos, sin = cos[: x.shape[1], None], sin[: x.shape[1], None]
        a, b = self.wide(x[..., 0::2]), self.wide(x[..., 1::2])
        return self.like(self.stack([a * cos - b * sin, a * sin + b * cos]).reshape(x.shape), x)

    def model(self, weights, x, y, context, *, depth, heads, cos, sin):
        """GPT2Stack; weights by the names of its state dict."""
        streams, y = [x, context], self.silu(y[:, 0])
        for i in range(depth):
            streams = self.block(lambda name, i=i: weights[f"layers.{i}.{name}"], streams, y, heads, cos, sin)
        return tuple(streams)

    def block(self, w, streams, y, heads, cos, sin):
        layers, projections = ("", "context_layers."), ("cross_attn.", "cross_attn.c_")
        linear = lambda x, name: self.linear(x, w(f"{name}.weight"), w(f"{name}.bias"))
        # scale, shift, gate of the attention, then of the MLP
        rows = [self.chunk(linear(y, f"{layer}adaLN_modulation.1"), 6) for layer in layers]
        qkv = [
            linear(self.layernorm_adaln(x, m[0], m[1]), f"{p}to_qkv").reshape(*x.shape[:2], 3, heads, -1)
            for x, m, p in zip(streams, rows, projections, strict=True)
        ]
        weight = lambda part: [w(f"{p}rms_norm_{part}.weight") for p in projections]
        outs = self.qk_norm_rope_attention(qkv, weight("q"), weight("k"), over="width", cos=(cos, None), sin=(sin, None))
        results = []
        for x, o, m, p, layer in zip(streams, outs, rows, projections, layers, strict=True):
            o = linear(o.reshape(*x.shape[:2], -1), f"{p}to_out.0")
            x = self.gated_residual(x, self.rms(o, w(f"{p}to_out.1.weight"), RMS_EPS), m[2])
            h = self.silu(linear(self.layernorm_adaln(x, m[3], m[4]), f"{layer}mlp.0"))
            results.append(self.gated_residual(x, linear(h, f"{layer}mlp.2"), m[5]))
        return results


class Torch(Plain):
    linear, silu = staticmethod(F.linear), staticmethod(F.silu)
    cat = staticmethod(partial(torch.cat, dim=1))
    stack = staticmethod(partial(torch.stack, dim=-1))
    chunk = staticmethod(partial(torch.chunk, dim=-1))

    def layer(self, x):
        return F.layer_norm(x, x.shape[-1:], eps=1e-6)

    def layer_norm(self, x, weight, bias):
        return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-6)

    def rms(self, x, weight, eps):
        return F.rms_norm(x, x.shape[-1:], weight, eps)

    def wide(self, x):
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def like(self, x, y):
        return x.to(y.dtype)


def sdpa(q, k, v, keys=None):
    mask = None if keys is None else keys[:, None, None]
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask).transpose(1, 2)


def sdpa_by(backend: SDPBackend):
    """sdpa that names its backend itself: around a compiled function the choice would not reach what is compiled, and the
    functions of two backends would share their code."""

    def attend(*arrays):
        with sdpa_kernel(backend):
            return sdpa(*arrays)

    return attend


class Jax(Plain):
    def __init__(self, implementation: str):
        import jax
        import jax.numpy as jnp

        def attend(q, k, v, keys=None):
            mask = None if keys is None else keys[:, None, None]
            return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=implementation)

        super().__init__(attend)
        self.silu = jax.nn.silu
        self.cat, self.stack = partial(jnp.concatenate, axis=1), partial(jnp.stack, axis=-1)
        self.rsqrt, self.float32 = jax.lax.rsqrt, jnp.float32
        self.chunk = partial(jnp.split, axis=-1)

    def linear(self, x, weight, bias):
        return x @ weight.T + bias

    def layer(self, x):
        return self.like(self.centred(x), x)

    def layer_norm(self, x, weight, bias):
        return self.like(self.centred(x) * weight + bias, x)

    def centred(self, x):
        wide = self.wide(x)
        centred = wide - wide.mean(-1, keepdims=True)
        return centred * self.rsqrt((centred * centred).mean(-1, keepdims=True) + 1e-6)

    def rms(self, x, weight, eps):
        wide = self.wide(x)
        y = wide * self.rsqrt((wide * wide).mean(-1, keepdims=True) + eps)
        return self.like(y if weight is None else y * weight, x)

    def wide(self, x):
        return x.astype(self.float32)

    def like(self, x, y):
        return x.astype(y.dtype)
