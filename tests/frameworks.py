"""One small surface over torch and JAX: float64 NumPy arrays in, outputs and all gradients out as float64 NumPy arrays."""

from __future__ import annotations

import importlib.util
from functools import cache, partial
from types import SimpleNamespace
from typing import NamedTuple

import ml_dtypes
import numpy as np
from cases import LEAVES, Case

import mmattn
from mmattn.op import dtype_name

EPS = dict(float64=2.0**-52, float32=2.0**-23, float16=2.0**-10, bfloat16=2.0**-7)  # an ulp at 1


def numpy_dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """x as float64 that holds only values of dtype."""
    return x.astype(numpy_dtype(dtype)).astype(np.float64)


def walk(tree, name: str = ""):
    """(name, leaf) of a tree of dicts and tuples, None left out."""
    if isinstance(tree, dict):
        for key, x in tree.items():
            yield from walk(x, key)
    elif isinstance(tree, tuple | list) and not isinstance(tree, LEAVES):
        for i, x in enumerate(tree):
            yield from walk(x, f"{name}[{i}]")
    elif tree is not None:
        yield name, tree


def fill(tree, arrays: dict, name: str = ""):
    """The tree with `leaf.view(arrays[name])` in place of each leaf."""
    if isinstance(tree, dict):
        return {key: fill(x, arrays, key) for key, x in tree.items()}
    if isinstance(tree, tuple) and not isinstance(tree, LEAVES):
        return tuple(fill(x, arrays, f"{name}[{i}]") for i, x in enumerate(tree))
    return None if tree is None else tree.view(arrays[name])


class Result(NamedTuple):
    """Outputs ("out", "out[0]", ...) and gradients ("dx", "dqkv[1]", ...) by name, as float64, and each one's dtype."""

    values: dict[str, np.ndarray]
    dtypes: dict[str, str]


@cache
def operands(case: Case, dtype: str) -> dict[str, np.ndarray]:
    """The case's operands by name, as float64 with values that dtype can hold; constants as they are."""
    rng = case.rng()
    draw = lambda leaf: rounded(leaf.draw(rng), leaf.dtype or dtype) if leaf.differentiable else leaf.values
    return {name: draw(leaf) for name, leaf in walk(case.operands)}


@cache
def cotangents(case: Case, dtype: str) -> dict[str, np.ndarray]:
    """Random cotangents of every output; `.sum()` would give an unweighted LayerNorm a zero gradient."""
    rng = case.rng().spawn(1)[0]
    return {name: rounded(rng.standard_normal(out.shape), dtype) for name, out in exact_outputs(case, dtype).items()}


def formula(xp, case: Case, arrays: dict):
    """The op's reference over the namespace xp, in the structure that the public function returns."""
    call = getattr(mmattn, case.call)(**fill(case.operands, arrays), **case.static)
    return call.result(call.op.reference(xp, SimpleNamespace(**call.operands), **dict(call.static)))


@cache
def exact_outputs(case: Case, dtype: str) -> dict[str, np.ndarray]:
    with np.errstate(all="ignore"):
        return dict(walk(formula(np, case, operands(case, dtype)), "out"))


class Namespace:
    """An array namespace with an einsum of its own."""

    def __init__(self, xp, einsum):
        self.xp, self.einsum = xp, einsum

    def __getattr__(self, name):
        return getattr(self.xp, name)


class Torch:
    name = "torch"

    def __init__(self):
        import torch

        import mmattn_torch

        self.torch, self.ops = torch, mmattn_torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    def put(self, x: np.ndarray, dtype: str):
        return self.torch.tensor(x, dtype=getattr(self.torch, dtype), device=self.device)

    def get(self, x) -> np.ndarray:
        return x.detach().double().cpu().numpy()

    def differentiate(self, function, case: Case, arrays: dict, douts: dict, dtypes: dict) -> Result:
        arrays = {name: self.put(x, dtypes[name]) for name, x in arrays.items()}
        wanted = {name: arrays[name].requires_grad_() for name, leaf in walk(case.operands) if leaf.differentiable}
        outs = dict(walk(function(arrays), "out"))
        cotangents = [self.put(douts[name], dtype_name(out)) for name, out in outs.items()]
        grads = self.torch.autograd.grad(list(outs.values()), list(wanted.values()), cotangents)
        results = outs | {f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)}
        return Result({name: self.get(x) for name, x in results.items()}, {name: dtype_name(x) for name, x in results.items()})

    def formula(self, case: Case, arrays: dict, douts: dict, dtypes: dict, dot: str) -> Result:
        xp = Namespace(self.torch, partial(self.einsum, getattr(self.torch, dot)))
        return self.differentiate(lambda arrays: formula(xp, case, arrays), case, arrays, douts, dtypes)

    def einsum(self, dtype, equation: str, a, b):
        """torch.einsum of operands rounded to dtype, and so are those of its gradient."""
        torch = self.torch
        fit = lambda x: x.to(dtype).to(x.dtype)
        ab, out = equation.split("->")
        one, other = ab.split(",")

        class Einsum(torch.autograd.Function):
            @staticmethod
            def forward(ctx, a, b):
                ctx.save_for_backward(fit(a), fit(b))
                return torch.einsum(equation, *ctx.to_save)

            @staticmethod
            def backward(ctx, g):
                a, b = ctx.saved_tensors
                return torch.einsum(f"{out},{other}->{one}", fit(g), b), torch.einsum(f"{one},{out}->{other}", a, fit(g))

        return Einsum.apply(a, b)


