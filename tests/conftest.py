import gc
import os
import signal

import equinox.internal as eqxi
import jax
import jaxlib
import pytest


# JAX decomposes matrices by SciPy's OpenBLAS, whose threads wait for each other in loops
# that keep the processors busy. With as many threads as processors and two tests at a
# time, a decomposition took up to ten times as long.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Nearly all of the time of the tests goes into compiling programs that run once, for
# milliseconds. These two halve it: XLA's older code generator for fused loops, and no
# splitting of a program into 32 parts to compile in parallel, since pytest-xdist keeps
# the processors busy. The optimisation levels are those that users have, and so the
# numbers are theirs, but for the last bits of a few sums and exponentials. (Lower levels
# change most of the numbers, and a persistent cache costs more than it saves: programs
# with callbacks, as all that can raise, are not kept in it.) XLA refuses flags that it
# does not know, so this is for the versions that were tried. What is in XLA_FLAGS already
# has the last word.
if jaxlib.__version__.startswith("0.10."):
    flags = (
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1",
        os.environ.get("XLA_FLAGS", ""),
    )
    os.environ["XLA_FLAGS"] = " ".join(flags).strip()

# Tracing makes many small objects that live on, and looking through them for garbage at
# Python's own rate is a twentieth of the time.
gc.set_threshold(100_000, 50, 100)

jax.config.update("jax_enable_x64", True)
# Whatever happens to work through an implicit promotion would not in strict user code.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "error")
    # A shell has what it runs in the background ignore Ctrl-C. Some tests press it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="module")
def no_more_programs_than_needed():
    # Every compiled program maps memory, and a process may have only so many mappings:
    # beyond them the compiler crashes.
    yield
    jax.clear_caches()
    gc.collect()


def _settings():
    environment = {k: v for k, v in os.environ.items() if k.startswith(("JAX", "XLA"))}
    return {**jax.config.values, **environment}


@pytest.fixture(autouse=True, scope="module")
def settings_as_they_were():
    # Modules that run afterwards in the same process would compile other programs, and
    # others than the processes that they start.
    before = _settings()
    yield
    assert _settings() == before


@pytest.fixture
def getkey():
    # A fixed seed: a test that fails should fail again.
    return eqxi.GetKey(seed=5678)
