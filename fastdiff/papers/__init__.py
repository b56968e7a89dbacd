"""The algorithms as their papers print them, for tests and benchmarks to compare with. Imports nothing of fastdiff."""
