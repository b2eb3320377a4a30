"""`implementation` and `set_implementation`: the same in both frameworks, whatever threads, tasks and exceptions do."""

from __future__ import annotations

import asyncio
import inspect
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from frameworks import INSTALLED

X = np.ones((2, 5, 16), "f4")
needs_torch = pytest.mark.skipif("torch" not in INSTALLED, reason="needs torch")
needs_jax = pytest.mark.skipif("jax" not in INSTALLED, reason="needs jax")


@pytest.fixture
def front(framework, kernels):
    """A framework whose "auto" runs kernels, with its process default as it was afterwards."""
    yield framework
    framework.ops.set_implementation("auto")


def on_kernels_device():
    """X where torch's kernels run: on a GPU if there is one, else in the interpreter."""
    import torch

    return torch.tensor(X, device="cuda" if torch.cuda.is_available() else "cpu")


def path(front, **how) -> str:
    return front.ops.explain("rms_norm", front.put(X, "float32"), **how).path


def elsewhere(function, *args):
    """function(*args) in a new thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()


def test_blocks_nest_and_restore(front):
    reference, triton = front.ops.implementation("reference"), front.ops.implementation("triton")
    for _ in range(2):
        with reference as entered:
            assert entered is reference and path(front) == "reference"
            assert path(front, implementation="auto") == path(front, implementation="triton") == "triton"
            with triton:
                assert path(front) == "triton"
                with reference, reference:
                    assert path(front) == "reference"
                assert path(front) == "triton"
            assert path(front) == "reference"
        assert path(front) == "triton"


def test_exceptions_end_a_block(front):
    with pytest.raises(KeyError), front.ops.implementation("reference"), front.ops.implementation("reference"):
        raise KeyError
    assert path(front) == "triton"


def test_the_process_default(front):
    front.ops.set_implementation("reference")
    assert path(front) == elsewhere(path, front) == "reference"
    with front.ops.implementation("auto"):
        assert path(front) == "triton"
        assert elsewhere(path, front) == "reference"
        front.ops.set_implementation("triton")
        front.ops.set_implementation("reference")
        assert path(front) == "triton"
    assert path(front) == "reference"
    front.ops.set_implementation("auto")
    assert path(front) == elsewhere(path, front) == "triton"


def test_names_are_checked(front):
    for choose in (front.ops.implementation, front.ops.set_implementation):
        for name, came in (("cuda", "'cuda'"), ([], "a list")):
            with pytest.raises(ValueError, match=rf"{choose.__name__}: name is {came}; expected one of 'auto', "):
                choose(name)
    assert path(front) == "triton"


def test_a_statement_of_its_own_sets_the_process_default(front):
    front.ops.implementation("reference")
    assert path(front) == elsewhere(path, front) == "reference"
    front.ops.implementation("auto")
    assert path(front) == elsewhere(path, front) == "triton"


def test_what_becomes_a_block_or_a_decorator_never_does(front):
    block = front.ops.implementation("reference")
    assert path(front) == "triton"
    with block:
        assert elsewhere(path, front) == "triton"
    decorated = front.ops.implementation("reference")(path)
    del block
    assert path(front) == "triton" and decorated(front) == "reference" and path(front) == "triton"


@pytest.mark.parametrize("shared", [False, True], ids=["an object each", "one object"])
def test_overlapping_threads(front, shared):
    """Two blocks in two threads, the first of which ends first; each sees its own, and a third thread neither."""
    objects = {name: front.ops.implementation(name) for name in ("reference", "auto")}
    turns, seen = threading.Barrier(3, timeout=60), {}

    def run(number: int):
        name = "reference" if shared or number == 0 else "auto"
        for turn in range(4):
            if turn == number:
                objects[name].__enter__()
            turns.wait()
            seen[number, turn] = path(front)
            turns.wait()
            if turn == number + 2:
                objects[name].__exit__(None, None, None)

    with objects["auto"], ThreadPoolExecutor(2) as pool:
        workers = [pool.submit(run, number) for number in range(2)]
        for turn in range(4):
            turns.wait()
            seen["third", turn] = elsewhere(path, front)
            turns.wait()
        [worker.result() for worker in workers]
    second = "reference" if shared else "triton"
    assert [seen[0, turn] for turn in range(4)] == ["reference"] * 3 + ["triton"]
    assert [seen[1, turn] for turn in range(4)] == ["triton"] + [second] * 3
    assert [seen["third", turn] for turn in range(4)] == ["triton"] * 4
    assert path(front) == "triton"


def test_many_threads_in_a_hurry(front):
    default = []

    def run(name: str, expected: str) -> list[str]:
        seen = []
        for _ in range(200):
            with front.ops.implementation(name):
                seen.append(path(front) == expected)
            default.append(path(front))
        return seen

    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(run, *how) for how in [("reference", "reference"), ("triton", "triton")] * 2]
        assert all(all(job.result()) for job in jobs)
    assert set(default) == {"triton"}


async def overlapping(front, call) -> list:
    """What `call` gives in two tasks whose blocks overlap, and in a third that has none."""
    first, second = asyncio.Event(), asyncio.Event()

    async def outer():
        with front.ops.implementation("reference"):
            first.set()
            await second.wait()
            return call(front)

    async def inner():
        await first.wait()
        with front.ops.implementation("auto"):
            second.set()
            await asyncio.sleep(0)
            await asyncio.sleep(0)  # the outer block ends before this one
            return call(front)

    async def without():
        await first.wait()
        return call(front)

    return await asyncio.gather(outer(), inner(), without())


def test_overlapping_tasks(front):
    assert asyncio.run(overlapping(front, path)) == ["reference", "triton", "triton"]
    assert path(front) == "triton"
    with front.ops.implementation("reference"):
        again = asyncio.run(overlapping(front, path))
        assert path(front) == "reference"
    assert again == ["reference", "triton", "reference"]  # tasks that are started in a block are in it
    assert path(front) == "triton"


@needs_jax
def test_jitted_calls_of_overlapping_tasks():
    """A trace in a task whose thread is in another task's block is refused: its result would be cached under that block."""
    import jax

    import mmattn_jax

    class Jax:
        ops = mmattn_jax

    def call(_):
        try:
            return jax.jit(lambda x: mmattn_jax.rms_norm(x))(X) is not None
        except RuntimeError as error:
            return str(error)

    refused = re.compile("jax.jit's cache tells threads apart, not contexts; .* Do not await in a block")
    for result in asyncio.run(overlapping(Jax, call)):
        assert result is True or refused.search(result)
    assert call(None) is True


