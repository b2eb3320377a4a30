"""Any Op as PyTorch dispatcher operators, and the choice between its kernels and plain torch code.

An op gets two operators, the stable face for torch.compile, export and dispatch modes; both always launch kernels:
    mmattn::<op>_fwd(Tensor[] arrays, str call) -> Tensor[]                  outs, then residuals
    mmattn::<op>_bwd(Tensor[] kept, Tensor[] douts, str call) -> Tensor[]    gradients of what is neither constant nor passed
`call` is the text of (layout, static): where the arrays belong, and the static arguments. No size of an array is in it, so
that a dynamic length does not change it.

Autograd is a Function in the operators' Autograd kernels. Plain eager calls apply it directly, which saves a dispatch; any
other call (compiling, torch.func, tensor subclasses) goes through the operator, so one code path serves every transform.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction

import mmattn
from mmattn.choice import Explanation, decide
from mmattn.op import DTYPE_NAMES, Call, Layout, Op, Operands, Plan, Spec, Target, flatten, owners, row_stride, unflatten

from ._choice import current
from ._fold import fold, fold_operand, lead, unfold
from ._fused import FUSED

DTYPE_NAMES.update({x: str(x).removeprefix("torch.") for x in vars(torch).values() if isinstance(x, torch.dtype)})


def empty(spec: Spec, device: torch.device) -> Tensor:
    """An output, not yet written."""
    return torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=device)


def launch(plan: Plan, arrays: Sequence[Tensor], outs: Sequence[Tensor]) -> Callable[..., None]:
    """One launch on the current GPU. Returns what launches the plan again, on pointers of the same dtypes and alignment.

    Triton looks a kernel up by the type and alignment of every argument, which takes it longer than small kernels run.
    """
    options = dict(num_warps=plan.warps, num_stages=plan.stages, enable_fp_fusion=False)
    compiled = plan.kernel[plan.grid](*arrays, *outs, *plan.ints.values(), **plan.meta, **options)
    launcher = compiled[(*plan.grid, 1, 1)[:3]]
    constants = (*plan.ints.values(), *(plan.meta[name] for name in plan.kernel.arg_names if name in plan.meta))
    return lambda *pointers: launcher(*pointers, *constants)


def constant_under_compile(function: Callable) -> Callable:
    """torch.compile calls the function once and keeps the result. (torch.compiler.assume_constant_result, which sets the same
    mark, imports torch._dynamo: two seconds that an eager user need not wait.)"""
    function._dynamo_marked_constant = True
    return function


def constant(x):
    """A number that is compiled in; torch.compile(dynamic=True) keeps a float symbolic until it is asked not to."""
    if torch.compiler.is_compiling() and isinstance(x, float):
        from torch.fx.experimental.symbolic_shapes import guard_scalar  # imports sympy

        return guard_scalar(x)
    return x


@constant_under_compile
def problem(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device, None if they can."""
    if device.type != "cuda":
        return f"the kernels run on CUDA GPUs, the tensors are on {device.type}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    arch = target(device).arch
    return None if arch >= 80 else f"the kernels need compute capability 8.0, the GPU has {arch / 10}"


@cache
def target(device: torch.device) -> Target:
    if device.type != "cuda":
        return Target()
    gpu = torch.cuda.get_device_properties(device)
    return Target(10 * gpu.major + gpu.minor, gpu.multi_processor_count, gpu.shared_memory_per_block_optin)


class Step:
    """One launch of a program: where its inputs lie among the arrays so far, and what launches it again."""

    def __init__(self, plan: Plan, inputs: tuple[int, ...]):
        self.plan, self.inputs, self.again = plan, inputs, None

    def __call__(self, arrays: list[Tensor], device: torch.device) -> tuple[Tensor, ...]:
        outs = tuple(empty(out, device) for out in self.plan.outs)
        inputs = [arrays[i] for i in self.inputs]
        if 0 in self.plan.grid:
            return tuple(out.zero_() for out in outs)
        if self.again is None:
            self.again = launch(self.plan, inputs, outs)
        else:
            self.again(*inputs, *outs)
        return outs


