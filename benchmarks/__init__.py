"""Measurements, each a script: `python -m benchmarks.NAME --help`. Ratios, not absolute times."""