def test_tasks_that_do_not_await_in_a_block(front):
    async def chosen(name):
        with front.ops.implementation(name):
            within = path(front)
        await asyncio.sleep(0)
        return within, path(front)

    async def both():
        return await asyncio.gather(chosen("reference"), chosen("triton"))

    assert asyncio.run(both()) == [("reference", "triton"), ("triton", "triton")]


def test_decorator(front):
    @front.ops.implementation("reference")
    def chosen(depth: int = 0) -> list[str]:
        """Words."""
        return [path(front), *(chosen(depth - 1) if depth else [])]

    assert path(front) == "triton"
    assert chosen(2) == ["reference"] * 3 and chosen.__doc__ == "Words."
    assert elsewhere(chosen) == ["reference"]
    assert path(front) == "triton"


def test_a_decorator_refuses_what_runs_later(front):
    def generator():
        yield

    async def coroutine(): ...

    async def both():
        yield

    for function in (generator, coroutine, both):
        with pytest.raises(
            TypeError, match=rf'{function.__name__} runs after .* `with implementation\("reference"\):` inside of it'
        ):
            front.ops.implementation("reference")(function)


def test_documentation():
    """The frameworks say the same, and then what is particular to each."""
    if len(INSTALLED) < 2:
        pytest.skip("needs both frameworks")
    import mmattn_jax
    import mmattn_torch

    torch, jax = (inspect.getdoc(package.implementation).split("\n\n") for package in (mmattn_torch, mmattn_jax))
    assert torch[:-1] == jax[:-1] and (torch[-1][:8], jax[-1][:6]) == ("In torch", "In JAX")
    assert inspect.getdoc(mmattn_torch.set_implementation) == inspect.getdoc(mmattn_jax.set_implementation)


# torch.compile


@pytest.fixture
def compiled(kernels):
    """compile(function): the function as torch.compile makes it, and the mmattn operators in each of its graphs."""
    import torch
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()

    def compile(function, **how):
        backend = CompileCounterWithBackend("aot_eager")
        calls = lambda graph: [n.target for n in graph.graph.nodes if n.op == "call_function" and "mmattn" in str(n.target)]
        return torch.compile(function, backend=backend, **how), lambda: [len(calls(graph)) for graph in backend.graphs]

    return compile