class Run:
    """What an op asks of a framework: launch a plan on newly allocated outputs. It keeps a record of what it did."""

    def __init__(self, device: torch.device, arrays: Sequence[Tensor]):
        self.device, self.target = device, target(device)
        self.arrays, self.steps = list(arrays), []

    def __call__(self, plan: Plan, *arrays: Tensor) -> tuple[Tensor, ...]:
        self.steps.append(Step(plan, tuple(map(self.position, arrays))))
        outs = self.steps[-1](self.arrays, self.device)
        self.arrays += outs
        return outs

    def position(self, array: Tensor) -> int:
        return next(i for i, x in enumerate(self.arrays) if x is array)


class Program(NamedTuple):
    """The launches of an operator on arrays of given shapes, strides and dtypes. They are all that it does, so they can be
    repeated on other such arrays without asking the op again."""

    copied: list[bool]  # which arrays the kernels cannot read in place
    steps: list[Step]
    results: list[int]


_programs: dict[tuple, Program] = {}


def replayed(name: tuple, owners: Sequence, op: Op, arrays: Sequence[Tensor], compute: Callable) -> list[Tensor]:
    """compute(run, arrays), a list of tensors, which only launches plans; recorded once for arrays that look like these."""
    device, first = arrays[0].device, {}  # a tensor that comes twice must come twice again
    looks = [(x.shape, x.stride(), x.dtype, x.data_ptr() % 16 == 0, first.setdefault(id(x), i)) for i, x in enumerate(arrays)]
    key = (name, device, *looks)
    with torch.cuda.device(device) if device.type == "cuda" and device.index != torch.cuda.current_device() else nullcontext():
        program = _programs.get(key)
        if program is None:
            inputs = [readable(op, owner, x) for owner, x in zip(owners, arrays, strict=True)]
            run = Run(device, inputs)
            results = compute(run, inputs)
            if len(_programs) >= 4096:  # lengths that change for ever
                _programs.clear()
            copied = [x is not y for x, y in zip(inputs, arrays, strict=True)]
            _programs[key] = Program(copied, run.steps, [run.position(x) for x in results])
            return results
        slots = [x.contiguous() if copy else x for x, copy in zip(arrays, program.copied, strict=True)]
        for step in program.steps:
            slots += step(slots, device)
        return [slots[i] for i in program.results]


class Meaning:
    """What an operator's `call` says: positions count an op's arrays in the order of `flatten`."""

    def __init__(self, op: Op, text: str):
        self.op = op
        self.layout, static = ast.literal_eval(text)
        self.static = dict(static)
        self.owners = owners(self.layout)
        self.kept = [i for i, name in enumerate(self.owners) if name in op.keeps]
        self.wanted = [i for i, name in enumerate(self.owners) if name not in op.constant and name not in op.passes]
        self.outs = None

    def operands(self, arrays: Sequence) -> Operands:
        return unflatten(self.layout, arrays)

    def number_of_outs(self, arrays: Sequence) -> int:
        if self.outs is None:  # it follows from the text alone, but infer wants shapes
            self.outs = len(self.op.infer(self.operands(arrays), **self.static)[0])
        return self.outs

    def residuals(self, arrays: Sequence[Tensor], results: Sequence[Tensor]) -> list[Tensor]:
        """What the backward operator gets as `kept`."""
        saved = results if self.op.keeps_outs else results[self.number_of_outs(arrays) :]
        return [arrays[i] for i in self.kept] + list(saved)

    def kept_operands(self, kept: Sequence[Tensor]) -> list[Tensor | None]:
        arrays = [None] * len(self.owners)
        for i, x in zip(self.kept, kept, strict=False):
            arrays[i] = x
        return arrays

    def gradients(self, grads: dict[str, Any]) -> list[Tensor]:
        """The wanted gradients out of what an op's backward returns."""
        flat = {}
        for name, at in self.layout:
            if name in grads and at is not None:
                flat |= dict(zip(at, grads[name], strict=True) if isinstance(at, tuple) else [(at, grads[name])])
        return [flat[i] for i in self.wanted]


meaning = cache(Meaning)


@cache
def call_text(layout: Layout, static: tuple) -> str:
    return repr((layout, static))


class Operators(NamedTuple):
    op: Op
    forward: torch._ops.OpOverload
    backward: torch._ops.OpOverload


