"""Draw handwritten digits on request: train a small GPT2Stack in one framework, sample from it in both, compare the two.

Flow matching (Lipman et al. 2022, arXiv:2210.02747). On the straight path x_t = (1 - t) noise + t image the generator
learns the velocity image - noise, given x_t, t and the digit. Following that velocity from t = 0 to t = 1 turns noise
into an image; classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598) sharpens what was asked for.

    tokens        the 16 patches of 2x2 pixels of an 8x8 image
    conditioning  time and digit
    context       the letters of the digit's written name, "zero" to "nine", padded to five

The images are the 1,797 that ship with scikit-learn. `--framework` says where the generator is trained; its weights then go
to the other framework, and both start from the same noise. Written to `--out`: both sets of samples and the loss curve.
Printed: how far outputs and gradients of the two frameworks are from each other and from float64, the worst of them unless
`--all` is given. The exit status is 1 if anything is further than 1e-4, or if a classifier of the real digits reads fewer than
90% of the samples as asked for; 130 if Ctrl-C stopped it.

    python examples/digits.py [--framework torch|jax] [--steps N] [--depth N] [--out PNG] [--device cpu|cuda] [--seed N] [--all]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave PyTorch its share of the GPU
# Threads that wait for each other sleep. By default they spin, and on a machine that something else uses too, each of these
# small products waits for a thread that waits for a core: 0.1 steps a second instead of 10.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

try:
    import jax
    import numpy as np
    import optax
    import torch
    from flax import nnx
    from matplotlib.figure import Figure  # without pyplot: no display, the Agg backend writes the PNG
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from sklearn.svm import SVC
    from tqdm import trange

    import mmattn_jax
    import mmattn_torch
    from mmattn_jax.nn import GPT2Stack as FlaxStack
    from mmattn_torch.nn import GPT2Stack as TorchStack
except ImportError as error:
    sys.exit(f"{error}: the demo needs both PyTorch and JAX. Install them with: pip install '.[torch,jax,demo]'")
except KeyboardInterrupt:
    sys.exit(130)

WIDTH = 64
STACK = dict(dim_base=WIDTH, num_attn_head=4, dim_feedforward=256, dropout=0.0, conditioning=True, use_cross_attn=True)
BATCH, LEARNING_RATE = 128, 2e-3
UNCONDITIONAL = 0.1  # share of the training images whose digit is withheld, which guidance needs
EULER_STEPS, GUIDANCE = 32, 1.5
PARITY_LIMIT, READ_LIMIT = 1e-4, 0.9
WORST = 8  # rows of the table of differences, unless all are asked for

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "")  # the last: no digit in particular
ANY = len(NAMES) - 1
LETTERS = np.array([[ord(c) - ord("a") for c in name.ljust(5, "z")] for name in NAMES])
IS_LETTER = np.array([[i < len(name) for i in range(5)] for name in NAMES])


class Inputs(NamedTuple):
    """What the generator is given."""

    x: np.ndarray  # (B, 16, 4) patches of an image that is still part noise
    time: np.ndarray  # (B, 32) waves of t
    digit: np.ndarray  # (B,)
    letters: np.ndarray  # (B, 5)
    is_letter: np.ndarray  # (B, 5), False = padding


def prepare(x: np.ndarray, t: np.ndarray, digit: np.ndarray) -> Inputs:
    angles = t[:, None] * np.pi * np.arange(1, 17, dtype=np.float32)
    waves = np.concatenate((np.cos(angles), np.sin(angles)), -1, dtype=np.float32)
    return Inputs(x, waves, digit, LETTERS[digit], IS_LETTER[digit])


def patches(images: np.ndarray) -> np.ndarray:
    """(B, 8, 8) pixels from 0 to 16 -> (B, 16, 4) from -1 to 1."""
    return (images / 8 - 1).astype(np.float32).reshape(-1, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 16, 4)


def pixels(x: np.ndarray) -> np.ndarray:
    """Inverse of `patches`, clipped."""
    return (x.reshape(-1, 4, 4, 2, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 8, 8).clip(-1, 1) + 1) * 8


class Batch(NamedTuple):
    inputs: Inputs
    velocity: np.ndarray  # (B, 16, 4), what the generator should answer


def batches(images: np.ndarray, digits: np.ndarray, seed: int) -> Iterator[Batch]:
    """Without end, and the same for both frameworks."""
    rng, x = np.random.default_rng(seed), patches(images)
    while True:
        i = rng.integers(len(x), size=BATCH)
        digit = np.where(rng.random(BATCH) < UNCONDITIONAL, ANY, digits[i])
        t = rng.random(BATCH, dtype=np.float32)
        noise = rng.standard_normal((BATCH, 16, 4), dtype=np.float32)
        velocity = x[i] - noise
        yield Batch(prepare(noise + t[:, None, None] * velocity, t, digit), velocity)


# The generator: one formula, and its layers in each framework under the same names.


def generator(m, x, time, digit, letters, is_letter):
    """Inputs -> velocity (B, 16, 4); m holds the layers."""
    y = m.time(time) + m.digit[digit]
    out = m.stack(m.patch_in(x) + m.place[...], y[:, None], context=m.letter[letters], context_mask=is_letter)
    return m.patch_out(out.x_out)


class TorchGenerator(torch.nn.Module):
    def __init__(self, depth: int):
        super().__init__()
        linear, table = torch.nn.Linear, lambda n: torch.nn.Parameter(torch.randn(n, WIDTH))
        self.patch_in, self.time, self.patch_out = linear(4, WIDTH), linear(32, WIDTH), linear(WIDTH, 4)
        self.place, self.digit, self.letter = table(16), table(11), table(26)
        self.stack = TorchStack(depth, **STACK)

    forward = generator


class FlaxGenerator(nnx.Module):
    def __init__(self, depth: int, rngs: nnx.Rngs):
        linear, table = nnx.Linear, lambda n: nnx.Param(jax.random.normal(rngs.params(), (n, WIDTH)))
        self.patch_in, self.time, self.patch_out = (linear(*io, rngs=rngs) for io in ((4, WIDTH), (32, WIDTH), (WIDTH, 4)))
        self.place, self.digit, self.letter = table(16), table(11), table(26)
        self.stack = FlaxStack(depth, **STACK, rngs=rngs)

    __call__ = generator


# What is asked of each framework: training, and the velocity and the gradients of the loss as NumPy arrays.


def torch_tensors(m: TorchGenerator, arrays: tuple[np.ndarray, ...]) -> list[torch.Tensor]:
    """On m's device, floating-point ones in m's dtype."""
    tensors = (torch.as_tensor(a, device=m.place.device) for a in arrays)
    return [t.to(m.place.dtype) if t.is_floating_point() else t for t in tensors]


def torch_loss(m: TorchGenerator, batch: Batch) -> torch.Tensor:
    *inputs, velocity = torch_tensors(m, (*batch.inputs, batch.velocity))
    return (m(*inputs) - velocity).square().mean()


def torch_train(m: TorchGenerator, data: Iterator[Batch], steps: int) -> list[float]:
    optimizer = torch.optim.Adam(m.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    losses = []
    for _ in (bar := trange(steps, desc="training in PyTorch")):
        loss = torch_loss(m, next(data))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses


@torch.no_grad()
def torch_velocity(m: TorchGenerator, inputs: Inputs) -> np.ndarray:
    return m(*torch_tensors(m, inputs)).cpu().numpy()


def torch_gradients(m: TorchGenerator, batch: Batch) -> dict[str, np.ndarray]:
    """By parameter; zeros where the loss does not depend on it, which PyTorch otherwise reports as None."""
    names, params = zip(*m.named_parameters(), strict=True)
    grads = torch.autograd.grad(torch_loss(m, batch), params, allow_unused=True, materialize_grads=True)
    return {name: g.cpu().numpy() for name, g in zip(names, grads, strict=True)}


def flax_loss(m: FlaxGenerator, batch: Batch) -> jax.Array:
    return ((m(*batch.inputs) - batch.velocity) ** 2).mean()


@nnx.jit
def flax_step(m: FlaxGenerator, optimizer: nnx.Optimizer, batch: Batch) -> jax.Array:
    loss, grads = nnx.value_and_grad(flax_loss)(m, batch)
    optimizer.update(m, grads)
    return loss


def flax_train(m: FlaxGenerator, data: Iterator[Batch], steps: int) -> list[float]:
    optimizer = nnx.Optimizer(m, optax.adam(lambda step: LEARNING_RATE * (1 - step / steps)), wrt=nnx.Param)
    losses = []
    for _ in (bar := trange(steps, desc="training in Flax")):
        losses.append(flax_step(m, optimizer, next(data)).item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses


flax_forward = nnx.jit(FlaxGenerator.__call__)
flax_grad = nnx.jit(nnx.grad(flax_loss))


def flax_velocity(m: FlaxGenerator, inputs: Inputs) -> np.ndarray:
    return np.asarray(flax_forward(m, *inputs))


def flax_gradients(m: FlaxGenerator, batch: Batch) -> dict[str, np.ndarray]:
    """By the torch twin's parameter: gradients put in the weights' place are read out, and turned, as weights are."""
    grads = mmattn_jax.to_torch(nnx.merge(nnx.graphdef(m), flax_grad(m, batch)))
    return {name: g.numpy() for name, g in grads.items()}


# Sampling and comparing, in NumPy.


def sample(velocity: Callable[[Inputs], np.ndarray], noise: np.ndarray, digit: np.ndarray) -> np.ndarray:
    """Euler's method along free + GUIDANCE * (given - free), the velocities without and with the digit."""
    x = noise
    digits = np.concatenate((digit, np.full_like(digit, ANY)))
    for t in np.linspace(0, 1, EULER_STEPS, endpoint=False, dtype=np.float32):
        given, free = np.split(velocity(prepare(np.concatenate((x, x)), np.full(len(digits), t), digits)), 2)
        x = x + (free + GUIDANCE * (given - free)) / EULER_STEPS
    return x


