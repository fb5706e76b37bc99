"""Four CPU devices for every test, before anything touches a device."""

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)

# What these test is rounding's business no more than other tests', and they compile a lot.
UNOPTIMISED = ("test_model", "test_network_parity")


@pytest.fixture(autouse=True)
def optimisation(request):
    """Compiles the tests of some files without most optimisations, in three quarters of the time."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", before or request.module.__name__ in UNOPTIMISED)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
