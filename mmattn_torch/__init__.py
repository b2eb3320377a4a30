"""Multi-modal attention for PyTorch: operations and modules over the kernels of mmattn."""

from mmattn import __version__

from . import nn
from ._choice import implementation, set_implementation
from .nn import AttentionOutput, GPT2Block, GPT2Stack, RMSNormSelfAttention, RMSNormSelfCrossAttention
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
from .weights import load_safetensors, save_safetensors

__all__ = [
    "AttentionOutput",
    "GPT2Block",
    "GPT2Stack",
    "RMSNormSelfAttention",
    "RMSNormSelfCrossAttention",
    "__version__",
    "explain",
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
]