class Parity(NamedTuple):
    """How far every two of the results are apart, relative to the last one's, float64."""

    exact: dict[str, np.ndarray]
    pairs: list[tuple[str, str]]
    distances: np.ndarray  # (names of exact, pairs)

    def table(self, rows: int) -> str:
        """The rows that differ most."""
        width = max(map(len, self.exact))
        lines = [" ".join((f"{'relative difference':{width}}", *(f"{f'{a} - {b}':>18}" for a, b in self.pairs)))]
        worst = set(np.argsort(np.nan_to_num(self.distances, nan=np.inf).max(1))[-rows:])
        for i, (name, values) in enumerate(self.exact.items()):
            if i in worst:
                note = "" if values.any() else "  exactly 0: the loss does not depend on it"
                lines.append(" ".join((f"{name:{width}}", *(f"{d:18.1e}" for d in self.distances[i]))) + note)
        if rows < len(self.exact):
            lines.append(f"... and {len(self.exact) - rows} that differ less; --all prints them")
        return "\n".join(lines)


def parity(results: dict[str, dict[str, np.ndarray]]) -> Parity:
    *_, exact = results.values()
    pairs = list(combinations(results, 2))
    distances = [[distance(results[a][name], results[b][name], exact[name]) for a, b in pairs] for name in exact]
    return Parity(exact, pairs, np.array(distances))


