"""Any Op as PyTorch dispatcher operators, and the choice between its kernels and plain torch code.

An op gets two operators, the stable face for torch.compile, export and dispatch modes; both always launch kernels:
    mmattn::<op>_fwd(Tensor[] arrays, str call) -> Tensor[]                  outs, then residuals
    mmattn::<op>_bwd(Tensor[] kept, Tensor[] douts, str call) -> Tensor[]    gradients of what is neither constant nor passed
`call` is the text of (name, layout, static): the public function, where the arrays belong, and the static arguments. No size of
an array is in it, so that a dynamic length does not change it.

Autograd is a Function in the operators' Autograd kernels. Any call that somebody may want to see or transform (compiling,
torch.func, dispatch modes, tensor subclasses, forward mode, a profiler) goes through the operator, so one code path serves all
of them. A plain eager call replays the launches of the first call that looked like it: with kernels as short as these, whatever
the host does per call is what the caller waits for.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from itertools import accumulate, zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.nn import Parameter

import mmattn
from mmattn import check
from mmattn._gluon import INSTALLED
from mmattn._triton import triton
from mmattn.choice import ROCM, Explanation, call_problem, decide, no_gradient, not_a_gpu, old_gpu
from mmattn.op import (
    DTYPE_NAMES,
    UNUSED,
    Call,
    Layout,
    Op,
    Operands,
    Plan,
    Spec,
    Target,
    flatten,
    owners,
    remembered,
    row_stride,
    unflatten,
)

from . import _arrays
from ._choice import current, of_context
from ._derivatives import guarded, refuse
from ._fold import examples, fold, fold_operands, lead, unfold
from ._fused import FUSED, fused_name

DTYPE_NAMES.update({x: str(x).removeprefix("torch.") for x in vars(torch).values() if isinstance(x, torch.dtype)})


@remembered
def dense(spec: Spec) -> tuple:
    """Shape, strides and dtype of a contiguous tensor."""
    strides = accumulate((max(n, 1) for n in spec.shape[:0:-1]), operator.mul, initial=1)
    return tuple(spec.shape), tuple(strides)[::-1][: len(spec.shape)], getattr(torch, spec.dtype)


def empty(spec: Spec, device: torch.device) -> Tensor:
    """An output, not yet written; on a GPU the current one, as compiled code allocates: torch.empty takes three times as long."""
    shape, strides, dtype = dense(spec)
    if device.type == "cuda":
        return torch._C._dynamo.guards._empty_strided_cuda(shape, strides, dtype)
    return torch.empty(shape, dtype=dtype, device=device)


def launch(plan: Plan, arrays: Sequence[Tensor], outs: Sequence[Tensor]) -> Callable[[list[int]], None]:
    """One launch on the current GPU. Returns what launches the plan again, on addresses of the same dtypes and alignment.

    Triton looks a kernel up by the type and alignment of every argument, which takes it longer than small kernels run.
    """
    options = dict(num_warps=plan.warps, num_stages=plan.stages, enable_fp_fusion=False)
    compiled = with_scratch(plan.kernel[plan.grid])(*arrays, *outs, *plan.ints.values(), **plan.meta, **options)
    constants = (*plan.ints.values(), *(plan.meta[name] for name in plan.kernel.arg_names if name in plan.meta))
    grid, run, function, packed = (*plan.grid, 1, 1)[:3], compiled.run, compiled.function, compiled.packed_metadata
    profiled = compiled[grid]
    if getattr(compiled.metadata, "global_scratch_size", 0):
        run, profiled = with_scratch(run), with_scratch(profiled)
    runtime, stream, device = triton.knobs.runtime, torch._C._cuda_getCurrentRawStream, torch.cuda.current_device()

    def again(addresses: list[int]) -> None:
        if runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls:  # a profiler of Triton's
            profiled(*addresses, *constants)
        else:
            run(*grid, stream(device), function, packed, None, None, None, *addresses, *constants)

    return again


def with_scratch(launch: Callable) -> Callable:
    """launch, where Triton takes the scratch memory that some kernels want from torch, without the user's allocator changing.

    The memory is given back as soon as the launch is queued: torch hands it out again on the same stream only.
    """
    allocator = triton.runtime._allocation._allocator

    def launched(*args, **kwargs):
        token = allocator.set(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
        try:
            return launch(*args, **kwargs)
        finally:
            allocator.reset(token)

    return launched


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
        return not_a_gpu(device.type)
    if torch.version.hip is not None:  # torch calls AMD's GPUs "cuda" too
        return ROCM
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    return old_gpu(target(device).arch)


@cache  # one for each GPU
def target(device: torch.device) -> Target:
    if device.type != "cuda":
        return Target()
    gpu = torch.cuda.get_device_properties(device)
    return Target(10 * gpu.major + gpu.minor, gpu.multi_processor_count, gpu.shared_memory_per_block_optin, INSTALLED)


class Step:
    """One launch of a program, and where its inputs and then its outputs lie among the program's arrays.

    new: what each output is, a Spec, or the position of the input that the launch updates. The plan, which is large, is kept
    until there is `again`.
    """

    __slots__ = ("again", "at", "new", "plan")

    def __init__(self, plan: Plan, inputs: Sequence[int], outs: Sequence[int]):
        self.new = tuple(inputs[plan.aliases[i]] if i in plan.aliases else out for i, out in enumerate(plan.outs))
        self.plan, self.at, self.again = plan, (*inputs, *outs), None

    def first(self, arrays: list[Tensor]) -> None:
        """The launch, before there is `again`."""
        operands = [arrays[i] for i in self.at]
        inputs, outs = operands[: -len(self.new)], operands[-len(self.new) :]
        if 0 in self.plan.grid:
            for x, out in zip(outs, self.new, strict=True):
                if out is not UNUSED:
                    x.zero_()
        else:
            self.again, self.plan = launch(self.plan, inputs, outs), None


def follow(steps: Sequence[Step], arrays: list[Tensor], addresses: list[int], device: torch.device) -> None:
    """Launch steps; each one's outputs and their addresses join the arrays."""
    for step in steps:
        for out in step.new:
            x = arrays[out] if type(out) is int else spare(device) if out is UNUSED else empty(out, device)
            arrays.append(x)
            addresses.append(x.data_ptr())
        again = step.again
        if again is None:
            step.first(arrays)
        else:
            again([addresses[i] for i in step.at])


