"""The demo around its training: what it refuses at once, how it stops, and what it says of the result."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

for needed in ("torch", "optax", "sklearn", "matplotlib", "tqdm"):
    pytest.importorskip(needed)

jax = pytest.importorskip("jax")
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
digits = pytest.importorskip("digits")


@pytest.fixture(autouse=True)
def no_training(monkeypatch, tmp_path):
    """Nothing is trained and compared unless a test says so, and JAX's settings are put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(digits, "torch_train", lambda model, data, steps: [1.0] * steps)
    before = {name: getattr(jax.config, name) for name in ("jax_default_device", "jax_default_matmul_precision")}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


WRONG = {
    "--seed -1": "argument --seed: '-1' is not a whole number from 0",
    "--seed 4294967296": "argument --seed: '4294967296' is not a whole number",
    "--steps 0": "argument --steps: '0' is not a whole number from 1",
    "--steps 1e3": "argument --steps: '1e3' is not a whole number",
    "--depth 0": "argument --depth: '0' is not a whole number from 1",
    "--device tpu": "argument --device: invalid choice: 'tpu'",
    "--out file/child/digits.png": "argument --out: file/child/digits.png cannot be written: Not a directory",
    "--out .": "argument --out: . is a folder",
    "--out digits.doc": "argument --out: digits.doc does not end as a picture does",
    "--out /proc/digits/digits.png": "argument --out: /proc/digits/digits.png cannot be written",
}


@pytest.mark.parametrize("given", WRONG)
def test_arguments_are_looked_at_first(given, capsys):
    Path("file").touch()
    with pytest.raises(SystemExit) as stopped:
        digits.main(given.split())
    assert stopped.value.code == 2
    assert f"error: {WRONG[given]}" in capsys.readouterr().err


def test_a_device_that_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(digits.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        digits.main(["--device", "cuda"])
    assert "do not both see a GPU" in capsys.readouterr().err


def test_folders_are_made_and_left_empty():
    assert digits.arguments(["--out", "a/b/digits.png"]).out == Path("a/b/digits.png")
    assert list(Path("a/b").iterdir()) == []


def test_interrupted_training(capsys, monkeypatch):
    """In the middle of a loop over batches."""

    def train(model, data, steps):
        next(data)
        raise KeyboardInterrupt

    monkeypatch.setattr(digits, "torch_train", train)
    assert digits.main(["--depth", "1", "--device", "cpu"]) == 130
    assert capsys.readouterr().err.endswith("stopped by Ctrl-C: there is no verdict, and out/digits.png was not written\n")
    assert not Path("out/digits.png").exists()


def differing(by: float) -> digits.Parity:
    exact = {f"d weight {i}": np.ones(3) for i in range(30)} | {"d unused": np.zeros(3)}
    other = {name: x + by * i for i, (name, x) in enumerate(exact.items()) if x.any()} | {"d unused": np.zeros(3)}
    return digits.parity({"PyTorch": other, "Flax": exact, "float64": exact})


def test_the_table_is_short_and_has_the_worst_rows():
    table = differing(1e-6).table(3).splitlines()
    assert [line.split()[2] for line in table[1:-1]] == ["27", "28", "29"]
    assert table[-1] == "... and 28 that differ less; --all prints them"
    whole = differing(1e-6).table(31).splitlines()
    assert len(whole) == 1 + 31
    assert whole[-1].endswith("exactly 0: the loss does not depend on it")


def test_what_is_not_a_number_is_worst():
    parity = differing(np.nan)
    assert "nan" in parity.table(1)
    passed, text = digits.verdict(parity.distances.max(), dict(PyTorch=1.0, Flax=1.0))
    assert not passed and "beyond the limit" in text


@pytest.mark.parametrize(
    ("difference", "share", "words"),
    [
        (
            1e-6,
            0.95,
            "PASSED: the frameworks differ by at most 1.0e-06, within the limit of 1e-04; 100% (PyTorch) and 95% (Flax)",
        ),
        (1e-3, 0.95, "FAILED: the frameworks differ by at most 1.0e-03, beyond the limit of 1e-04"),
        (1e-6, 0.5, "FAILED: the frameworks differ by at most 1.0e-06, within the limit of 1e-04; 100% (PyTorch) and 50% (Flax)"),
    ],
)
def test_verdict(difference, share, words):
    passed, text = digits.verdict(difference, dict(PyTorch=1.0, Flax=share))
    assert passed == words.startswith("PASSED")
    assert text.startswith(words)


def test_the_verdict_comes_first_and_last(capsys):
    """The whole of it with a generator that nobody has trained: both frameworks agree, and nothing can be read."""
    assert digits.main(["--depth", "1", "--steps", "2", "--device", "cpu"]) == 1
    lines = capsys.readouterr().out.splitlines()
    at = [i for i, line in enumerate(lines) if line.startswith("FAILED: the frameworks differ by at most")]
    assert len(at) == 2 and at[1] == len(lines) - 1
    assert lines[at[0] + 1].startswith("relative difference")
    assert "within the limit" in lines[-1] and "not 90% of each" in lines[-1]
    assert at[1] - at[0] == 1 + 1 + digits.WORST + 1 + 2
    assert Path("out/digits.png").stat().st_size > 1000