def readable(op: Op, owner: str | None, x: Tensor) -> Tensor:
    """x as the kernels read it: contiguous, or through a row stride where they can."""
    if x.is_contiguous():
        return x
    dense = op.dense.get(owner)
    return x.contiguous() if dense is None or row_stride(x, dense) is None else x


def run_forward(op: Op, arrays: list[Tensor], call: str) -> list[Tensor]:
    m = meaning(op, call)

    def compute(run: Run, arrays: list[Tensor]) -> list[Tensor]:
        outs, extras = op.forward(run, m.operands(arrays), **m.static)
        return [*outs, *extras]

    return replayed((op.name, "fwd", call), m.owners, op, arrays, compute)


def run_backward(op: Op, kept: list[Tensor], douts: list[Tensor], call: str) -> list[Tensor]:
    m = meaning(op, call)
    owners = [m.owners[i] for i in m.kept]
    owners += [None] * (len(kept) - len(owners) + len(douts))

    def compute(run: Run, arrays: list[Tensor]) -> list[Tensor]:
        kept_arrays, douts_arrays = arrays[: len(kept)], arrays[len(kept) :]
        results = tuple(kept_arrays[len(m.kept) :])
        n = len(douts) if op.keeps_outs else 0
        a = m.operands(m.kept_operands(kept_arrays))
        return m.gradients(op.backward(run, a, results[:n], results[n:], tuple(douts_arrays), **m.static))

    return replayed((op.name, "bwd", call), owners, op, [*kept, *douts], compute)


def fake_forward(op: Op, arrays: list[Tensor], call: str) -> list[Tensor]:
    m = meaning(op, call)
    outs, extras = op.infer(m.operands(arrays), **m.static)
    return [torch.empty(x.shape, dtype=getattr(torch, x.dtype), device=arrays[0].device) for x in (*outs, *extras)]


def fake_backward(op: Op, kept: list[Tensor], douts: list[Tensor], call: str) -> list[Tensor]:
    m = meaning(op, call)
    arrays = m.kept_operands(kept)
    return [arrays[i].new_empty(arrays[i].shape) for i in m.wanted]


@contextmanager
def below_autograd():
    """Call an operator from its own Autograd kernel. An outer level of torch.func still has to see the call, but a Function's
    forward runs with gradients switched off."""
    with torch._C._AutoDispatchBelowAutograd():
        if _functorch.peek_interpreter_stack() is None:
            yield
        else:
            with torch.enable_grad(), _set_fwd_grad_enabled(True):
                yield


def refuse(op: Op, what: str):
    raise RuntimeError(
        f'{op.name}: the Triton kernels have no {what}; call it with implementation="reference", or under '
        f'mmattn_torch.implementation("reference"), where {what} goes through plain torch code.'
    )


class Forward(_SingleLevelFunction):
    @staticmethod
    def forward(ctx, operators: Operators, call: str, *arrays: Tensor):
        with below_autograd():
            results = operators.forward(list(arrays), call)
        m = meaning(operators.op, call)
        n = m.number_of_outs(arrays)
        ctx.operators, ctx.call, ctx.device = operators, call, arrays[0].device
        ctx.outs = [(x.shape, x.dtype) for x in results[:n]]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*results[n:])
        ctx.save_for_backward(*m.residuals(arrays, results))
        return tuple(results)

    @staticmethod
    def backward(ctx, *douts: Tensor | None):
        op, m = ctx.operators.op, meaning(ctx.operators.op, ctx.call)
        douts = [
            torch.zeros(shape, dtype=dtype, device=ctx.device) if d is None else d
            for d, (shape, dtype) in zip(douts, ctx.outs, strict=False)
        ]
        grads = iter(ctx.operators.backward(list(ctx.saved_tensors), douts, ctx.call))
        wanted = set(m.wanted)
        passed = [douts[op.passes[owner]] if owner in op.passes else None for owner in m.owners]
        return None, None, *(next(grads) if i in wanted else d for i, d in enumerate(passed))

    @staticmethod
    def jvp(ctx, *tangents):
        refuse(ctx.operators.op, "forward-mode derivative")


class Backward(_SingleLevelFunction):
    @staticmethod
    def forward(ctx, operators: Operators, call: str, kept: int, *arrays: Tensor):
        ctx.op = operators.op
        with below_autograd():
            return tuple(operators.backward(list(arrays[:kept]), list(arrays[kept:]), call))

    @staticmethod
    def backward(ctx, *_):
        refuse(ctx.op, "second derivative")

    @staticmethod
    def jvp(ctx, *_):
        refuse(ctx.op, "second derivative")