@cache  # one for each device
def spare(device: torch.device) -> Tensor:
    """What stands for outputs that no launch writes."""
    with torch.inference_mode(False):
        return empty(UNUSED, device)


class Run:
    """What an op asks of a framework: launch a plan on newly allocated outputs. It keeps a record of what it did."""

    def __init__(self, device: torch.device, arrays: Sequence[Tensor]):
        self.device, self.target = device, target(device)
        self.arrays, self.addresses, self.steps = list(arrays), [x.data_ptr() for x in arrays], []

    def __call__(self, plan: Plan, *arrays: Tensor) -> tuple[Tensor, ...]:
        first = len(self.arrays)
        step = Step(plan, [self.position(x) for x in arrays], range(first, first + len(plan.outs)))
        follow([step], self.arrays, self.addresses, self.device)
        self.steps.append(step)
        return tuple(self.arrays[first:])

    def position(self, array: Tensor) -> int:
        return next(i for i, x in enumerate(self.arrays) if x is array)


class Program(NamedTuple):
    """The launches of an operator on arrays of given shapes, strides, dtypes and alignment. They are all that it does, so they
    can be repeated on other such arrays without asking the op again."""

    device: torch.device
    index: int | None  # of a GPU
    copied: list[int]  # arrays that the kernels cannot read in place
    steps: list[Step]
    results: list[int]

    def __call__(self, arrays: Sequence[Tensor], addresses: list[int]) -> list[Tensor]:
        """addresses: the arrays' own; what was allocated joins them."""
        device, index, copied, steps, results = self
        if index is not None and index != torch._C._cuda_getDevice():
            with torch.cuda.device(device):
                return self(arrays, addresses)
        arrays = list(arrays)
        for i in copied:
            arrays[i] = arrays[i].contiguous()
            addresses[i] = arrays[i].data_ptr()
        follow(steps, arrays, addresses, device)
        return [arrays[i] for i in results]


