import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from helpers import (
    dtypes,
    FunctionOfValue,
    LinearBilevel,
    LinearLeastSquares,
    make_linear,
    toy_a,
    tree_allclose,
)

import bilevel_eqx as blx


@pytest.mark.parametrize(
    "cls", (blx.AbstractBilevelProblem, blx.AbstractLeastSquaresProblem)
)
def test_abstract_problems_are_abstract(cls):
    with pytest.raises(TypeError, match="abstract"):
        cls()


def test_order_of_arguments():
    problem = toy_a()
    w, y = jnp.array(3.0), jnp.array([5.0, 7.0])
    # Each is another number if x and y, or outer and inner, change places.
    assert problem.outer(w, y) == 0.5 * (3 - 7) ** 2 + 0.5 * (5 - 1) ** 2
    assert problem.inner(w, y) == 0.5 * 5**2 - 3 * 5


def test_keyword_construction():
    problem = blx.BilevelProblem(
        inner=lambda x, y: jnp.sum(y), outer=lambda x, y: jnp.sum(x)
    )
    one, two = jnp.array([1.0]), jnp.array([2.0])
    assert problem.outer(one, two) == 1
    assert problem.inner(one, two) == 2


@pytest.mark.parametrize("dtype", dtypes)
def test_least_squares_objective(dtype):
    # Half the sum of squares, over all leaves, whatever their shapes.
    def inner_residual(x, y):
        return {"a": x * y, "b": (jnp.sum(y), y[None, :] - 1)}

    problem = blx.LeastSquaresProblem(lambda x, y: jnp.sum(x), inner_residual)
    x, y = jnp.array(2.0, dtype), jnp.array([1.0, 3.0], dtype)
    expected = 0.5 * (2**2 + 6**2 + 4**2 + 0**2 + 2**2)
    value = problem.inner(x, y)
    assert value == expected
    assert value.dtype == dtype
    assert problem.outer(x, y) == 2


@pytest.mark.parametrize("dtype", dtypes)
def test_the_linear_problems_agree(dtype):
    # The tests lean on these two being the same problem.
    structured, x, y = make_linear(LinearLeastSquares, dtype)
    plain, _, _ = make_linear(LinearBilevel, dtype)
    rtol = 1e-14 if dtype == jnp.float64 else 1e-6
    assert tree_allclose(structured.inner(x, y), plain.inner(x, y), rtol=rtol)
    assert tree_allclose(structured.outer(x, y), plain.outer(x, y), rtol=rtol)


def test_data_are_leaves():
    problem, x, y = make_linear(LinearLeastSquares, jnp.float64)
    assert len(jtu.tree_leaves(problem)) == 3
    doubled = jtu.tree_map(lambda leaf: 2 * leaf, problem)
    residual = 2 * problem.features @ y - x
    np.testing.assert_allclose(doubled.inner(x, y), 0.5 * jnp.sum(residual**2))


def test_modules_as_objectives():
    # The values in an objective that is a module are leaves of the problem.
    def inner(x, y):
        return jnp.sum((y - x) ** 2)

    problem = blx.BilevelProblem(
        outer=lambda x, y: jnp.sum(y),
        inner=FunctionOfValue(inner, jnp.array(3.0)),
    )
    arrays = eqx.filter(problem, eqx.is_array)
    assert tree_allclose(jtu.tree_leaves(arrays), [jnp.array(3.0)], rtol=0)
    assert problem.inner(jnp.array([1.0]), jnp.array([3.0])) == 12


def test_vmap_over_data():
    problem, x, y = make_linear(LinearLeastSquares, jnp.float64)
    scales = jnp.array([1.0, 2.0, 3.0])
    batched = eqx.tree_at(
        lambda p: p.features, problem, scales[:, None, None] * problem.features[None]
    )
    axes = eqx.tree_at(
        lambda p: p.features, jtu.tree_map(lambda _: None, problem), 0,
        is_leaf=lambda leaf: leaf is None,
    )  # fmt: skip

    def gradient(problem):
        # Of the response as well as of the objectives.
        response = blx.Implicit(None, blx.Pseudoinverse())
        return blx.hypergradient(problem, x, y, response).gradient

    out = eqx.filter_vmap(gradient, in_axes=(axes,))(batched)
    for i, scale in enumerate(scales):
        J = np.linalg.pinv(scale * problem.features)
        misfit = problem.outer_features @ y - problem.outer_targets
        expected = 0.5 * (x - 1) + J.T @ (problem.outer_features.T @ misfit)
        assert tree_allclose(out[i], expected, rtol=1e-10)


def test_problem_is_jittable():
    problem, x, y = make_linear(LinearLeastSquares, jnp.float64)
    jitted = eqx.filter_jit(lambda problem, x, y: problem.inner(x, y))
    np.testing.assert_allclose(jitted(problem, x, y), problem.inner(x, y), rtol=1e-14)
    leaves, treedef = jax.tree.flatten(problem)
    rebuilt = jax.tree.unflatten(treedef, leaves)
    assert rebuilt.inner(x, y) == problem.inner(x, y)