def distance(a: np.ndarray, b: np.ndarray, scale: np.ndarray) -> float:
    """|a - b| / |scale|; where the scale is 0, both must be 0 exactly."""
    if scale.any():
        return np.linalg.norm(a - b) / np.linalg.norm(scale)
    return np.inf if a.any() or b.any() else 0.0


def picture(path: Path, grids: dict[str, np.ndarray], losses: list[float]) -> None:
    """Samples (100, 16, 4) by title, ten to a row, and the loss curve."""
    figure = Figure(figsize=(5 * (len(grids) + 1), 5), layout="constrained")
    *grid_axes, loss_axes = figure.subplots(1, len(grids) + 1)
    for axes, (title, x) in zip(grid_axes, grids.items(), strict=True):
        tiles = np.pad(pixels(x), ((0, 0), (1, 1), (1, 1)), constant_values=8).reshape(10, 10, 10, 10)
        axes.imshow(tiles.transpose(0, 2, 1, 3).reshape(100, 100), cmap="gray_r", vmin=0, vmax=16)
        axes.set_title(title)
        axes.set_axis_off()
    window = min(50, len(losses))
    mean = np.convolve(losses, np.full(window, 1 / window), "valid")
    loss_axes.plot(losses, color="0.8")
    loss_axes.plot(np.arange(window - 1, len(losses)), mean, color="black")
    loss_axes.set(title=f"loss, and its mean over {window} steps", xlabel="step", yscale="log")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def choose_device(device: str) -> None:
    """Set up JAX, and say which path is taken."""
    jax.config.update("jax_default_device", jax.devices(device)[0])
    jax.config.update("jax_default_matmul_precision", "float32")  # as in PyTorch; JAX's default on a GPU is tf32
    tokens = (BATCH, 16, WIDTH)
    explanations = {
        "PyTorch": mmattn_torch.explain("layer_norm", torch.empty(tokens, device="meta"), device=device),
        "Flax": mmattn_jax.explain("layer_norm", jax.ShapeDtypeStruct(tokens, "float32"), device=device),
    }
    for name, (path, reason) in explanations.items():
        print(f"{name} on {device}: implementation {path!r}, {reason}")


