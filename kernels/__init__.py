"""fastdiff.kernels: the Triton implementations of fastdiff's operations (none yet: see README, "What works today")."""
