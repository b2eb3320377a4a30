"""The array namespace that formulas are computed in: torch's functions, and what begins with no array begins where one is.

A constant that is made on the CPU and moved makes a GPU wait, and a CUDA graph refuses it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def arange(n: int, *, like: Tensor) -> Tensor:
    """0, 1, ..., n - 1 on another tensor's device."""
    return torch.arange(n, device=like.device)


def __getattr__(name: str):
    return getattr(torch, name)
