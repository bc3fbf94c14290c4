"""Minimum-norm responses of an overparameterised least-squares problem.

E: 200 samples, 5,000 weights, a matrix of features with condition number 100. The
   response to the targets t is the solution of least norm, which is linear in them.

Ours takes it as the response Jacobian times t, with `Pseudoinverse` on a
`LeastSquaresProblem`, and as `best_response` with `Projection` from zero, each by a dense
factor and matrix-free. By hand there are the dual Cholesky factorisation, the QR
factorisation of the transpose, and `jnp.linalg.pinv`. The ratio is a contender's time
over that of the dual Cholesky; errors are relative to float64.
"""

import argparse

import _timing
import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsp_linalg
import numpy as np

import bilevel_eqx as blx


def dual_cholesky(features, targets):
    factor = jsp_linalg.cho_factor(features @ features.T)
    return jsp_linalg.cho_solve(factor, targets) @ features


def qr(features, targets):
    orthogonal, triangular = jnp.linalg.qr(features.T)
    return orthogonal @ jsp_linalg.solve_triangular(triangular, targets, trans="T")


def pinv(features, targets):
    return jnp.linalg.pinv(features) @ targets


class Regression(blx.AbstractLeastSquaresProblem):
    """Fits the targets x."""

    features: jax.Array

    def inner_residual(self, x, y):
        return self.features @ y - x

    def outer(self, x, y):
        return 0.5 * jnp.sum(y**2)


def by_jacobian(linear_solver):
    def response(features, targets):
        zeros = jnp.zeros(features.shape[1], features.dtype)
        jacobian = blx.response_jacobian(
            Regression(features), targets, zeros, linear_solver
        )
        return jacobian.mv(targets)

    return response


def by_projection(linear_solver):
    def response(features, targets):
        zeros = jnp.zeros(features.shape[1], features.dtype)
        projection = blx.Implicit(blx.Projection(linear_solver), linear_solver)
        return blx.best_response(Regression(features), targets, zeros, projection)

    return response


_DENSE = blx.Pseudoinverse()
_MATRIX_FREE = blx.Pseudoinverse(dense_size=1)

CONTENDERS = {
    "dual Cholesky": dual_cholesky,
    "QR": qr,
    "pinv": pinv,
    "response_jacobian, dense": by_jacobian(_DENSE),
    "response_jacobian, matrix-free": by_jacobian(_MATRIX_FREE),
    "best_response, dense": by_projection(_DENSE),
    "best_response, matrix-free": by_projection(_MATRIX_FREE),
}


def instance(num_samples: int, num_weights: int) -> tuple[jax.Array, jax.Array]:
    """The features, of condition number 100, and the targets."""
    rng = np.random.default_rng(0)
    left, _ = np.linalg.qr(rng.normal(size=(num_samples, num_samples)))
    right, _ = np.linalg.qr(rng.normal(size=(num_weights, num_samples)))
    values = np.geomspace(1, 1e-2, num_samples)
    features = jnp.asarray((left * values) @ right.T, jnp.float32)
    return features, jnp.asarray(rng.normal(size=num_samples), jnp.float32)


def exact_response(features, targets) -> np.ndarray:
    """In float64. The condition number of the dual matrix is harmless there."""
    features, targets = (np.asarray(u, np.float64) for u in (features, targets))
    return np.linalg.solve(features @ features.T, targets) @ features


def runners(features, targets):
    """The contenders, on one problem, as functions without arguments."""
    return {
        name: _timing.Jitted(contender, features, targets)
        for name, contender in CONTENDERS.items()
    }


def main(args: argparse.Namespace) -> None:
    num_samples, num_weights = (50, 500) if args.quick else (200, 5_000)
    features, targets = instance(num_samples, num_weights)
    exact = exact_response(features, targets)
    contenders = runners(features, targets)
    figures, responses = _timing.compare(contenders, args, "dual Cholesky")
    for name, row in figures.items():
        row["error"] = _timing.relative_difference(responses[name], exact)
    _timing.print_table(f"E, {num_samples} samples, {num_weights} weights", figures)
    _timing.write(args, figures)


if __name__ == "__main__":
    main(_timing.parse_arguments(__doc__, rounds=21))