def autograd_forward(operators: Operators, arrays: list[Tensor], call: str) -> list[Tensor]:
    with enable_single_level_autograd_function():
        return list(Forward.apply(operators, call, *arrays))


def autograd_backward(operators: Operators, kept: list[Tensor], douts: list[Tensor], call: str) -> list[Tensor]:
    with enable_single_level_autograd_function():
        return list(Backward.apply(operators, call, len(kept), *kept, *douts))


def vmap_forward(operators: Operators, info, dims, arrays: list[Tensor], call: str):
    op, n = operators.op, info.batch_size
    m = meaning(op, call)
    folded = [fold_operand(op, owner, x, dim, n) for owner, x, dim in zip(m.owners, arrays, dims[0], strict=True)]
    results = [unfold(x, n) for x in operators.forward(folded, call)]
    return results, [0] * len(results)


def vmap_backward(operators: Operators, info, dims, kept: list[Tensor], douts: list[Tensor], call: str):
    op, n = operators.op, info.batch_size
    m = meaning(op, call)
    kept_owners = [m.owners[i] for i in m.kept]
    folded = [fold_operand(op, owner, x, dim, n) for owner, x, dim in zip(kept_owners, kept, dims[0], strict=False)]
    folded += [fold(x, dim, n) for x, dim in list(zip(kept, dims[0], strict=True))[len(folded) :]]
    grads = operators.backward(folded, [fold(d, dim, n) for d, dim in zip(douts, dims[1], strict=True)], call)
    shapes = m.kept_operands([lead(x, dim, n).shape for x, dim in zip(kept, dims[0], strict=True)])
    return [g.reshape(shapes[i]) for g, i in zip(grads, m.wanted, strict=True)], [0] * len(grads)


LIBRARY = torch.library.Library("mmattn", "DEF")


def register(op: Op) -> Operators:
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
    LIBRARY.define(f"{op.name}_fwd(Tensor[] arrays, str call) -> Tensor[]", tags=tags)
    LIBRARY.define(f"{op.name}_bwd(Tensor[] kept, Tensor[] douts, str call) -> Tensor[]", tags=tags)
    operators = Operators(op, *(getattr(torch.ops.mmattn, f"{op.name}_{half}").default for half in ("fwd", "bwd")))
    halves = (
        (operators.forward, run_forward, fake_forward, autograd_forward, vmap_forward),
        (operators.backward, run_backward, fake_backward, autograd_backward, vmap_backward),
    )
    for operator, kernel, fake, autograd, vmap in halves:
        name = operator.name()
        for key in ("CUDA", "CPU"):  # on the CPU tests put an interpreter in place of `launch`
            LIBRARY.impl(name, partial(kernel, op), key)
        LIBRARY.impl(name, partial(autograd, operators), "Autograd")
        torch.library.register_fake(name, partial(fake, op), lib=LIBRARY)
        torch.library.register_vmap(name, partial(vmap, operators), lib=LIBRARY)
    return operators


OPERATORS = {op.name: register(op) for op in mmattn.OPS}


def common_device(op: Op, arrays: Sequence, layout: Layout) -> torch.device:
    """The device of all arrays, which must be tensors."""
    for i, x in enumerate(arrays):
        if not isinstance(x, Tensor):
            owner = owners(layout)[i]
            raise TypeError(
                f"{op.name}: {owner} is a {type(x).__name__}; expected a torch.Tensor. Convert it with torch.as_tensor."
            )
        if x.device != arrays[0].device:
            first, owner = owners(layout)[0], owners(layout)[i]
            raise ValueError(
                f"{op.name}: {owner} is on {x.device}; expected {arrays[0].device}, where {first} is. "
                f"Move it with {owner}.to({first}.device)."
            )
    return arrays[0].device


def explain(call: Call, requested: str | None, device: torch.device | None) -> Explanation:
    """The path that a call would take on a device, the tensors' own unless given; for meta tensors a GPU if there is one."""
    arrays, layout = flatten(call.op, call.operands)
    device = device or common_device(call.op, arrays, layout)
    if device.type == "meta":
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return decide(call, requested, current(), problem(device))


