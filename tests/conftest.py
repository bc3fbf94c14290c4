import equinox.internal as eqxi
import jax
import pytest


jax.config.update("jax_enable_x64", True)
# Whatever happens to work through an implicit promotion would not in strict user code.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "error")


@pytest.fixture(autouse=True, scope="module")
def no_more_programs_than_needed():
    # Every compiled program maps memory, and a process may have only so many mappings:
    # beyond them the compiler crashes.
    yield
    jax.clear_caches()


@pytest.fixture
def getkey():
    # A fixed seed: a test that fails should fail again.
    return eqxi.GetKey(seed=5678)
