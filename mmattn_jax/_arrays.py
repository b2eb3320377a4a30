"""The array namespace that formulas are computed in: jax.numpy, with NumPy's `like=` where a formula begins with no array."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def arange(n: int, *, like: jax.Array) -> jax.Array:
    """0, 1, ..., n - 1. JAX puts constants where what reads them is."""
    return jnp.arange(n)


def __getattr__(name: str):
    return getattr(jnp, name)