def record(op: Op, owners: Sequence[str], arrays: Sequence[Tensor], compute: Callable) -> tuple[Program, list[Tensor]]:
    """compute(run, arrays), a list of tensors, which only launches plans; as a program, and what it came to.

    owners: the operands that the first arrays belong to; the others are results.
    """
    device = arrays[0].device
    inputs = []
    for owner, x in zip_longest(owners, arrays):
        x = readable(op, owner, x)
        inputs.append(x.detach() if any(x is y for y in inputs) else x)  # positions are told apart by identity
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        run = Run(device, inputs)
        results = compute(run, inputs)
    copied = [i for i, x in enumerate(arrays) if x.data_ptr() != inputs[i].data_ptr()]
    return Program(device, device.index, copied, run.steps, [run.position(x) for x in results]), results


class Latest(dict):
    """What was remembered or looked up last, at most twice `size` entries: `latest[key]`, None where it is not known.

    The entries of this dict are the young ones, which are found as fast as a dict finds them. When there are `size` of them they
    become the old ones, in place of those that were old and have not been looked up since.
    """

    def __init__(self, size: int):
        self.size, self.old = size, {}

    def __missing__(self, key):
        value = self.old.get(key)
        if value is not None:
            self.remember(key, value)
        return value

    def remember(self, key, value) -> None:
        if len(self) >= self.size:
            self.old = dict(self)
            self.clear()
        self[key] = value

    def forget(self) -> None:
        self.clear()
        self.old = {}


REMEMBERED = 1536
"""Calls, which lengths that change for ever must not fill the memory with: a few kilobytes each."""
_programs: Latest = Latest(REMEMBERED)


def replayed(name: tuple, op: Op, owners: Sequence[str], arrays: Sequence[Tensor], compute: Callable) -> list[Tensor]:
    """compute(run, arrays), recorded once for arrays that look like these."""
    key, addresses = [name], []
    if not describe(arrays, key, [], addresses):  # a tensor subclass
        return record(op, owners, arrays, compute)[1]
    key = tuple(key)
    program = _programs[key]
    if program is not None:
        return program(arrays, addresses)
    program, results = record(op, owners, arrays, compute)
    _programs.remember(key, program)
    return results


def describe(args, key: list, tensors: list[Tensor], addresses: list[int]) -> bool:
    """Collect tensors, their addresses, and what a launch depends on: looks of tensors, type and value of anything else.

    False where an argument is nothing that can be remembered. (Triton's kernels depend on an address being a multiple of 16.)
    """
    for x in args:
        kind = type(x)
        if kind is Tensor or kind is Parameter:
            if x.layout is not torch.strided or x.is_neg():  # neither is what its memory says
                return False
            try:
                shape = x.shape
            except RuntimeError:  # of a nested tensor
                return False
            address = x.data_ptr()
            if not address and 0 not in shape:  # zeros that autograd has not put into memory
                return False
            tensors.append(x)
            addresses.append(address)
            key += (shape, x.is_contiguous() or x.stride(), x.dtype, x.device, address % 16 == 0)
        elif x is None:
            key.append(None)
        elif kind is float or kind is int or kind is bool or kind is str:
            key += (kind, x)
        elif kind is tuple or kind is list:
            key += (kind, len(x))
            if not describe(x, key, tensors, addresses):
                return False
        else:
            return False
    return True