def whole(low: int, high: int) -> Callable[[str], int]:
    """An argument's type."""

    def parse(text: str) -> int:
        if text.strip().removeprefix("-").isdecimal() and low <= int(text) <= high:
            return int(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")

    return parse


def writable(text: str) -> Path:
    """The path of a picture that can be written, in a folder that exists from now on."""
    path = Path(text)
    if path.is_dir() or (path.exists() and not os.access(path, os.W_OK)):
        raise argparse.ArgumentTypeError(f"{path} is a folder, or a file that cannot be overwritten")
    if path.suffix.removeprefix(".") not in Figure().canvas.get_supported_filetypes():
        raise argparse.ArgumentTypeError(f"{path} does not end as a picture does; expected .png, .pdf or .svg, for example")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path} cannot be written: {error.strerror} ({error.filename})") from None
    return path


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """Whatever can be wrong with an argument is found here, before training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--framework", choices=("torch", "jax"), default="torch", help="where to train")
    parser.add_argument("--steps", type=whole(1, 1_000_000), default=800, help="training steps")
    parser.add_argument("--depth", type=whole(1, 100), default=4, help="blocks of the stack")
    parser.add_argument("--out", type=writable, default="out/digits.png", help="the picture to write")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where both frameworks see a GPU")
    parser.add_argument("--seed", type=whole(0, 2**31 - 2), default=0)
    parser.add_argument("--all", action="store_true", help="print all rows of the table of differences, not the worst alone")
    args = parser.parse_args(given)
    gpu = torch.cuda.is_available() and jax.default_backend() == "gpu"
    if args.device == "cuda" and not gpu:
        parser.error("--device cuda: PyTorch and JAX do not both see a GPU. Install their CUDA builds, or use --device cpu.")
    args.device = args.device or ("cuda" if gpu else "cpu")
    return args


def verdict(difference: float, read: dict[str, float]) -> tuple[bool, str]:
    """Whether all is as it should be, and a line that says so."""
    same, legible = difference <= PARITY_LIMIT, min(read.values()) >= READ_LIMIT
    shares = " and ".join(f"{share:.0%} ({name})" for name, share in read.items())
    text = (
        f"{'PASSED' if same and legible else 'FAILED'}: "
        f"the frameworks differ by at most {difference:.1e}, {'within' if same else 'beyond'} the limit of {PARITY_LIMIT:.0e}; "
        f"{shares} of the samples are read as asked for, {'at least' if legible else 'not'} {READ_LIMIT:.0%} of each"
    )
    return same and legible, text


def run(args: argparse.Namespace) -> bool:
    """Train, compare, and print; whether all is as it should be."""
    choose_device(args.device)
    real = load_digits()

    torch.manual_seed(args.seed)
    torch_model, flax_model = TorchGenerator(args.depth).to(args.device), FlaxGenerator(args.depth, nnx.Rngs(args.seed))
    data = batches(real.images, real.target, args.seed)
    if args.framework == "torch":
        losses = torch_train(torch_model, data, args.steps)
        mmattn_jax.from_torch(flax_model, torch_model.state_dict())
    else:
        losses = flax_train(flax_model, data, args.steps)
        torch_model.load_state_dict(mmattn_jax.to_torch(flax_model))

    batch, asked = next(data), np.tile(np.arange(10), 10)
    noise = np.random.default_rng(args.seed + 1).standard_normal((100, 16, 4), dtype=np.float32)

    def results(name: str, velocity, gradients) -> dict[str, np.ndarray]:
        print(f"samples and gradients of {name} ...", flush=True)
        outputs = dict(velocity=velocity(batch.inputs), samples=sample(velocity, noise, asked))
        return outputs | {f"d {name}": g for name, g in gradients(batch).items()}

    of = {
        "PyTorch": results("PyTorch", partial(torch_velocity, torch_model), partial(torch_gradients, torch_model)),
        "Flax": results("Flax", partial(flax_velocity, flax_model), partial(flax_gradients, flax_model)),
    }
    exact = deepcopy(torch_model).double()
    with mmattn_torch.implementation("reference"):
        of["float64"] = results("float64", partial(torch_velocity, exact), partial(torch_gradients, exact))
    differences = parity(of)

    flat = lambda images: images.reshape(-1, 64)
    seen, held_out, seen_digits, held_out_digits = train_test_split(flat(real.images), real.target, random_state=0)
    reader = SVC(gamma=0.001).fit(seen, seen_digits)
    samples = {name: of[name]["samples"] for name in ("PyTorch", "Flax")}
    read = {name: reader.score(flat(pixels(x)), asked) for name, x in samples.items()}
    picture(args.out, {f"{name}: {read[name]:.0%} read as asked for": x for name, x in samples.items()}, losses)

    passed, conclusion = verdict(differences.distances.max(), read)
    print(conclusion)
    print(differences.table(len(differences.exact) if args.all else WORST))
    print(f"classifier: reads {reader.score(held_out, held_out_digits):.1%} of {len(held_out)} real images it has not seen")
    print(f"wrote {args.out}")
    print(conclusion)
    return passed


def main(given: list[str] | None = None) -> int:
    args = arguments(given)
    try:
        return 0 if run(args) else 1
    except KeyboardInterrupt:
        print(f"stopped by Ctrl-C: there is no verdict, and {args.out} was not written", file=sys.stderr)
        return 130  # as shells have it


if __name__ == "__main__":
    sys.exit(main())
