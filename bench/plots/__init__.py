"""Plots of docs/benchmarks/: figures are measured, kept as JSON, and drawn from it."""
