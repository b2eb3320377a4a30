"""Any Op as differentiable JAX primitives.

An op gets two primitives, `mmattn_<op>_fwd` and `mmattn_<op>_bwd`, over the flat arrays that are present. What runs is
chosen when they are lowered: Triton kernels for CUDA, the reference for any other platform, so that `jit` for CPU, lowering
for CUDA on a machine without a GPU, and `jax.export` for both at once come from one traced function.

The derivative of the forward is a linear primitive that only knows its transpose, the backward. That is what
`jax.custom_vjp` does, but its refusal of forward mode cannot say what to do instead; ours names implementation="reference".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax._src.dispatch import prim_requires_devices_during_lowering
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla

import mmattn
from mmattn import _gluon
from mmattn._triton import INSTALLED
from mmattn.choice import ROCM, decide, first_only, no_gradient, not_a_gpu, old_gpu, unmet
from mmattn.op import Call, Layout, Op, Plan, Target, flatten, owners, unflatten
from mmattn.rows import gradient_spec

from . import _arrays, _jax_triton
from ._choice import current
from ._transform import BATCH, Role, align, check_varying, fold, lead, like, no_mesh, partitioned

host_launch: Callable[[Plan, Sequence[jax.Array]], tuple[jax.Array, ...]] | None = None
"""What launches kernels on platforms that are no GPU; tests put Triton's interpreter here."""
partition_host = False
"""Whether those platforms partition the primitives as GPUs do; tests set it to partition over fake devices."""

_target: Target | None = None


def set_target(target: Target | None) -> None:
    """Lower for this GPU from now on. None, the default: for this machine's, without one for sm_90 with 132 SMs."""
    global _target
    _target = target


def target() -> Target:
    if _target is not None:
        return _target
    try:
        device = jax.devices("cuda")[0]
    except RuntimeError:
        return Target()
    arch = int(device.compute_capability.replace(".", ""))
    shared = getattr(device, "shared_memory_per_block_optin", Target().shared)
    return Target(arch, device.core_count, shared, _gluon.INSTALLED)


def problem(platform: str) -> str | None:
    """Why kernels cannot run on a platform, None if they can."""
    if platform == "rocm":
        return ROCM
    if platform != "cuda":
        return None if host_launch else not_a_gpu(platform)
    if not INSTALLED:
        return "triton is not installed"
    if not _jax_triton.installed():
        return "jax-triton is not installed"
    return old_gpu(target().arch)


