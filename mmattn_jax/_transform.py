"""What batching, sharding and shard_map ask of a primitive, derived from the roles of its arrays.

Every array leads with the batch axis, but for those that all samples share, which may lead with a group axis (see
`mmattn.op.Op`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, use_abstract_mesh

from mmattn.op import Spec


class Role(NamedTuple):
    """Leading with the batch axis (rank None), or shared by all samples."""

    rank: int | None = None  # of a shared array without its group axis
    constant: bool = False  # whether a shared array has no gradient

    def groups(self, x) -> int | None:
        """Groups of a shared array; None where it has no group axis."""
        return x.shape[0] if self.rank is not None and len(x.shape) > self.rank else None


BATCH = Role()


def varying(x) -> frozenset[str]:
    """The mesh axes over which shard_map says that x varies."""
    return jax.typeof(x).manual_axis_type.varying


def align(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """All arrays varying over the union of their axes, as array code does it within shard_map.

    It must happen outside of what is differentiated: the transpose of this cast is the psum of a replicated operand's gradient.
    """
    axes = frozenset().union(*map(varying, arrays))
    return [jax.lax.pcast(x, tuple(axes - varying(x)), to="varying") if axes - varying(x) else x for x in arrays]


def check_varying(name: str, avals) -> None:
    if len({aval.manual_axis_type.varying for aval in avals}) > 1:
        axes = [set(aval.manual_axis_type.varying) for aval in avals]
        raise ValueError(f"{name}: operands vary over the mesh axes {axes}; expected the same for all. Cast them with align.")


def lead(avals, roles: Sequence[Role]):
    """An operand that shows how the batch axis is sharded under an explicit mesh."""
    batch = [aval for aval, role in zip(avals, roles, strict=True) if role == BATCH]
    return next((aval for aval in batch if aval.sharding.spec[0] is not None), batch[0])


def like(aval, s: Spec):
    """The aval of a result: an operand's, so that its mesh axes go on, the trailing ones only if it has the same shape."""
    sharding = aval.sharding
    if aval.shape != s.shape:
        sharding = sharding.update(spec=PartitionSpec(sharding.spec[0], *[None] * (len(s.shape) - 1)))
    return aval.update(shape=s.shape, dtype=jnp.dtype(s.dtype), weak_type=False, sharding=sharding)


