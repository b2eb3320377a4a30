"""Kernels and operations of multi-modal attention, free of any array framework."""

from .adaln import adaln, layer_norm, layernorm_adaln, rms_norm, rmsnorm_adaln
from .attention import joint_attention, joint_attention_op, qk_norm_rope_attention, qk_norm_rope_attention_op
from .gated_residual_norm_adaln import gated_residual_norm_adaln, gated_residual_norm_adaln_op
from .linear_attention import relu_linear_attention, relu_linear_attention_op
from .op import Row
from .qk_norm_rope import qk_norm_rope, qk_norm_rope_op
from .residual import gated_residual, gated_residual_op

__version__ = "0.1.0"
OPS = (
    adaln,
    gated_residual_op,
    gated_residual_norm_adaln_op,
    qk_norm_rope_op,
    joint_attention_op,
    qk_norm_rope_attention_op,
    relu_linear_attention_op,
)

__all__ = [
    "OPS",
    "Row",
    "gated_residual",
    "gated_residual_norm_adaln",
    "joint_attention",
    "layer_norm",
    "layernorm_adaln",
    "qk_norm_rope",
    "qk_norm_rope_attention",
    "relu_linear_attention",
    "rms_norm",
    "rmsnorm_adaln",
]
