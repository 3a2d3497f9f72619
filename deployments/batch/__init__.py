"""Offline batches: `ray job submit -- python -m deployments.batch --model … --input … --output …`.

The input is cut into parts of consecutive rows. Ray Data hands the parts to a pool of replicas, and
a replica reads, answers and writes a part. As a part's file appears in the output, whole, under a
name that depends on its place in the input alone, a killed job that is run again knows what is left
from the names in the output: each row is answered exactly once.
"""