def rms(x):
    import mmattn_torch

    return mmattn_torch.rms_norm(x)


@needs_torch
def test_a_compiled_function_asks_the_context_that_calls_it(compiled):

    import mmattn_torch

    f, kernels = compiled(rms, fullgraph=True)
    x = on_kernels_device()

    def under(name):
        with mmattn_torch.implementation(name):
            f(x)
            elsewhere(f, x)  # in another thread, which is in no block

    for name, graphs in (("reference", [0, 1]), ("auto", [0, 1]), ("reference", [0, 1])):
        under(name)
        assert kernels() == graphs
    mmattn_torch.set_implementation("reference")
    try:
        f(x)
    finally:
        mmattn_torch.set_implementation("auto")
    f(x)
    assert kernels() == [0, 1]  # one graph for each setting, whoever made it


@needs_torch
def test_blocks_in_a_compiled_function(compiled):

    import mmattn_torch

    def within(x):
        with mmattn_torch.implementation("reference"):
            y = rms(x)
            with mmattn_torch.implementation("auto"):
                y = y + rms(x)
        return y + rms(x)

    for function, count in ((within, 2), (mmattn_torch.implementation("reference")(rms), 0)):
        f, kernels = compiled(function, fullgraph=True)
        f(on_kernels_device())
        assert kernels() == [count]
        assert mmattn_torch.explain("rms_norm", on_kernels_device()).path == "triton"


@needs_torch
def test_a_graph_break_in_a_block(compiled):
    """What runs between two graphs is in the block too, and other threads are not."""
    import torch

    import mmattn_torch

    seen = []

    @torch.compiler.disable
    def look(x):
        where = lambda: mmattn_torch.explain("rms_norm", x).path
        seen.append((where(), elsewhere(where)))

    def broken(x):
        with mmattn_torch.implementation("reference"):
            y = rms(x)
            look(x)
            y = y + rms(x)
        return y + rms(x)

    f, kernels = compiled(broken)
    x = on_kernels_device()
    for _ in range(2):
        torch.testing.assert_close(f(x), 3 * rms(x))
    assert seen == [("reference", "triton")] * 2
    assert sum(kernels()) == 1
    assert mmattn_torch.explain("rms_norm", x).path == "triton"


@needs_torch
def test_checkpoint_recomputes_under_the_setting_of_the_backward(kernels):
    import torch
    from torch.utils.checkpoint import checkpoint

    import mmattn_torch

    seen = []

    def layer(x):
        seen.append(mmattn_torch.explain("rms_norm", x).path)
        return rms(x)

    x = torch.tensor(X, requires_grad=True)
    with mmattn_torch.implementation("reference"):
        checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert seen == ["reference"] * 2


# jax.jit


@needs_jax
def test_a_jitted_function_asks_the_thread_that_calls_it(kernels):
    import jax

    import mmattn_jax

    traced = []

    @jax.jit
    def f(x):
        traced.append(mmattn_jax.explain("rms_norm", X).path)
        return mmattn_jax.rms_norm(x)

    def under(name):
        with mmattn_jax.implementation(name):
            f(X)
            elsewhere(f, X)

    under("reference")
    assert traced == ["reference", "triton"]
    under("reference")
    assert traced == ["reference", "triton"]
    under("triton")
    assert traced == ["reference", "triton", "triton"]
    f(X)
    assert len(traced) == 3


@needs_jax
def test_a_copied_context_in_another_thread(kernels):
    import jax

    import mmattn_jax

    chosen = lambda: mmattn_jax.explain("rms_norm", X).path

    async def main():
        with mmattn_jax.implementation("reference"):
            with pytest.raises(RuntimeError, match='this context is in a block of "reference", its thread is in no block'):
                await asyncio.to_thread(jax.jit(lambda x: mmattn_jax.rms_norm(x)), X)
            assert await asyncio.to_thread(chosen) == "reference"
            jitted = jax.jit(lambda x: mmattn_jax.rms_norm(x, implementation="reference"))
            assert (await asyncio.to_thread(jitted, X)).shape == X.shape
            assert elsewhere(chosen) == "triton"

    asyncio.run(main())
