"""One small surface over torch and JAX: float64 NumPy arrays in, outputs and all gradients out as float64 NumPy arrays."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, lru_cache, partial
from types import SimpleNamespace
from typing import NamedTuple

import ml_dtypes
import numpy as np
from cases import Case

import mmattn
from mmattn.op import dtype_name


def gpu_present() -> bool:
    try:
        return ctypes.CDLL("libcuda.so.1").cuInit(0) == 0
    except OSError:
        return False


GPU = gpu_present()
recent = lru_cache(maxsize=8)  # the tests of a case follow one another, and large cases are large
EPS = dict(float64=2.0**-52, float32=2.0**-23, tf32=2.0**-10, float16=2.0**-10, bfloat16=2.0**-7)  # an ulp at 1
# Of a case in tf32 all arrays are float32, and dots round their operands.


def stored(name: str) -> str:
    """The dtype of a case's arrays."""
    return "float32" if name == "tf32" else name


def numpy_dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, stored(name)))


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """x as float64 that holds only values of dtype."""
    return x.astype(numpy_dtype(dtype)).astype(np.float64)


def is_leaf(x) -> bool:
    """Whether x is one operand of a case, and not a tuple of them."""
    return hasattr(x, "differentiable")


def walk(tree, name: str = ""):
    """(name, leaf) of a tree of dicts and tuples, None left out."""
    if isinstance(tree, dict):
        for key, x in tree.items():
            yield from walk(x, key)
    elif isinstance(tree, tuple | list) and not is_leaf(tree):
        for i, x in enumerate(tree):
            yield from walk(x, f"{name}[{i}]")
    elif tree is not None:
        yield name, tree


def fill(tree, arrays: dict, name: str = ""):
    """The tree with `leaf.view(arrays[name])` in place of each leaf."""
    if isinstance(tree, dict):
        return {key: fill(x, arrays, key) for key, x in tree.items()}
    if isinstance(tree, tuple) and not is_leaf(tree):
        return tuple(fill(x, arrays, f"{name}[{i}]") for i, x in enumerate(tree))
    return None if tree is None else tree.view(arrays[name])


class Result(NamedTuple):
    """Outputs ("out", "out[0]", ...) and gradients ("dx", "dqkv[1]", ...) by name, as float64, and each one's dtype."""

    values: dict[str, np.ndarray]
    dtypes: dict[str, str]


@recent
def operands(case: Case, dtype: str) -> dict[str, np.ndarray]:
    """The case's operands by name, as float64 with values that dtype can hold; constants as they are."""
    rng = case.rng()
    draw = lambda leaf: rounded(leaf.draw(rng), leaf.dtype or dtype) if leaf.differentiable else leaf.values
    return {name: draw(leaf) for name, leaf in walk(case.operands)}


@recent
def cotangents(case: Case, dtype: str) -> dict[str, np.ndarray]:
    """Random cotangents of every output; `.sum()` would give an unweighted LayerNorm a zero gradient."""
    rng = case.rng().spawn(1)[0]
    return {name: rounded(rng.standard_normal(out.shape), dtype) for name, out in exact_outputs(case, dtype).items()}


def formula(xp, case: Case, arrays: dict):
    """The op's reference over the namespace xp, in the structure that the public function returns."""
    call = getattr(mmattn, case.call)(**fill(case.operands, arrays), **case.static)
    return call.result(call.op.reference(xp, SimpleNamespace(**call.operands), **dict(call.static)))


@recent
def exact_outputs(case: Case, dtype: str) -> dict[str, np.ndarray]:
    with np.errstate(all="ignore"):
        return dict(walk(formula(np, case, operands(case, dtype)), "out"))


class Namespace:
    """An array namespace with some functions of its own."""

    def __init__(self, xp, **own):
        self.xp = xp
        vars(self).update(own)

    def __getattr__(self, name):
        return getattr(self.xp, name)


def transposed(equation: str) -> tuple[str, str]:
    """The einsums of an einsum's gradients: the first operand's of (g, b), the second's of (a, g)."""
    operands, out = equation.split("->")
    a, b = operands.split(",")
    return f"{out},{b}->{a}", f"{a},{out}->{b}"


