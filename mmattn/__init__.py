"""Kernels and operations of multi-modal attention, free of any array framework."""

from .adaln import adaln, layer_norm, layernorm_adaln, rms_norm, rmsnorm_adaln
from .op import Row
from .residual import gated_residual, gated_residual_op

__version__ = "0.1.0"
OPS = (adaln, gated_residual_op)