class Meaning:
    """What an operator's `call` says: positions count an op's arrays in the order of `flatten`."""

    def __init__(self, op: Op, text: str):
        self.op, self.text = op, text
        self.name, self.layout, static = ast.literal_eval(text)
        self.static = dict(static)
        self.owners = owners(self.layout)
        self.kept = [i for i, name in enumerate(self.owners) if name in op.keeps]
        self.kept_owners = [self.owners[i] for i in self.kept]
        self.wanted = [i for i, name in enumerate(self.owners) if name not in op.constant and name not in op.passes]
        self.constant = [i for i, name in enumerate(self.owners) if name in op.constant]
        self.outs = None
        # For every array the position of its gradient among those of `wanted`, the outputs' own and, last, None.
        given = {i: n for n, i in enumerate(self.wanted)}
        passed = {i: len(given) + op.passes[name] for i, name in enumerate(self.owners) if name in op.passes}
        self.returns = [(given | passed).get(i, -1) for i in range(len(self.owners))]

    def operands(self, arrays: Sequence) -> Operands:
        return unflatten(self.layout, arrays)

    def forward(self, run: Run, arrays: list[Tensor]) -> list[Tensor]:
        outs, extras = self.op.forward(run, self.operands(arrays), **self.static)
        return [*outs, *extras]

    def backward(self, kept: int, run: Run, arrays: list[Tensor]) -> list[Tensor]:
        operands, results, douts = arrays[: len(self.kept)], arrays[len(self.kept) : kept], tuple(arrays[kept:])
        n = len(douts) if self.op.keeps_outs else 0
        a = self.operands(self.kept_operands(operands))
        return self.gradients(self.op.backward(run, a, tuple(results[:n]), tuple(results[n:]), douts, **self.static))

    def number_of_outs(self, arrays: Sequence) -> int:
        if self.outs is None:  # it follows from the text alone, but infer wants shapes
            self.outs = len(self.op.infer(self.operands(arrays), **self.static)[0])
        return self.outs

    def residuals(self, arrays: Sequence[Tensor], results: Sequence[Tensor], outs: int) -> list[Tensor]:
        """What the backward operator gets as `kept`."""
        return [*[arrays[i] for i in self.kept], *(results if self.op.keeps_outs else results[outs:])]

    def kept_operands(self, kept: Sequence[Tensor]) -> list[Tensor | None]:
        arrays = [None] * len(self.owners)
        for i, x in zip(self.kept, kept, strict=False):  # results follow
            arrays[i] = x
        return arrays

    def gradients(self, grads: dict[str, Any]) -> list[Tensor]:
        """The wanted gradients out of what an op's backward returns."""
        flat = {}
        for name, at in self.layout:
            if name in grads and at is not None:
                flat |= dict(zip(at, grads[name], strict=True) if isinstance(at, tuple) else [(at, grads[name])])
        return [flat[i] for i in self.wanted]


meaning = remembered(Meaning)


@remembered
def call_text(name: str, layout: Layout, static: tuple) -> str:
    return repr((name, layout, static))


class Operators(NamedTuple):
    op: Op
    forward: torch._ops.OpOverload
    backward: torch._ops.OpOverload


def readable(op: Op, owner: str | None, x: Tensor) -> Tensor:
    """x as the kernels read it: what it says is in memory, contiguous, or with a row stride where they can read through it."""
    if not x.data_ptr() and x.numel():
        x = x.new_zeros(x.shape)
    x = x.resolve_neg()
    if x.is_contiguous():
        return x
    dense = op.dense.get(owner)
    return x.contiguous() if dense is None or row_stride(x, dense) is None else x


def run_forward(op: Op, arrays: list[Tensor], call: str) -> list[Tensor]:
    m = meaning(op, call)
    return replayed((m, "fwd"), op, m.owners, arrays, m.forward)


def run_backward(op: Op, kept: list[Tensor], douts: list[Tensor], call: str) -> list[Tensor]:
    return differentiate(meaning(op, call), kept, douts)


def differentiate(m: Meaning, kept: Sequence[Tensor], douts: Sequence[Tensor]) -> list[Tensor]:
    return replayed((m, "bwd"), m.op, m.kept_owners, [*kept, *douts], partial(m.backward, len(kept)))


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
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                yield


class Kept(NamedTuple):
    """What a Forward leaves for its backward, besides tensors."""

    meaning: Meaning
    outs: list[tuple[torch.Size, torch.dtype]]


