"""The tensor wing: runs a table on tensors. Knows no process and no sampler."""
