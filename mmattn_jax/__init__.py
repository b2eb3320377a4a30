"""Multi-modal attention for JAX and Flax: operations and modules over the kernels of mmattn."""

from mmattn import Row, __version__
from mmattn.op import Target

from . import nn
from ._bind import CHECKPOINT_NAMES, set_target
from ._choice import implementation, set_implementation
from ._jax_triton import EXPORT_CHECKS
from .convert import from_torch, load_safetensors, save_safetensors, to_torch
from .ops import (
    explain,
    gated_residual,
    gated_residual_norm_adaln,
    joint_attention,
    layer_norm,
    layernorm_adaln,
    qk_norm_rope,
    qk_norm_rope_attention,
    relu_linear_attention,
    rms_norm,
    rmsnorm_adaln,
)

__all__ = [
    "CHECKPOINT_NAMES",
    "EXPORT_CHECKS",
    "Row",
    "Target",
    "__version__",
    "explain",
    "from_torch",
    "gated_residual",
    "gated_residual_norm_adaln",
    "implementation",
    "joint_attention",
    "layer_norm",
    "layernorm_adaln",
    "load_safetensors",
    "nn",
    "qk_norm_rope",
    "qk_norm_rope_attention",
    "relu_linear_attention",
    "rms_norm",
    "rmsnorm_adaln",
    "save_safetensors",
    "set_implementation",
    "set_target",
    "to_torch",
]