def fold(bind: Callable, arrays, axes, ins: Sequence[Role], outs: Sequence[Role], *, gradients: bool):
    """vmap: the mapped axis becomes part of the batch axis and of the groups, so that one launch serves it.

    Shared arrays stay shared while none of them is mapped or has groups, except where their gradients are computed: each
    example of the mapped axis has its own.
    """
    n = examples = next(x.shape[axis] for x, axis in zip(arrays, axes, strict=True) if axis is not None)
    if n == 0:  # kernels and their plans divide by the number of samples: one example of zeros, of which nothing is kept
        one = lambda x, axis: jnp.zeros([1 if i == axis else size for i, size in enumerate(x.shape)], x.dtype)
        arrays = [x if axis is None else one(x, axis) for x, axis in zip(arrays, axes, strict=True)]
        n = 1
    shared = lambda constant: [
        (x.ndim - (axis is not None), axis, role)
        for x, axis, role in zip(arrays, axes, ins, strict=True)
        if role.rank is not None and role.constant == constant
    ]
    apart = lambda c: any(axis is not None or ndim > role.rank for ndim, axis, role in shared(c))
    regroup = {c: (gradients and not c) or apart(c) for c in (False, True)}
    grouped = any(ndim > role.rank for ndim, _, role in shared(False))
    spread = (None, None)  # mesh axes that shard the mapped axis and the batch axis, under an explicit mesh

    def folded(x, axis, role):
        nonlocal spread
        if role.rank is not None and not regroup[role.constant]:
            return x
        x = jnp.broadcast_to(x, (n, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
        if role.rank is not None and x.ndim == role.rank + 1:
            return x  # the mapped axis is the group axis
        outer, inner, *rest = jax.typeof(x).sharding.spec
        if role == BATCH and spread == (None, None):
            spread = (outer, inner)
        return reshape(x, (n * x.shape[1], *x.shape[2:]), (names(outer) + names(inner) or None, *rest))

    def unfolded(x, role):
        if role.rank is not None and not grouped:
            return x
        return reshape(x, (n, x.shape[0] // n, *x.shape[1:]), (*spread, *jax.typeof(x).sharding.spec[1:]))

    results = map(unfolded, bind(*map(folded, arrays, axes, ins)), outs)
    return [x if n == examples else x[:0] for x in results]


def names(entry) -> tuple[str, ...]:
    """The mesh axes in one entry of a PartitionSpec."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def reshape(x, shape, spec):
    """x.reshape(shape), which an explicit mesh asks to say where the result lies."""
    sharding = jax.typeof(x).sharding
    explicit = any(entry is not None for entry in sharding.spec)
    return jax.lax.reshape(x, shape, out_sharding=sharding.update(spec=PartitionSpec(*spec)) if explicit else None)


def partitioned(compute: Callable, arrays, ins: Sequence[Role], outs: Sequence[Role]):
    """`compute` on each device's part of the batch, and of the groups where there are any.

    Without this XLA gathers the batch and every device computes all of it. Gradients of arrays that all devices share are
    summed over the mesh axes that shard the batch. Within a shard_map over some of the mesh's axes XLA does not name the
    others: there a batch that they shard is gathered where such a sum would be needed.
    """
    batch = next(x.shape[0] for x, role in zip(arrays, ins, strict=True) if role == BATCH)
    groups = {role.groups(x) for x, role in zip(arrays, ins, strict=True)} - {None, 1}

    def partition(mesh, operands, results):
        split = lambda x, role: role == BATCH or role.groups(x) in groups
        if not isinstance(operands[0].sharding, NamedSharding):
            leads = [(leading(x), role == BATCH) for x, role in zip((*operands, *results), (*ins, *outs), strict=True)]
            mine, others = ({where for where, batch in leads if batch == own} for own in (True, False))
            keep = len(mine) == 1 and None not in mine and others <= {()} and all(role == BATCH for role in outs)
            return mesh, compute, *(tuple(x.sharding if keep else replicated(x) for x in xs) for xs in (results, operands))
        shardings = [x.sharding for x, role in zip((*operands, *results), (*ins, *outs), strict=True) if role == BATCH]
        axes = next((names(sharding.spec[0]) for sharding in shardings if sharding.spec[0] is not None), ())
        devices = math.prod(mesh.shape[name] for name in axes)
        if any(size % devices for size in (batch, *groups)):
            axes = ()
        place = lambda x, role: NamedSharding(mesh, PartitionSpec(axes if axes and split(x, role) else None))
        summed = [bool(axes) and not split(x, role) for x, role in zip(results, outs, strict=True)]

        def local(*arrays):
            return tuple(total(x, axes) if add else x for x, add in zip(compute(*arrays), summed, strict=True))

        return mesh, local, tuple(map(place, results, outs)), tuple(map(place, operands, ins))

    def rule(mesh, operands, results):
        """Shardy's einsum-like rule: only the batch axis carries a sharding through."""
        terms = [
            " ".join("b" if role == BATCH and k == 0 else f"{side}{i}_{k}" for k in range(len(x.shape)))
            for side, types, roles in (("x", operands, ins), ("y", results, outs))
            for i, (x, role) in enumerate(zip(types, roles, strict=True))
        ]
        text = ", ".join(terms[: len(ins)]) + " -> " + ", ".join(terms[len(ins) :])
        return text, dict(need_replication_factors=tuple(term for term in " ".join(terms).split() if term != "b"))

    call = custom_partitioning(lambda *arrays: compute(*arrays))
    call.def_partition(partition=partition, sharding_rule=rule)
    return call(*arrays)


def no_mesh():
    """A context for the code of one device: array code must not constrain shardings, whatever the caller's mesh is."""
    return use_abstract_mesh(AbstractMesh((), ()))


def total(x, axes: tuple[str, ...]):
    """The sum over mesh axes in a fixed order, in float32. (Under an explicit mesh jax 0.12 cannot lower a psum here.)"""
    with no_mesh():
        return jnp.sum(jax.lax.all_gather(x, axes), 0, dtype=jnp.float32).astype(x.dtype)


def leading(x) -> tuple | None:
    """How an unnamed sharding splits the leading axis, () where it splits nothing, None where it splits another axis."""
    sharding = x.sharding._to_xla_hlo_sharding(len(x.shape))
    if sharding.is_replicated():
        return ()
    first, *rest = sharding.tile_assignment_dimensions()[: len(x.shape)]
    return (first, *sharding.tile_assignment_devices()) if all(k == 1 for k in rest) else None


def replicated(x):
    return type(x.sharding).get_replicated(x.sharding._device_assignment)
