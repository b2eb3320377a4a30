"""vmap as one launch: the new axis, of size n, is folded into the batch axis, and into the group axis of shared operands."""

from __future__ import annotations

from torch import Tensor

from mmattn.op import Op


def examples(arrays: list[Tensor], dims: list[int | None], n: int) -> tuple[list[Tensor], int]:
    """Arrays and their number of examples, which is at least one: in place of none there is one of zeros. Kernels and their plans
    divide by the number of samples; callers drop what has come of it."""
    if n:
        return arrays, n
    shape = lambda x, dim: [1 if i == dim else size for i, size in enumerate(x.shape)]
    return [x if dim is None else x.new_zeros(shape(x, dim)) for x, dim in zip(arrays, dims, strict=True)], 1


def lead(x: Tensor, dim: int | None, n: int) -> Tensor:
    return x.unsqueeze(0).expand(n, *x.shape) if dim is None else x.movedim(dim, 0)


def fold(x: Tensor, dim: int | None, n: int) -> Tensor:
    x = lead(x, dim, n)
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def fold_operands(op: Op, owners: list[str], arrays: list[Tensor], dims: list[int | None], n: int) -> list[Tensor]:
    """Operands, of which the shared ones get groups. Those without a gradient stay as they are while none of them is mapped:
    one group serves every sample."""
    alike = lambda owner: owner in op.shared and owner in op.constant
    together = all(dim is None for owner, dim in zip(owners, dims, strict=True) if alike(owner))

    def folded(owner: str, x: Tensor, dim: int | None) -> Tensor:
        rank = op.shared.get(owner)
        if rank is None:
            return fold(x, dim, n)
        grouped = x.dim() - (dim is not None) > rank
        if alike(owner) and together and (not grouped or x.shape[0] == 1):
            return x
        return fold(x, dim, n) if grouped else lead(x, dim, n)

    return list(map(folded, owners, arrays, dims))


def unfold(x: Tensor, n: int) -> Tensor:
    return x.reshape(n, x.shape[0] // n, *x.shape[1:])