def launch(plan: Plan, arrays: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Trace one launch on a GPU."""
    return _jax_triton.call(plan, arrays, target().arch)


class Run(NamedTuple):
    """What an op asks of a framework: the GPU's properties, and to launch a plan."""

    target: Target
    launch: Callable

    def __call__(self, plan: Plan, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        if 0 in plan.grid:  # which cannot be launched: no token at all, so what is not empty is a sum over nothing
            return tuple(jnp.zeros(out.shape, out.dtype) for out in plan.outs)
        return self.launch(plan, arrays)


class Form(NamedTuple):
    """What a primitive knows of its call besides the arrays."""

    name: str  # of the public function
    layout: Layout
    static: tuple[tuple[str, Any], ...]
    outs: int
    extras: int


def bind(call: Call, requested: str | None) -> Any:
    """The public result of a call. What tracing knows decides here between kernels and reference, the rest at lowering."""
    op = call.op
    arrays, layout = flatten(op, call.operands)
    arrays = [x if isinstance(x, jax.Array) else jnp.asarray(x) for x in arrays]
    wanted = current(traced=any(isinstance(x, jax.core.Tracer) for x in arrays)) if requested is None else requested
    if decide(call, requested, wanted, None).path == "reference":
        return call.result(formula(op, layout, call.static, arrays))
    outs, extras = op.infer(unflatten(layout, arrays), **dict(call.static))
    form = Form(call.name, layout, call.static, len(outs), len(extras))
    forward, _ = primitives(op)
    return call.result(tuple(forward.bind(*align(arrays), form=form, implementation=wanted)[: form.outs]))


def formula(op: Op, layout: Layout, static, arrays) -> tuple[jax.Array, ...]:
    """The reference in JAX, its float32 products as exact as the kernels' unless the user chose a precision."""
    with jax.default_matmul_precision(jax.config.jax_default_matmul_precision or "highest"):
        return tuple(op.reference(_arrays, unflatten(layout, arrays), **dict(static)))


def checkpoint_name_of(op: Op) -> str:
    return f"mmattn_{op.name}"


CHECKPOINT_NAMES = tuple(map(checkpoint_name_of, mmattn.OPS))
"""What `jax.checkpoint_policies.save_only_these_names` takes to keep an op's results and residuals: one name per op."""


@cache  # two for each op
def primitives(op: Op) -> tuple[Primitive, Primitive]:
    """An op's forward and backward."""
    forward, backward = primitive(Forward(op)), primitive(Backward(op))
    ad.primitive_jvps[forward] = partial(linearize, op)
    ad.primitive_jvps[backward] = lambda primals, tangents, *, form, **_: refuse(form)
    return forward, backward


def primitive(half: Forward | Backward) -> Primitive:
    p = Primitive(half.name)
    p.multiple_results = True
    p.def_impl(partial(xla.apply_primitive, p))

    def abstract(*avals, form, implementation):
        check_varying(half.name, avals)
        return half.avals(avals, form)

    @partial(jax.jit, static_argnames=("axes", "form", "implementation"), inline=True)
    def folded(arrays, axes, form, implementation):
        run = partial(p.bind, form=form, implementation=implementation)
        return fold(run, arrays, axes, *half.roles(form), gradients=half.gradients)

    def batch(arrays, axes, **params):  # at once, since debug_nans looks at every step, and masked tokens may hold NaN
        results = folded(arrays, tuple(axes), **params)
        return results, [0] * len(results)

    p.def_abstract_eval(abstract)
    batching.primitive_batchers[p] = batch
    mlir.register_lowering(p, lowering(half, "cpu"))
    for platform in ("cuda", "rocm"):  # the latter has a reason of its own for the reference
        mlir.register_lowering(p, lowering(half, platform), platform=platform)
    prim_requires_devices_during_lowering.add(p)  # partitioning and host callbacks ask for the devices
    return p


def lowering(half: Forward | Backward, platform: str) -> Callable:
    def compute(form: Form, implementation: str, *arrays):
        with no_mesh():
            why = problem(platform)
            if why is not None and implementation == "triton":
                raise unmet(form.name, why)
            if why is not None:
                return tuple(half.reference(arrays, form))
            check_sizes(form.name, arrays)
            return tuple(half.kernels(Run(target(), launch if platform == "cuda" else host_launch), arrays, form))

    def lower(*arrays, form: Form, implementation: str):
        local = partial(compute, form, implementation)
        if platform == "cuda" or partition_host:
            return partitioned(local, arrays, *half.roles(form))
        return local(*arrays)

    def rule(ctx, *values, **params):
        plain = [jax.core.ShapedArray(aval.shape, aval.dtype) for aval in ctx.avals_in]
        return mlir.lower_fun(lower, multiple_results=True)(ctx.replace(avals_in=plain), *values, **params)

    return rule


def check_sizes(name: str, arrays) -> None:
    """Whether kernels can be launched for arrays of these shapes: their grids are of a fixed size."""
    for x in arrays:
        if not all(isinstance(n, int) for n in x.shape):
            raise ValueError(
                f"{name}: an array has the symbolic shape ({', '.join(map(str, x.shape))}); expected numbers, as the grids that "
                "kernels are launched on are fixed. Export the function for each size, or pass "
                'implementation="reference", which leaves batch and lengths open.'
            )


class Forward(NamedTuple):
    """operands -> outs + extras."""

    op: Op
    gradients = False

    @property
    def name(self) -> str:
        return f"mmattn_{self.op.name}_fwd"

    def roles(self, form: Form) -> tuple[list[Role], list[Role]]:
        return [role(self.op, name) for name in owners(form.layout)], [BATCH] * (form.outs + form.extras)

    def avals(self, operands, form: Form):
        outs, extras = self.op.infer(unflatten(form.layout, operands), **dict(form.static))
        first = lead(operands, self.roles(form)[0])
        return [like(first, s) for s in (*outs, *extras)]

    def kernels(self, run: Run, operands, form: Form):
        outs, extras = self.op.forward(run, unflatten(form.layout, operands), **dict(form.static))
        return [*outs, *extras]

    def reference(self, operands, form: Form):
        _, extras = self.op.infer(unflatten(form.layout, operands), **dict(form.static))
        return [*formula(self.op, form.layout, form.static, operands), *(jnp.zeros(s.shape, s.dtype) for s in extras)]


class Backward(NamedTuple):
    """kept operands + outs, if the op keeps them, + extras + douts -> gradients of the `wanted` operands."""

    op: Op
    gradients = True

    @property
    def name(self) -> str:
        return f"mmattn_{self.op.name}_bwd"

    def roles(self, form: Form) -> tuple[list[Role], list[Role]]:
        names = owners(form.layout)
        others = form.outs * (1 + self.op.keeps_outs) + form.extras
        return [role(self.op, names[i]) for i in kept(self.op, form)] + [BATCH] * others, [
            role(self.op, names[i]) for i in wanted(self.op, form)
        ]

    def avals(self, arrays, form: Form):
        operands = dict(zip(kept(self.op, form), arrays, strict=False))
        return [like(operands[i], gradient_spec(operands[i], row(form, i))) for i in wanted(self.op, form)]

    def split(self, arrays, form: Form):
        """operands (None where they are not kept), outs, extras, douts."""
        rest = iter(arrays)
        take = lambda n: tuple(next(rest) for _ in range(n))
        operands = [next(rest) if name in self.op.keeps else None for name in owners(form.layout)]
        outs = take(form.outs) if self.op.keeps_outs else None
        return operands, outs, take(form.extras), take(form.outs)

    def kernels(self, run: Run, arrays, form: Form):
        operands, outs, extras, douts = self.split(arrays, form)
        grads = self.op.backward(run, unflatten(form.layout, operands), outs, extras, douts, **dict(form.static))
        flat = {}
        for name, at in form.layout:
            if name in grads:
                flat |= zip(at, grads[name], strict=True) if isinstance(at, tuple) else [(at, grads[name])]
        return [flat[i] for i in wanted(self.op, form)]

    def reference(self, arrays, form: Form):
        operands, _, _, douts = self.split(arrays, form)
        for i, name in enumerate(owners(form.layout)):
            if name in self.op.passes:  # it is added to an output, so no other gradient depends on its value
                operands[i] = jnp.zeros_like(douts[self.op.passes[name]])
        at = wanted(self.op, form)

        def outs(*arrays):
            given = dict(zip(at, arrays, strict=True))
            return formula(self.op, form.layout, form.static, [given.get(i, x) for i, x in enumerate(operands)])

        _, pullback = jax.vjp(outs, *(operands[i] for i in at))
        rows = [row(form, i) for i in at]
        return [g if r is None else g[:, r] for g, r in zip(pullback(douts), rows, strict=True)]


def role(op: Op, name: str) -> Role:
    return Role(op.shared[name], name in op.constant) if name in op.shared else BATCH


def kept(op: Op, form: Form) -> list[int]:
    """Positions of the operands that the backward reads."""
    return [i for i, name in enumerate(owners(form.layout)) if name in op.keeps]


def wanted(op: Op, form: Form) -> list[int]:
    """Positions of the operands whose gradients the backward computes."""
    return [i for i, name in enumerate(owners(form.layout)) if name not in op.passes and name not in op.constant]


def row(form: Form, i: int) -> int | None:
    """The row of the packed operand at position i that the call reads; its gradient is that row's."""
    return dict(form.static).get(f"{owners(form.layout)[i]}_row")


def linearize(op: Op, operands, tangents, *, form: Form, implementation: str):
    """JVP of the forward. Residuals carry a name, so that a remat policy can save them."""
    results = primitives(op)[0].bind(*operands, form=form, implementation=implementation)
    results = [checkpoint_name(x, checkpoint_name_of(op)) for x in results]
    outs, extras = results[: form.outs], results[form.outs :]
    nothing = [ad.Zero(jax.typeof(x).to_tangent_aval()) for x in results]
    names = owners(form.layout)
    at = tuple(i for i, tangent in enumerate(tangents) if type(tangent) is not ad.Zero)
    for i in at:
        if names[i] in op.constant:
            raise NotImplementedError(no_gradient(form.name, names[i], "wrap it in jax.lax.stop_gradient"))
    if not at:
        return results, nothing
    residuals = [*(operands[i] for i in kept(op, form)), *(outs if op.keeps_outs else ()), *extras]
    douts = linear.bind(
        *residuals,
        *(tangents[i] for i in at),
        op=op,
        form=form,
        implementation=implementation,
        at=at,
        avals=tuple(map(jax.typeof, outs)),
    )
    return results, [*douts, *nothing[form.outs :]]


linear = Primitive("mmattn_linear")
"""residuals + tangents of the operands `at` -> tangents of the outs. It is transposed, never computed."""
linear.multiple_results = True
linear.def_impl(lambda *_, form, **__: refuse(form))
linear.def_abstract_eval(lambda *_, avals, **__: list(avals))
mlir.register_lowering(linear, lambda *_, form, **__: refuse(form))
batching.primitive_batchers[linear] = lambda *_, form, **__: refuse(form)
ad.primitive_jvps[linear] = lambda *_, form, **__: refuse(form)


def refuse(form: Form):
    raise NotImplementedError(first_only(form.name))


def transpose(douts, *arrays, op: Op, form: Form, implementation: str, at: tuple[int, ...], avals):
    residuals = arrays[: len(arrays) - len(at)]
    douts = [ad.instantiate_zeros(d) for d in douts]
    names = owners(form.layout)
    grads = {i: douts[op.passes[name]] for i, name in enumerate(names) if name in op.passes}
    if not grads.keys() >= set(at):
        values = primitives(op)[1].bind(*align([*residuals, *douts]), form=form, implementation=implementation)
        grads |= zip(wanted(op, form), values, strict=True)
    return [None] * len(residuals) + [unpicked(grads[i], row(form, i), arrays[len(residuals) + k].aval) for k, i in enumerate(at)]


def unpicked(grad: jax.Array, row: int | None, aval) -> jax.Array:
    """The gradient of a packed (B, M, D) operand of which one row was read."""
    return grad if row is None else jnp.pad(grad[:, None], ((0, 0), (row, aval.shape[1] - row - 1), (0, 0)))


ad.primitive_transposes[linear] = transpose