class Torch:
    name = "torch"

    def __init__(self):
        import torch

        import mmattn_torch

        self.torch, self.ops, self.arrays = torch, mmattn_torch, mmattn_torch._arrays
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

    def compiled(self, function):
        """function, which no longer sees values."""
        return self.torch.compile(function, backend="eager", fullgraph=True)

    def wide_integers(self):
        """Where int64 stays int64."""
        return nullcontext()

    @contextmanager
    def products(self, precision: str):
        """float32 products in tf32, else IEEE."""
        before = self.torch.get_float32_matmul_precision()
        self.torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        try:
            yield
        finally:
            self.torch.set_float32_matmul_precision(before)

    def formula(self, case: Case, arrays: dict, douts: dict, dtypes: dict, dot: str) -> Result:
        return self.differentiate(lambda arrays: formula(self.rounding(dot), case, arrays), case, arrays, douts, dtypes)

    def rounding(self, name: str) -> Namespace:
        """torch, but dots take operands rounded to a dtype, in their gradients too, and P = exp(S) is rounded before its sum."""
        torch = self.torch

        def fit(x):
            if name == "tf32":
                return ((x.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
            return x.to(getattr(torch, name)).to(x.dtype)

        class Einsum(torch.autograd.Function):
            @staticmethod
            def forward(ctx, equation, a, b):
                ctx.equation = equation
                ctx.save_for_backward(fit(a), fit(b))
                return torch.einsum(equation, fit(a), fit(b))

            @staticmethod
            def backward(ctx, g):
                a, b = ctx.saved_tensors
                for_a, for_b = transposed(ctx.equation)
                return None, torch.einsum(for_a, fit(g), b), torch.einsum(for_b, a, fit(g))

        def exp(x):
            y = torch.exp(x)
            return y + (fit(y) - y).detach()

        return Namespace(self.arrays, einsum=Einsum.apply, exp=exp)


class Jax:
    name = "jax"

    def __init__(self):
        import jax

        import mmattn_jax

        self.jax, self.ops, self.arrays = jax, mmattn_jax, mmattn_jax._arrays

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
        widest = "float64" if "float64" in dtypes.values() else "float32"  # no 16-bit dtype holds all values of another
        results = outs_and_grads(arrays, {name: self.put(x, widest) for name, x in douts.items()})
        return Result({name: self.get(x) for name, x in results.items()}, {name: dtype_name(x) for name, x in results.items()})

    def compiled(self, function):
        return self.jax.jit(function)

    def wide_integers(self):
        return self.jax.enable_x64(True)

    def products(self, precision: str):
        return self.jax.default_matmul_precision("tensorfloat32" if precision == "tf32" else None)

    def formula(self, case: Case, arrays: dict, douts: dict, dtypes: dict, dot: str) -> Result:
        with self.jax.enable_x64(True), self.jax.default_matmul_precision("highest"):
            xp = self.rounding(dot)
            return self.differentiate(lambda arrays: formula(xp, case, arrays), case, arrays, douts, dtypes)

    def rounding(self, name: str) -> Namespace:
        """jax.numpy with the same roundings as torch's."""
        jax, jnp, kind = self.jax, self.jax.numpy, ml_dtypes.finfo(numpy_dtype(name))
        bits = 10 if name == "tf32" else kind.nmant
        fit = lambda x: jax.lax.reduce_precision(x, kind.nexp, bits)  # XLA may drop a cast and its inverse

        @partial(jax.custom_vjp, nondiff_argnums=(0,))
        def einsum(equation, a, b):
            return jnp.einsum(equation, fit(a), fit(b))

        def backward(equation, kept, g):
            a, b = kept
            for_a, for_b = transposed(equation)
            return jnp.einsum(for_a, fit(g), b), jnp.einsum(for_b, a, fit(g))

        def exp(x):
            y = jnp.exp(x)
            return y + jax.lax.stop_gradient(fit(y) - y)

        einsum.defvjp(lambda equation, a, b: (einsum(equation, a, b), (fit(a), fit(b))), backward)
        return Namespace(self.arrays, einsum=einsum, exp=exp)


FRAMEWORKS = dict(torch=Torch, jax=Jax)
INSTALLED = [name for name in FRAMEWORKS if importlib.util.find_spec(name)]


@cache
def framework_of(name: str):
    return FRAMEWORKS[name]()


def call(framework, case: Case, dtype: str, implementation: str = "triton", times: int = 1) -> Result:
    """The public function and its gradients in dtype; `times`: on a batch that repeats the case's so often."""
    function = getattr(framework.ops, case.call)
    dtypes = {name: leaf.dtype or stored(dtype) for name, leaf in walk(case.operands)}
    run = lambda arrays: function(**fill(case.operands, arrays), **case.static, implementation=implementation)
    arrays, douts = operands(case, dtype), cotangents(case, dtype)
    if times > 1:
        repeat = lambda x: np.concatenate([x] * times)
        shared = shared_names(case)
        arrays = {name: x if name in shared else repeat(x) for name, x in arrays.items()}
        douts = {name: repeat(x) for name, x in douts.items()}
    with framework.products(dtype):
        return framework.differentiate(run, case, arrays, douts, dtypes)


def shared_names(case: Case) -> set[str]:
    """The operands that all samples share, by name."""
    arrays = operands(case, "float32")
    core = getattr(mmattn, case.call)(**fill(case.operands, arrays), **case.static)
    shared = {id(x) for name, x in walk({name: x for name, x in core.operands.items() if name in core.op.shared})}
    return {name for name, x in arrays.items() if id(x) in shared}


@recent
def formula_in(case: Case, dtype: str, precision: str, rounded_dots: bool = False) -> Result:
    """The formula and its gradients in float64 or float32, at the operands and cotangents that dtype holds."""
    dtypes = {name: precision if leaf.differentiable else leaf.dtype for name, leaf in walk(case.operands)}
    dot = dtype if rounded_dots else precision
    return framework_of(INSTALLED[0]).formula(case, operands(case, dtype), cotangents(case, dtype), dtypes, dot)


def promised_dtypes(case: Case, dtype: str) -> dict[str, str]:
    """Of results what the op's infer says, of gradients what their operands have."""
    dtypes = {name: leaf.dtype or stored(dtype) for name, leaf in walk(case.operands)}
    arrays = {name: np.broadcast_to(np.empty((), numpy_dtype(dtypes[name])), leaf.shape) for name, leaf in walk(case.operands)}
    call = getattr(mmattn, case.call)(**fill(case.operands, arrays), **case.static)
    outs, _ = call.op.infer(SimpleNamespace(**call.operands), **dict(call.static))
    grads = {f"d{name}": dtypes[name] for name, leaf in walk(case.operands) if leaf.differentiable}
    return dict(walk(call.result(tuple(out.dtype for out in outs)), "out")) | grads


def distance(x: np.ndarray, exact: np.ndarray, norm) -> float:
    """Relative distance where exact is finite; elsewhere the two must be equal."""
    finite = np.isfinite(exact)
    if not np.array_equal(x[~finite], exact[~finite]):
        return np.inf
    size = norm(exact[finite])
    error = norm(x[finite] - exact[finite])
    return error / size if size else np.inf if error else 0.0


def sums_rounded(case: Case) -> bool:
    """Whether the kernel sums the rounded P of unshifted rows (see mmattn/attention/forward.py)."""
    _, first = next(iter(walk(case.operands)))
    return first.shape[-1] <= 32 and "attn_mask" not in case.operands


NORMS = dict(l2=lambda x: np.linalg.norm(x.ravel()), max=lambda x: np.abs(x).max(initial=0.0))
ROUNDS_WITHIN = ("gated_residual_norm_adaln",)  # the norm is that of the rounded sum
SOFTMAX = ("joint_attention", "qk_norm_rope_attention")
DOTS = (*SOFTMAX, "relu_linear_attention")  # which have a precision in float32


class Judged(NamedTuple):
    """How far one output or gradient is from float64, and how far it may be."""

    name: str
    norm: str
    error: float
    budget: float


def judge(case: Case, dtype: str, result: Result) -> Iterator[Judged]:
    """At most twice as far from float64 as the float32 formula rounded once, plus half an ulp.

    Softmax attention's formula takes dots of rounded operands, and P is rounded, as for tensor cores; in tf32 every formula
    takes such dots. In softmax attention the largest error of outputs and token gradients is looked at too, relative to the
    largest value. The gains' gradients are the norm's, a few dozen sums over all tokens, and are judged as the norm's own are.
    Where the op rounds what it goes on with, no result is finer than dtype, whatever dtype it has.

    A log-sum-exp of rounded P may be off by half an ulp of it, and is where one key outweighs the others: the formula, which
    shifts a row so that its largest P is 1, rounds that one by nothing.
    """
    shared = {f"d{name}" for name in shared_names(case)}
    exact, plain = formula_in(case, dtype, "float64"), formula_in(case, dtype, "float32", dtype == "tf32" or case.call in SOFTMAX)
    assert result.values.keys() == exact.values.keys()
    assert result.dtypes == promised_dtypes(case, dtype)
    for name, x in result.values.items():
        assert x.shape == exact.values[name].shape, name
        kind = result.dtypes[name]
        if case.call in ROUNDS_WITHIN:
            kind = max(kind, dtype, key=EPS.get)
        for norm_name in ("l2", "max") if case.call in SOFTMAX and name not in shared else ("l2",):
            norm = NORMS[norm_name]
            error = distance(x, exact.values[name], norm)
            budget = 2 * distance(rounded(plain.values[name], kind), exact.values[name], norm) + EPS[kind] / 2
            if case.static.get("return_lse") and name.startswith("out[1]") and norm_name == "max" and sums_rounded(case):
                largest = norm(exact.values[name][np.isfinite(exact.values[name])])
                budget = max(budget, EPS[dtype] / 2 / largest if largest else 0.0)
            yield Judged(name, norm_name, error, budget)


def check(case: Case, dtype: str, result: Result) -> None:
    for name, norm, error, budget in judge(case, dtype, result):
        assert error <= budget < 1, f"{case} {dtype} {name}: {norm} error {error:.3g}, budget {budget:.3g}"
