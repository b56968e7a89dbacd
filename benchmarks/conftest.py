"""One thread: the states are small, and ratios of one-thread times are steady on a busy machine."""

import torch

torch.set_num_threads(1)
