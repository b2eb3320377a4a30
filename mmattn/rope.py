"""The table of rotary angles, one for both frameworks.

Position p turns pair i of a head of width d by p * theta^(-2i / d).  RoFormer: Su et al. 2021, arXiv:2104.09864.
"""

from functools import lru_cache

import numpy as np


@lru_cache(maxsize=8)  # the layers of a model share one; a long one has megabytes
def table(positions: int, width: int, theta: float = 1e4) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin (positions, width / 2) of every angle; frequencies and angles in float32, as in the seed."""
    frequencies = np.float32(1) / np.float32(theta) ** (np.arange(0, width, 2, dtype=np.float32) / np.float32(width))
    angles = np.outer(np.arange(positions, dtype=np.float32), frequencies)
    tables = np.cos(angles), np.sin(angles)
    for t in tables:
        t.setflags(write=False)  # every caller gets these very arrays
    return tables