def refuse_constants(ctx, m: Meaning) -> None:
    for i in m.constant:
        if ctx.needs_input_grad[i + 1]:
            raise RuntimeError(no_gradient(m.name, m.owners[i], "detach it"))


class Forward(_SingleLevelFunction):
    @staticmethod
    def forward(ctx, m: Meaning, *arrays: Tensor):
        refuse_constants(ctx, m)
        with below_autograd():
            results = OPERATORS[m.op.name].forward(list(arrays), m.text)
        n = m.number_of_outs(arrays)
        ctx.kept = Kept(m, [(x.shape, x.dtype) for x in results[:n]])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*m.residuals(arrays, results, n))
        ctx.mark_non_differentiable(*results[n:])
        return tuple(results)

    @staticmethod
    def backward(ctx, *douts: Tensor | None):
        (m, outs), kept = ctx.kept, ctx.saved_tensors
        douts = [
            kept[0].new_zeros(shape, dtype=dtype) if d is None else d if d.layout is torch.strided else d.to_dense()
            for d, (shape, dtype) in zip(douts, outs, strict=False)
        ]
        if not torch.is_grad_enabled() and plain() and {*map(type, kept), *map(type, douts)} <= PLAIN:
            grads = differentiate(m, kept, douts)
        else:
            grads = OPERATORS[m.op.name].backward(list(kept), douts, m.text)
        grads = [*grads, *douts, None]
        return None, *[grads[i] for i in m.returns]

    @staticmethod
    def jvp(ctx, *tangents):
        refuse(ctx.kept.meaning.name)


class EagerForward(Forward):
    """Forward of a plain eager call, without the dispatcher."""

    @staticmethod
    def forward(ctx, call: tuple[Prepared, list[int]], *arrays: Tensor):
        prepared, addresses = call
        refuse_constants(ctx, prepared.kept.meaning)
        results = prepared.program(arrays, addresses)
        ctx.kept = prepared.kept
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*prepared.kept.meaning.residuals(arrays, results, prepared.outs))
        return tuple(results[: prepared.outs])


class Backward(_SingleLevelFunction):
    @staticmethod
    def forward(ctx, operators: Operators, call: str, kept: int, *arrays: Tensor):
        ctx.meaning = meaning(operators.op, call)
        with below_autograd():
            return tuple(operators.backward(list(arrays[:kept]), list(arrays[kept:]), call))

    @staticmethod
    def backward(ctx, *_):
        refuse(ctx.meaning.name)

    @staticmethod
    def jvp(ctx, *_):
        refuse(ctx.meaning.name)


def autograd_forward(operators: Operators, arrays: list[Tensor], call: str) -> list[Tensor]:
    with enable_single_level_autograd_function():
        return list(Forward.apply(meaning(operators.op, call), *arrays))


def autograd_backward(operators: Operators, kept: list[Tensor], douts: list[Tensor], call: str) -> list[Tensor]:
    with enable_single_level_autograd_function():
        return list(Backward.apply(operators, call, len(kept), *kept, *douts))


def vmap_forward(operators: Operators, info, dims, arrays: list[Tensor], call: str):
    op, n = operators.op, info.batch_size
    m = meaning(op, call)
    arrays, some = examples(arrays, dims[0], n)
    folded = fold_operands(op, m.owners, arrays, dims[0], some)
    results = [unfold(x, some)[:n] for x in operators.forward(folded, call)]
    return results, [0] * len(results)


