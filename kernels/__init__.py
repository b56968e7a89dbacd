"""fastdiff.kernels: the Triton implementations of fastdiff's operations, for float32 states on a GPU, and of a layer of networks.

The functions have the names and signatures of fastdiff.execution.reference, which says what they mean; the results are the
same bits. `group_norm` is that of fastdiff.execution.fused, to float32's rounding. Coefficients, counters and seeds are read from
device memory and nothing is read back, so that every call can be captured in a CUDA graph. Imports torch, triton and itself only.
"""

from .embedding import timestep_embedding
from .fill import normal, perturb, rademacher
from .group_norm import fits as group_norm_fits
from .group_norm import group_norm, prepare_group_norm
from .langevin import measure_langevin
from .step import prepare_step, step
from .sums import dsm_loss, dsm_loss_backward, probe_dot, rk_error

# The step after a measurement draws the same noise again, which costs less than to read it from memory.
KEEPS_NOISE = False

__all__ = [
    "KEEPS_NOISE",
    "dsm_loss",
    "dsm_loss_backward",
    "group_norm",
    "group_norm_fits",
    "measure_langevin",
    "normal",
    "perturb",
    "prepare_group_norm",
    "prepare_step",
    "probe_dot",
    "rademacher",
    "rk_error",
    "step",
    "timestep_embedding",
]
