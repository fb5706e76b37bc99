"""Four CPU devices for every test, before anything touches a device; two processes share the tests.

Most of the time goes into compiling. So whatever compiles the same programs runs in the same process, the longest files
come first, and programs are kept in `.pytest_cache` for the next time.
"""

import gc
import os
import pathlib
import resource

import jax
import pytest

from esper_jax.run import compilation

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)

# Compiling takes a third of the time without fusion emitters and most optimisations. jax 0.12 has no other way.
if jax.__version_info__ < (0, 11):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"
jax.config.update("jax_disable_most_optimizations", True)
TOGETHER = {  # files that share compiled programs
    **dict.fromkeys(
        (
            "test_train",
            "test_report",
            "test_records",
            "test_checkpoint",
            "test_compilation",
            "test_cifar",
            "test_estimate",
            "test_controls",
            "test_whatif",
            "test_scalars",
            "test_finished",
            "test_prices",
        ),
        "run",
    ),
    **dict.fromkeys(("test_environment", "test_observation"), "environment"),
}
FAST = (  # what `pytest -m fast` runs: nothing here compiles an environment or a host's training
    "test_config", "test_imports", "test_doctests", "test_readme", "test_cifar10", "test_datasets", "test_pipeline",
    "test_command", "test_console", "test_folder", "test_provenance", "test_devices", "test_alpha",
    "test_masks", "test_tracker", "test_attribution", "test_heuristic", "test_gae_parity", "test_statistics",
    "test_verdict",
)  # fmt: skip
LONG = ("run", "test_frozen", "environment", "test_ppo", "test_model", "test_throughput")


def pytest_configure(config):
    compilation.spare_the_collector()
    if not hasattr(config, "cache"):  # -p no:cacheprovider
        return
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("programs")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_compilation_cache_max_size", 2**30)


def group(nodeid: str) -> str:
    """The file of a test, or what its file belongs to."""
    name = pathlib.Path(nodeid.partition("::")[0]).stem
    return TOGETHER.get(name, name)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config, log):
    """A process takes whole groups. (`--dist loadgroup` of xdist 3.8 does not see its marks under pytest 9.2.)"""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return group(nodeid)

    return Groups(config, log)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.module.__name__ in FAST and "slow" not in item.keywords:
            item.add_marker("fast")
    items.sort(key=lambda item: LONG.index(group(item.nodeid)) if group(item.nodeid) in LONG else len(LONG))


def resident() -> float:
    """Gigabytes of this process; 0 where the system does not say."""
    try:
        return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**30
    except OSError:
        return 0


@pytest.fixture(autouse=True, scope="module")
def memory():
    """Gives back what the compiler freed, a gigabyte after a large program; forgets programs where there are many."""
    yield
    compilation.return_memory()
    if resident() > 3:
        jax.clear_caches()
        gc.collect()
        compilation.return_memory()
