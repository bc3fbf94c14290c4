"""A small GAN: one point is a Stackelberg and a proximal equilibrium, and no Nash one.

python examples/gan.py --output outputs
"""

import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
import scipy.linalg
from _gallery import main
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_iris

import bilevel_eqx as blx
from bilevel_eqx import plot


class GAN(blx.AbstractBilevelProblem):
    """A generator u = A z + b of points, with x = (A, b), and a discriminator y^T phi(u)
    on random Fourier features phi, which pays for its size."""

    data: jax.Array
    noise: jax.Array
    frequencies: jax.Array
    phases: jax.Array

    def generate(self, x):
        return self.noise @ x["A"] + x["b"]

    def features(self, points):
        waves = jnp.cos(points @ self.frequencies + self.phases)
        return jnp.sqrt(2 / self.phases.size) * waves

    def outer(self, x, y):
        real = jnp.mean(self.features(self.data), axis=0)
        made = jnp.mean(self.features(self.generate(x)), axis=0)
        return (real - made) @ y - 0.05 * jnp.sum(y**2)

    def inner(self, x, y):
        return -self.outer(x, y)


def run(quick):
    petals = np.asarray(load_iris(return_X_y=True)[0])[:, 2:]
    petals = jnp.asarray((petals - petals.mean(0)) / petals.std(0), "float32")
    keys, num_features = jr.split(jr.key(0), 3), 50
    problem = GAN(
        petals,
        jr.normal(keys[0], (200, 2)),
        jr.normal(keys[1], (2, num_features)),
        jr.uniform(keys[2], (num_features,), maxval=2 * jnp.pi),
    )
    x0, y0 = {"A": 0.5 * jnp.eye(2), "b": jnp.zeros(2)}, jnp.zeros(num_features)

    concepts = [blx.Stackelberg(), blx.ProximalEquilibrium(1.0), blx.Nash()]
    concepts = concepts[::2] if quick else concepts
    num_steps = 150 if quick else 400
    comparison = blx.compare(problem, x0, y0, concepts, num_steps=num_steps)
    print(comparison)
    solution = comparison.solutions["Stackelberg()"]

    def concave(weight):  # by how much the second order of a proximal one is violated
        certificate = blx.certify(
            problem, blx.ProximalEquilibrium(weight), solution.x, solution.y
        )
        return certificate.residuals["outer curvature"]

    weights = np.geomspace(0.1, 1e4, 51, dtype="float32")
    violations = np.asarray(jax.jit(jax.vmap(concave))(weights))
    spread = jnp.stack([s.value for s in comparison.solutions.values()])
    numbers = {
        f"{of}, as {kind}": comparison.certificates[of][kind].largest
        for of, kinds in comparison.certificates.items()
        for kind in kinds
    }
    numbers["F"] = solution.value
    numbers["F, largest less smallest"] = jnp.ptp(spread)
    numbers["a proximal equilibrium up to the weight"] = weights[violations < 1e-6].max()
    # In closed form: as long as F_xx + B^T B / (0.1 + weight) has no negative eigenvalue.
    flat, unravel = ravel_pytree(solution.x)
    F_xx = jax.jit(jax.hessian(lambda u: problem.outer(unravel(u), solution.y)))(flat)
    f_y = jax.grad(problem.inner, argnums=1)
    B = jax.jit(jax.jacobian(lambda u: f_y(unravel(u), solution.y)))(flat)
    worst = scipy.linalg.eigh(-F_xx, B.T @ B, eigvals_only=True)[-1]
    numbers["the same, in closed form"] = 1 / worst - 0.1
    points = {"data": petals, "made": problem.generate(solution.x)}
    return numbers | points | {"weights": weights, "violations": violations}


def check(results):
    for of in ("Stackelberg()", "Nash()"):
        assert results[f"{of}, as Stackelberg()"] < 1e-3
        assert results.get(f"{of}, as ProximalEquilibrium(1)", 0.0) < 1e-3
        assert results[f"{of}, as Nash()"] > 5e-3
    assert results["F, largest less smallest"] < 1e-3
    up_to = results["a proximal equilibrium up to the weight"]
    assert 0.7 < up_to / results["the same, in closed form"] < 1.05


def draw(results):
    figure, axes = plt.subplots(1, 2, figsize=(6, 2.4), layout="constrained")
    for (name, label), colour in zip(
        (("made", "generated"), ("data", "iris petals")), plot.CLASS_COLOURS[1:]
    ):
        axes[0].plot(*results[name].T, ".", ms=4, color=colour, label=label)
    axes[0].set(xlabel="length, standardised", ylabel="width, standardised")
    axes[0].legend()
    axes[1].plot(
        results["weights"], results["violations"], ".-", color=plot.CLASS_COLOURS[2]
    )
    axes[1].set(xscale="log", xlabel=r"weight $\lambda$", ylabel="violation")
    axes[1].axhline(results["Nash(), as Nash()"], ls=":", color="0.4", label="Nash")
    axes[1].legend(loc="center left")
    return figure


if __name__ == "__main__":
    main(__file__, __doc__, run, check, draw)