def vmap_backward(operators: Operators, info, dims, kept: list[Tensor], douts: list[Tensor], call: str):
    op, n = operators.op, info.batch_size
    m = meaning(op, call)
    operands = len(m.kept)  # results follow
    kept, some = examples(kept, dims[0], n)
    douts, _ = examples(douts, dims[1], n)
    folded = fold_operands(op, [m.owners[i] for i in m.kept], kept[:operands], dims[0][:operands], some)
    folded += [fold(x, dim, some) for x, dim in zip(kept[operands:], dims[0][operands:], strict=True)]
    grads = operators.backward(folded, [fold(d, dim, some) for d, dim in zip(douts, dims[1], strict=True)], call)
    shapes = m.kept_operands([lead(x, dim, some).shape for x, dim in zip(kept, dims[0], strict=True)])
    return [g.reshape(shapes[i])[:n] for g, i in zip(grads, m.wanted, strict=True)], [0] * len(grads)


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
    for overload, kernel, fake, autograd, vmap in halves:
        name = overload.name()
        for key in ("CUDA", "CPU"):  # on the CPU tests put an interpreter in place of `launch`
            LIBRARY.impl(name, partial(kernel, op), key)
        LIBRARY.impl(name, partial(autograd, operators), "Autograd")
        torch.library.register_fake(name, partial(fake, op), lib=LIBRARY)
        torch.library.register_vmap(name, partial(vmap, operators), lib=LIBRARY)
    return operators


OPERATORS = {op.name: register(op) for op in mmattn.OPS}


PARAMETERS: dict[str, dict[str, str]] = {}  # public name -> the parameters of what checks its arguments
TENSOR = check.Kind("torch.Tensor", lambda x: isinstance(x, Tensor), "torch.as_tensor")


def is_dense(x: Tensor) -> bool:
    """Whether x has a shape and strides. A nested tensor has none, though its layout may be strided."""
    return x.layout is torch.strided and not x.is_nested


def check_tensors(op: str, args: tuple, kwargs: dict[str, Any]) -> None:
    """Every array is a dense tensor, all of them on one device."""
    first = None
    for name, x in check.arrays(op, PARAMETERS[op], args, kwargs, TENSOR):
        if x.is_nested:
            raise TypeError(f"{op}: {name} is a nested tensor; expected a dense one. Pad it with torch.nested.to_padded_tensor.")
        if x.layout is not torch.strided:
            raise TypeError(f"{op}: {name} is {x.layout}; expected torch.strided. Convert it with to_dense().")
        first = first or (name, x.device)
        if x.device != first[1]:
            raise ValueError(
                f"{op}: {name} is on {x.device}; expected {first[1]}, where {first[0]} is. "
                f"Move it with {name}.to({first[0]}.device)."
            )


def device_of(call: Call) -> torch.device:
    return flatten(call.op, call.operands)[0][0].device


def explain(call: Call, requested: str | None, device: torch.device | None) -> Explanation:
    """The path that a call would take on a device, the tensors' own unless given; for meta tensors a GPU if there is one."""
    device = device or device_of(call)
    if device.type == "meta":
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    path, reason = decide(call, requested, current(), problem(device))
    fused = fused_name(call) if path == "reference" and fallen_back(call, requested) else None
    return Explanation(path, f"{reason}; {fused} takes the place of the formula" if fused else reason)


class Prepared(NamedTuple):
    """A call that takes the kernels, as far as the looks of its arguments determine it."""

    kept: Kept
    order: list[int] | None  # of the op's arrays among the call's tensors, None if it is theirs
    program: Program
    outs: int
    result: Callable


_prepared: Latest = Latest(REMEMBERED)
PLAIN = {Tensor, Parameter}
REQUIRES_GRAD = operator.attrgetter("requires_grad")


def plain() -> bool:
    """Whether nobody watches or transforms what runs, so that it need not go through the dispatcher."""
    return not (
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._autograd._profiler_enabled()
        or torch._C._get_tracing_state()
        or forward_ad._current_level >= 0
    )


