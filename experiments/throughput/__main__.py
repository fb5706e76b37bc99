"""`python -m experiments.throughput`: see `tables`."""

import os

import jax
import tyro

from experiments.throughput import tables

# on a CPU a device per core, before the first use of a device
jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
tyro.cli(tables.main, prog="python -m experiments.throughput")
