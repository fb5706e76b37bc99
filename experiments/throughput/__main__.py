"""`python -m experiments.throughput`: see `tables`."""

import tyro

from esper_jax.run import devices
from experiments.throughput import tables

# on a CPU a device per core, before the first use of a device
devices.use_cpus()
tyro.cli(tables.main, prog="python -m experiments.throughput")
