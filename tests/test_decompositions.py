"""Decompositions under vmap: the same numbers, and none that waits for another."""

import jax
import numpy as np
import pytest

from bilevel_eqx._linalg import decompositions as _decompositions


_symmetric = np.random.default_rng(0).normal(size=(7, 5, 5))
_symmetric = _symmetric + np.swapaxes(_symmetric, 1, 2)
_numpy = {"inv": np.linalg.inv, "eigvalsh": np.linalg.eigvalsh}
_products = {
    "eigh": lambda out: np.einsum("kij,kj,klj->kil", out[1], out[0], out[1]),
    "svd": lambda out: np.einsum("kij,kj,kjl->kil", *out),
    "qr": lambda out: np.einsum("kij,kjl->kil", *out),
}


@pytest.mark.parametrize("name", [*_numpy, *_products])
def test_one_by_one(name):
    batched = jax.jit(jax.vmap(getattr(_decompositions, name)))
    out = jax.tree.map(np.asarray, batched(_symmetric))
    if name in _numpy:
        assert np.allclose(out, _numpy[name](_symmetric), atol=1e-12)
    else:
        assert np.allclose(_products[name](out), _symmetric, atol=1e-12)
    if jax.default_backend() == "cpu":
        # What jaxlib is given is one matrix, and not seven: see the module.
        program = batched.lower(_symmetric).as_text()
        calls = [line for line in program.splitlines() if "@lapack" in line]
        assert calls and all("7x5" not in line for line in calls)