class Prepared(NamedTuple):
    """A call that takes the kernels, as far as shapes and dtypes of its tensors determine it."""

    operators: Operators
    text: str
    order: list[int]  # of the op's arrays among the call's tensors
    result: Callable
    outs: int


_prepared: dict[tuple, Prepared | None] = {}


def perform(core: Callable[..., Call], requested: str | None, *args, **kwargs) -> Any:
    """The public result of core(*args, **kwargs).

    Checking arguments takes longer than small kernels run, so eager calls remember what was found for arguments of these
    shapes, dtypes and values.
    """
    if torch.compiler.is_compiling() or _functorch.peek_interpreter_stack() is not None:
        return execute(core(*args, **kwargs), requested)
    tensors, first = [], {}
    key = (core, requested, current(), describe(args, tensors, first), describe(tuple(kwargs.items()), tensors, first))
    if not all(type(x) in (Tensor, torch.nn.Parameter) for x in tensors):
        return execute(core(*args, **kwargs), requested)
    try:
        prepared = _prepared.get(key)
    except TypeError:  # an argument that cannot be hashed, which core will refuse
        return execute(core(*args, **kwargs), requested)
    if prepared is None:
        call = core(*args, **kwargs)
        arrays, layout = flatten(call.op, call.operands)
        if decide(call, requested, current(), problem(common_device(call.op, arrays, layout))).path != "triton":
            return execute(call, requested)
        if len(_prepared) >= 4096:
            _prepared.clear()
        text = call_text(layout, call.static)
        order = [next(i for i, x in enumerate(tensors) if x is array) for array in arrays]
        outs = meaning(call.op, text).number_of_outs(arrays)
        prepared = _prepared[key] = Prepared(OPERATORS[call.op.name], text, order, call.result, outs)
    results = Forward.apply(prepared.operators, prepared.text, *[tensors[i] for i in prepared.order])
    return prepared.result(results[: prepared.outs])


def forget() -> None:
    """Forget calls and programs; for tests, which change where kernels run."""
    _prepared.clear()
    _programs.clear()


def describe(x, tensors: list[Tensor], first: dict[int, int]):
    """What a call depends on of an argument: a tensor's looks and whether it came before, anything else's type and value."""
    if isinstance(x, Tensor):
        tensors.append(x)
        return x.shape, x.dtype, x.device, first.setdefault(id(x), len(tensors))
    if isinstance(x, tuple | list):
        return type(x), *[describe(y, tensors, first) for y in x]
    return type(x), x


def execute(call: Call, requested: str | None) -> Any:
    """The public result of a call."""
    arrays, layout = flatten(call.op, call.operands)
    device = common_device(call.op, arrays, layout)
    if decide(call, requested, current(), problem(device)).path == "triton":
        return call.result(run_kernels(call, arrays, layout))
    formula = partial(call.op.reference, torch)
    if (requested or current()) != "reference":  # fallen back, not asked for: torch's fastest, which lacks some derivatives
        formula = FUSED.get(call.op.name, formula)
    with without_autocast(device):
        return call.result(formula(Operands(**call.operands), **dict(call.static)))


def without_autocast(device: torch.device):
    """The formulas choose their own precision."""
    return torch.autocast(device.type, enabled=False) if autocast_dtype(device) else nullcontext()


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that matrix products take under autocast, None outside of it."""
    enabled = device.type in ("cpu", "cuda") and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if enabled else None


def run_kernels(call: Call, arrays: list[Tensor], layout: Layout) -> Sequence[Tensor]:
    operators = OPERATORS[call.op.name]
    if torch.compiler.is_compiling():
        static = tuple((name, constant(value)) for name, value in call.static)
        outs, _ = call.op.infer(Operands(**call.operands), **dict(static))
        return operators.forward(arrays, repr((layout, static)))[: len(outs)]
    text = call_text(layout, call.static)
    plain = _functorch.peek_interpreter_stack() is None and all(type(x) in (Tensor, torch.nn.Parameter) for x in arrays)
    results = Forward.apply(operators, text, *arrays) if plain else operators.forward(arrays, text)
    return results[: meaning(call.op, text).number_of_outs(arrays)]
