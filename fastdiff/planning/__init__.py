"""The host wing: what a run does, decided in float64 numpy and written as a table. Imports no torch."""
