"""Every test sees eight virtual CPU devices, so that sharding is tested on any machine, and code
that LLVM has not optimised, which compiles in half the time; commands run as subprocesses are
compiled as users have them. jax reads this when it is imported."""

import os

import pytest

QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {QUICK}".strip()
)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Tokens and programs of the runs that tests start, each made once."""
    return tmp_path_factory.mktemp("cache")
