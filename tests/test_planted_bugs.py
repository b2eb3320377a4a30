"""The checker of test_ops finds bugs: each is planted in a copy of the package, whose kernels then run in place of ours."""

from __future__ import annotations

import shutil
from typing import NamedTuple

import frameworks
import pytest
from cases import CASES, WITHOUT_EPS

BY_NAME = {str(case): case for case in CASES + WITHOUT_EPS}


class Bug(NamedTuple):
    name: str
    case: str
    file: str
    right: str  # must be in the file, once
    wrong: str
    dtype: str = "bfloat16"


ADALN, ROWS, FUSED = "adaln/kernels.py", "rows.py", "gated_residual_norm_adaln.py"
ROPE, LINEAR = "qk_norm_rope.py", "linear_attention.py"
FORWARD, SHORT, BACKWARD, SINGLE, TOKENS = (
    f"attention/{name}.py" for name in ("forward", "short", "backward", "single_pass", "tokens")
)
BUGS = [
    Bug(
        "unbiased variance",
        "layernorm_adaln-37x48",
        ROWS,
        "tl.sum(products(x, x), 1)",
        "tl.sum(products(x, x), 1) * (WIDTH / (WIDTH - 1))",
    ),
    Bug("eps forgotten", "rmsnorm_adaln-at-zero", ROWS, "mean_square + EPS", "mean_square"),
    Bug("zeros by their root", "rms_norm-none", ROWS, "tl.where(total < 2.0**-120, 0.0, tl.rsqrt(total))", "tl.rsqrt(total)"),
    Bug("squares underflow", "rms_norm-none", ROWS, "tl.where(mean_square < TINY, LIFT, lift)", "lift"),
    Bug("mean term forgotten", "layernorm_adaln-bare", ROWS, "more -= (", "more -= 0.0 * ("),
    Bug("only a chunk's last block", "layernorm_adaln-scale-only-130x96", ADALN, "a = tl.fma(dy, n, a)", "a = dy * n"),
    Bug("last chunk dropped", "layer_norm-affine-130x128", ADALN, "(k < GROUP * LINES", "(k + 1 < GROUP * LINES"),
    Bug("every row's tokens", "layernorm_adaln-rows", ADALN, "LINES) == i % LINES", "LINES) >= 0"),
    Bug("one table for all", "layernorm_adaln-rows-of-samples", ADALN, "if TABLE else b) * LINES", "if TABLE else 0) * LINES"),
    Bug("base without weight", "rmsnorm_adaln-zero-centered", ADALN, "dscale_base = tl.fma(weight", "dscale_base = tl.fma(1.0"),
    Bug("dscale without bias", "layernorm_adaln-per-token-everything", ADALN, "affine(n, weight[None, :], bias[None, :])", "n"),
    Bug("gradient of r forgotten", "gated_residual_norm_adaln-37x48", FUSED, "gain[None, :], dr, ", "gain[None, :], 0.0 * dr, "),
    Bug(
        "post-norm's mean forgotten",
        "gated_residual_norm_adaln-post-norm",
        FUSED,
        "tl.sum(products(dh, u), 1)",
        "0 * tl.sum(dh, 1)",
    ),
    Bug("slope of tanh", "gated_residual_norm_adaln-lumina", FUSED, "dgate *= (", "dgate *= 1.0 + 0.0 * ("),
    Bug("gate forgotten", "gated_residual-37x48", "residual.py", "(gate[None, :] * dout)", "dout"),
    Bug("rotation not undone", "qk_norm_rope-seed", ROPE, "turn(dk_a, dk_b, c, -s)", "turn(dk_a, dk_b, c, s)"),
    Bug("start position dropped", "qk_norm_rope-seed", ROPE, "    if STARTED:\n", "    if False:\n"),
    Bug(
        "first half done twice",
        "joint_attention-over-the-gate-16",
        FORWARD,
        "first + part * SHIFTED_QUERIES, length",
        "first + 0 * part, length",
    ),
    Bug(
        "gate dropped",
        "joint_attention-over-the-gate",
        FORWARD,
        "if in_range(acc, sums, keep, keys, hidden, ",
        "if (keys > 0) | (",
    ),
    Bug("underflow accepted", "joint_attention-barely-under-the-gate", FORWARD, "(total >= least)", "(total >= 0.0)"),
    Bug("lost beside ones", "joint_attention-low-scores", FORWARD, " & (total * 256.0 >= hidden)", ""),
    Bug("masked keys counted", "joint_attention-scattered-key-masks-64", FORWARD, "- real * busy", "- end"),
    Bug("nothing repaired", "joint_attention-under-the-gate", SHORT, "tl.min(fine, 0) == 0", "blocks < 0"),
    Bug(
        "overflow accepted", "joint_attention-large-values", SHORT, 'tl.min((largest < float("inf"))', "tl.min((largest != -1.0)"
    ),
    Bug("first queries again", "joint_attention-key-masks", SHORT, "block + 1, q_ptrs", "0, q_ptrs"),
    Bug("tail counted", "joint_attention-key-masks", FORWARD, "- (tl.sum(real, 0) if KEY_MASKED else length)", "* 0"),
    Bug(
        "keys after a hole dropped",
        "joint_attention-scattered-key-masks-causal",
        TOKENS,
        "last = tl.max(lasts, 0)",
        "last = lead",
    ),
    Bug(
        "queries after a hole dropped",
        "joint_attention-scattered-key-masks-64",
        BACKWARD,
        "tl.maximum(begin, plain), end * busy",
        "tl.maximum(begin, plain), plain",
    ),
    Bug("no rescaling", "joint_attention-over-the-gate", FORWARD, "accumulate(acc, decay, ", "accumulate(acc, 1.0, "),
    Bug("key mask dropped", "joint_attention-one-key-mask", TOKENS, "inside &= tl.load(key_mask_ptr", "tl.load(key_mask_ptr"),
    Bug("last columns dropped", "joint_attention-width-88-causal", TOKENS, "tl.static_range(1, len(x))", "tl.static_range(0)"),
    Bug("causal by one", "joint_attention-causal", TOKENS, "(query >= key)", "(query > key)"),
    Bug("any() of the other axis", "joint_attention-mask", TOKENS, "tl.load(rows_ptr + batch", "tl.load(cols_ptr + batch"),
    Bug("lse's gradient dropped", "joint_attention-everything", BACKWARD, "delta -= tl.load(", "tl.load("),
    Bug("lse's gradient dropped", "joint_attention-lse", SINGLE, "delta -= dlse[b]", "delta -= 0.0 * dlse[b]"),
    Bug("delta dropped", "joint_attention-seed", SINGLE, "tl.where(empty, 0.0, -delta)", "delta * 0.0"),
    Bug("a head each", "joint_attention-seed", SINGLE, "SAMPLES[0] * HEADS, tl", "tl.num_programs(0), tl"),
    Bug("one dq for all", "joint_attention-seed", SINGLE, "dq[len(stored)]", "dq[0]"),
    Bug("a key too many", "joint_attention-key-masks", SINGLE, "tl.where(real[:, None], dv, 0.0)", "dv"),
    Bug("operands truncated", "relu_linear_attention-130-width-64", "dots.py", 'PRECISION == "tf32" and', "False and", "tf32"),
    Bug("relu's slope forgotten", "relu_linear_attention-37-5", LINEAR, "keep[:, None] & (k > 0)", "keep[:, None]"),
]


@pytest.mark.skipif(frameworks.GPU, reason="the copies run in the interpreter")
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_bug_is_found(bug, kernels, tmp_path):
    import interpreted

    shutil.copytree(interpreted.HOME / "mmattn", tmp_path / "mmattn")
    file = tmp_path / "mmattn" / bug.file
    text = file.read_text()
    assert text.count(bug.right) == 1, f"{bug.file} has changed: name the text that the bug replaces anew"
    file.write_text(text.replace(bug.right, bug.wrong))
    case, framework = BY_NAME[bug.case], frameworks.framework_of(frameworks.INSTALLED[0])
    with interpreted.package(tmp_path):
        result = frameworks.call(framework, case, bug.dtype)
    with pytest.raises(AssertionError, match="budget"):
        frameworks.check(case, bug.dtype, result)
    frameworks.check(case, bug.dtype, frameworks.call(framework, case, bug.dtype))