def perform(core: Callable[..., Call], requested: str | None, *args, **kwargs) -> Any:
    """The public result of core(*args, **kwargs). One core is always called with the same names in the same order."""
    if torch.compiler.is_compiling():
        return execute(checked(core, args, {name: constant(x) for name, x in kwargs.items()}), requested)
    if not plain():
        return execute(checked(core, args, kwargs), requested)
    key, tensors, addresses = [core, of_context()], [], []
    if not describe((requested, *args, *kwargs.values()), key, tensors, addresses):
        return execute(checked(core, args, kwargs), requested)
    key = tuple(key)
    prepared = _prepared[key]
    if prepared is None:
        call = checked(core, args, kwargs)
        if path(call, requested) != "triton":
            return execute(call, requested)
        seen = []
        call = checked(core, apart(args, seen), {name: apart(x, seen) for name, x in kwargs.items()})
        prepared = prepare(call, seen)
        _prepared.remember(key, prepared)
    if prepared.order is not None:
        tensors, addresses = [tensors[i] for i in prepared.order], [addresses[i] for i in prepared.order]
    if torch.is_grad_enabled() and any(map(REQUIRES_GRAD, tensors)):
        return prepared.result(EagerForward.apply((prepared, addresses), *tensors))
    return prepared.result(prepared.program(tensors, addresses)[: prepared.outs])


def checked(core: Callable[..., Call], args: tuple, kwargs: dict[str, Any]) -> Call:
    check_tensors(core.__name__, args, kwargs)
    call = core(*args, **kwargs)
    return Call(call.op, call.operands, call.static, call.result, core.__name__)  # torch.compile traces no _replace


def prepare(call: Call, tensors: list[Tensor]) -> Prepared:
    """Everything about a call but its tensors."""
    arrays, layout = flatten(call.op, call.operands)
    m = meaning(call.op, call_text(call.name, layout, call.static))
    order = [next(i for i, x in enumerate(tensors) if x is array) for array in arrays]
    program, results = record(call.op, m.owners, [x.detach() for x in arrays], m.forward)
    outs = m.number_of_outs(arrays)
    return Prepared(
        Kept(m, [(x.shape, x.dtype) for x in results[:outs]]),
        None if order == list(range(len(tensors))) else order,
        program,
        outs,
        call.result,
    )


def apart(x, seen: list[Tensor]):
    """x, in which a tensor that comes again is another one of the same memory: it may be two tensors in the next call."""
    if isinstance(x, tuple | list):
        return type(x)(apart(y, seen) for y in x)
    if isinstance(x, Tensor):
        x = x.detach() if any(x is y for y in seen) else x
        seen.append(x)
    return x


def forget() -> None:
    """Forget calls and programs; for tests, which change where kernels run."""
    _prepared.forget()
    _programs.forget()


def path(call: Call, requested: str | None) -> str:
    return decide(call, requested, current(), problem(device_of(call))).path


def execute(call: Call, requested: str | None) -> Any:
    """The public result of a call."""
    if path(call, requested) == "triton":
        return call.result(run_kernels(call))
    device = device_of(call)
    formula, operands = partial(call.op.reference, _arrays), Operands(**call.operands)
    if fallen_back(call, requested):  # torch's fastest, with the derivatives that the kernels have
        formula = FUSED.get(call.op.name, formula)
        if not (torch.compiler.is_compiling() or torch.jit.is_tracing()):  # a graph would hold what guards them
            operands = guarded(call, plain())
    with without_autocast(device):
        return call.result(formula(operands, **dict(call.static)))


def fallen_back(call: Call, requested: str | None) -> bool:
    """Whether a call that does not take the kernels has not asked for the reference either, by name or by its dtype."""
    return (requested or current()) != "reference" and call_problem(call) is None


def without_autocast(device: torch.device):
    """The formulas choose their own precision."""
    return torch.autocast(device.type, enabled=False) if autocast_dtype(device) else nullcontext()


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that matrix products take under autocast, None outside of it."""
    enabled = device.type in ("cpu", "cuda") and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if enabled else None


def run_kernels(call: Call) -> Sequence[Tensor]:
    arrays, layout = flatten(call.op, call.operands)
    operators = OPERATORS[call.op.name]
    if torch.compiler.is_compiling():
        static = tuple((name, constant(value)) for name, value in call.static)
        outs, _ = call.op.infer(Operands(**call.operands), **dict(static))
        return operators.forward(arrays, repr((call.name, layout, static)))[: len(outs)]
    text = call_text(call.name, layout, call.static)
    return operators.forward(arrays, text)[: meaning(call.op, text).number_of_outs(arrays)]
