"""Benchmarks, run by hand: each checks answers first, prints a table, then one JSON line."""