class Jax:
    name = "jax"

    def __init__(self):
        import jax

        import mmattn_jax

        self.jax, self.ops = jax, mmattn_jax

    def put(self, x: np.ndarray, dtype: str):
        return self.jax.numpy.asarray(x.astype(numpy_dtype(dtype)))

    def get(self, x) -> np.ndarray:
        return np.asarray(x).astype(np.float64)

    def differentiate(self, function, case: Case, arrays: dict, douts: dict, dtypes: dict) -> Result:
        wanted = [name for name, leaf in walk(case.operands) if leaf.differentiable]

        @self.jax.jit
        def outs_and_grads(arrays, douts):
            outs, vjp = self.jax.vjp(
                lambda some: dict(walk(function(arrays | some), "out")), {name: arrays[name] for name in wanted}
            )
            (grads,) = vjp({name: douts[name].astype(out.dtype) for name, out in outs.items()})
            return outs | {f"d{name}": grad for name, grad in grads.items()}

        arrays = {name: self.put(x, dtypes[name]) for name, x in arrays.items()}
        widest = max(dtypes.values(), key=lambda name: np.dtype(numpy_dtype(name)).itemsize)
        results = outs_and_grads(arrays, {name: self.put(x, widest) for name, x in douts.items()})
        return Result({name: self.get(x) for name, x in results.items()}, {name: dtype_name(x) for name, x in results.items()})

    def formula(self, case: Case, arrays: dict, douts: dict, dtypes: dict, dot: str) -> Result:
        with self.jax.enable_x64(True), self.jax.default_matmul_precision("highest"):
            xp = Namespace(self.jax.numpy, partial(self.einsum, dot))
            return self.differentiate(lambda arrays: formula(xp, case, arrays), case, arrays, douts, dtypes)

    def einsum(self, dtype: str, equation: str, a, b):
        """jnp.einsum of operands rounded to dtype, and so are those of its gradient."""
        jax, kind = self.jax, ml_dtypes.finfo(numpy_dtype(dtype))
        fit = lambda x: jax.lax.reduce_precision(x, kind.nexp, kind.nmant)  # XLA may drop a cast and its inverse
        ab, out = equation.split("->")
        one, other = ab.split(",")

        @jax.custom_vjp
        def einsum(a, b):
            return jax.numpy.einsum(equation, fit(a), fit(b))

        def backward(kept, g):
            a, b = kept
            grads = jax.numpy.einsum(f"{out},{other}->{one}", fit(g), b), jax.numpy.einsum(f"{one},{out}->{other}", a, fit(g))
            return tuple(grads)

        einsum.defvjp(lambda a, b: (einsum(a, b), (fit(a), fit(b))), backward)
        return einsum(a, b)


FRAMEWORKS = dict(torch=Torch, jax=Jax)
INSTALLED = [name for name in FRAMEWORKS if importlib.util.find_spec(name)]


@cache
def framework(name: str):
    return FRAMEWORKS[name]()


def call(framework, case: Case, dtype: str, implementation: str = "triton") -> Result:
    """The public function and its gradients in dtype."""
    function = getattr(framework.ops, case.call)
    dtypes = {name: leaf.dtype or dtype for name, leaf in walk(case.operands)}
    run = lambda arrays: function(**fill(case.operands, arrays), **case.static, implementation=implementation)
    return framework.differentiate(run, case, operands(case, dtype), cotangents(case, dtype), dtypes)


@cache
def formula_in(case: Case, dtype: str, precision: str, rounded_dots: bool = False) -> Result:
    """The formula and its gradients in float64 or float32, at the operands and cotangents that dtype holds."""
    dtypes = {name: precision if leaf.differentiable else leaf.dtype for name, leaf in walk(case.operands)}
    dot = dtype if rounded_dots else precision
    return framework(INSTALLED[0]).formula(case, operands(case, dtype), cotangents(case, dtype), dtypes, dot)


def distance(x: np.ndarray, exact: np.ndarray, norm) -> float:
    """Relative distance where exact is finite; elsewhere the two must be equal."""
    finite = np.isfinite(exact)
    if not np.array_equal(x[~finite], exact[~finite]):
        return np.inf
    size = norm(exact[finite])
    error = norm(x[finite] - exact[finite])
    return error / size if size else np.inf if error else 0.0


NORMS = dict(l2=lambda x: np.linalg.norm(x.ravel()), max=lambda x: np.abs(x).max(initial=0.0))
SOFTMAX = ("joint_attention", "qk_norm_rope_attention")


def check(case: Case, dtype: str, result: Result) -> None:
    """At most twice as far from float64 as the float32 formula rounded once, plus half an ulp.

    Softmax attention's formula takes dots of rounded operands, P among them, as tensor cores do. There the largest error is
    looked at too, at most three times as far, since one value is a noisier measure than all.
    """
    exact, plain = formula_in(case, dtype, "float64"), formula_in(case, dtype, "float32", case.call in SOFTMAX)
    assert result.values.keys() == exact.values.keys()
    for name, x in result.values.items():
        assert x.shape == exact.values[name].shape, name
        kind = result.dtypes[name]
        for norm_name, times in dict(l2=2, max=3).items() if case.call in SOFTMAX else [("l2", 2)]:
            norm = NORMS[norm_name]
            error = distance(x, exact.values[name], norm)
            budget = times * distance(rounded(plain.values[name], kind), exact.values[name], norm) + EPS[kind] / 2
            assert error <= budget, f"{case} {dtype} {name}: {norm_name} error {error:.3g}, budget {budget:.3g}"
