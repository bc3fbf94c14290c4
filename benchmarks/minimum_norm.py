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

_CONTENDERS = {
    "dual Cholesky": dual_cholesky,
    "QR": qr,
    "pinv": pinv,
    "response_jacobian, dense": by_jacobian(_DENSE),
    "response_jacobian, matrix-free": by_jacobian(_MATRIX_FREE),
    "best_response, dense": by_projection(_DENSE),
    "best_response, matrix-free": by_projection(_MATRIX_FREE),
}


def main(args: argparse.Namespace) -> None:
    num_samples, num_weights = (50, 500) if args.quick else (200, 5_000)
    rng = np.random.default_rng(0)
    left, _ = np.linalg.qr(rng.normal(size=(num_samples, num_samples)))
    right, _ = np.linalg.qr(rng.normal(size=(num_weights, num_samples)))
    values = np.geomspace(1, 1e-2, num_samples)
    features = jnp.asarray((left * values) @ right.T, jnp.float32)
    targets = jnp.asarray(rng.normal(size=num_samples), jnp.float32)
    exact = np.linalg.lstsq(
        np.asarray(features, np.float64), np.asarray(targets, np.float64)
    )[0]

    def runner(contender):
        compiled = jax.jit(contender)
        return lambda: compiled(features, targets)

    runners = {name: runner(contender) for name, contender in _CONTENDERS.items()}
    figures, responses = _timing.compare(runners, args, "dual Cholesky")
    for name, row in figures.items():
        row["error"] = _timing.relative_difference(
            np.asarray(responses[name], np.float64), exact
        )
    _timing.print_table(f"E, {num_samples} samples, {num_weights} weights", figures)
    _timing.write(args, figures)


if __name__ == "__main__":
    main(_timing.parse_arguments(__doc__, rounds=21))
