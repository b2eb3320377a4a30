"""vmap as one launch: the new axis, of size n, is folded into the batch axis, and into the group axis of shared operands."""

from __future__ import annotations

from torch import Tensor

from mmattn.op import Op


def lead(x: Tensor, dim: int | None, n: int) -> Tensor:
    return x.unsqueeze(0).expand(n, *x.shape) if dim is None else x.movedim(dim, 0)


def fold(x: Tensor, dim: int | None, n: int) -> Tensor:
    x = lead(x, dim, n)
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def fold_operand(op: Op, owner: str, x: Tensor, dim: int | None, n: int) -> Tensor:
    rank = op.shared.get(owner)
    if rank is None:
        return fold(x, dim, n)
    grouped = x.dim() - (dim is not None) > rank
    if dim is None and owner in op.constant and (not grouped or x.shape[0] == 1):
        return x  # one group serves every sample; without a gradient there is nothing to keep apart
    return fold(x, dim, n) if grouped else lead(x, dim, n)


def unfold(x: Tensor, n: int) -> Tensor:
    return x.reshape(n, x.shape[0] // n, *x.shape[1:])
