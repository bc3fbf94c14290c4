import equinox.internal as eqxi
import jax
import pytest


jax.config.update("jax_enable_x64", True)
# Whatever happens to work through an implicit promotion would not in strict user code.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "error")


@pytest.fixture
def getkey():
    # A fixed seed: a test that fails should fail again.
    return eqxi.GetKey(seed=5678)
