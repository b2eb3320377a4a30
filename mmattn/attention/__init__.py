"""Joint attention of several token streams: every stream's queries attend to the keys of all streams.

    o_s = softmax(scale * q_s [k_0, k_1, ...]^T + mask) [v_0, v_1, ...]        lse_s = log sum exp of the same scores
The streams stay in their own buffers: a program loops over one stream's keys after the other. Scores, softmax and sums
are float32, in base 2 (base e for float32 inputs in IEEE precision, see `power`); P is rounded to v's dtype for the tensor
cores.  Dao 2023, arXiv:2307.08691 (FlashAttention-2);
joint attention of MMDiT: Esser et al. 2024, arXiv:2403.03206.

Masks. A key mask (B, L_s) silences a token both ways. The (B, L, L) mask belongs to the first stream; for a pair with
another stream the row's or the column's any() stands in:  x_i -> c: any_j m[i, j];  c -> x_j: any_i m[i, j];  c -> c: True.
A row without any key has output 0, lse -inf and gradient 0.

Backward, with P = exp(S - lse) and delta = sum(o * do) - dlse per row:
    dv = P^T do    dS = P * (do v^T - delta)    dq = scale * dS k    dk = scale * dS^T q
One kernel walks queries for each block of keys (dk, dv), one walks keys for each block of queries (dq); for short sequences
in bfloat16 one program does all of a head (`single_pass`). No sum is in an order that could change. Short forwards of narrow
heads have a kernel of their own (`short`), and on Hopper long ones from width 32 on (`hopper`), long backwards
(`hopper_backward`), and short ones of width 16 (`hopper_short_backward`).
Saved for the backward: q, k, v, o and lse, 4 bytes per token and head (8 in IEEE precision), and the two any() vectors of the
mask.
"""

from .fused import qk_norm_rope_attention, qk_norm_rope_attention_op
from .joint import joint_attention, joint_attention_op

__all__ = ["joint_attention", "joint_attention_op", "qk_norm_rope_attention", "qk_norm_rope_attention_op"]
