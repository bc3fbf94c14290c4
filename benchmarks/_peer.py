"""Solvers of benchmark_bilevel (https://github.com/benchopt/benchmark_bilevel), from a
checkout of it, to be timed beside ours. Nothing of it is part of this repository.
"""

import contextlib
import importlib
import sys
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp


def load(checkout: Path, name: str) -> type:
    """The class of one of its solvers, such as "soba"."""
    try:
        importlib.import_module("benchopt")
    except ImportError:
        _stand_in_for_benchopt()
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    return importlib.import_module(f"solvers.{name}").Solver


def _stand_in_for_benchopt() -> None:
    """As much of benchopt as its solvers need to be defined. It does no timing here."""
    benchopt: Any = types.ModuleType("benchopt")
    criterion: Any = types.ModuleType("benchopt.stopping_criterion")
    benchopt.BaseSolver = type("BaseSolver", (), {"run_once": lambda self, _: None})
    benchopt.safe_import_context = contextlib.nullcontext
    criterion.SufficientProgressCriterion = lambda **settings: None
    sys.modules["benchopt"] = benchopt
    sys.modules["benchopt.stopping_criterion"] = criterion


def regression(checkout, name, problem, x, y, batch_size, num_steps):
    """Its solver on a logistic regression with an exp penalty a feature."""

    def objective(data, penalised):
        features, signs = map(jnp.asarray, data)

        # Slices and losses of a single sample, as in its `datasets/ijcnn1.py`.
        def mean(y, x, start=0, batch_size=1):
            rows, its_signs = _slices(start, batch_size, features, signs)

            def loss(row, sign):
                return -jax.nn.log_sigmoid(sign * jnp.dot(y, row))

            value = jnp.mean(jax.vmap(loss)(rows, its_signs))
            return value + jnp.dot(jnp.exp(x) * y, y) / 2 if penalised else value

        return mean

    objectives = objective(problem.inner_data, True), objective(problem.outer_data, False)
    return Steps(checkout, name, problem, objectives, x, y, batch_size, num_steps)


def cleaning(checkout, name, problem, x, y, batch_size, num_steps):
    """Its solver on the hyper-cleaning with softmax regression."""

    def objective(images, labels, penalised):
        images, labels = jnp.asarray(images), jax.nn.one_hot(labels, y.shape[-1])

        # As in its `datasets/mnist.py`, whose inner variables are flat.
        def mean(flat, x, start=0, batch_size=1):
            rows, its_labels = _slices(start, batch_size, images, labels)

            def loss(row, label):
                scores = row @ flat.reshape(y.shape)
                return jax.nn.logsumexp(scores) - jnp.sum(label * scores)

            losses = jax.vmap(loss)(rows, its_labels)
            if not penalised:
                return jnp.mean(losses)
            (weights,) = _slices(start, batch_size, x)
            return jnp.mean(jax.nn.sigmoid(weights) * losses) + 0.2 * jnp.sum(flat**2)

        return mean

    training, validation = problem.inner_data, problem.outer_data
    objectives = (
        objective(training[0], training[1], True),
        objective(validation[0], validation[1], False),
    )
    return Steps(checkout, name, problem, objectives, x, y, batch_size, num_steps)


def _slices(start, size, *arrays):
    return [jax.lax.dynamic_slice_in_dim(u, start, size) for u in arrays]


class Steps:
    """So many steps of one of its solvers. All are one compiled loop, as its own are
    between two evaluations.
    """

    def __init__(self, checkout, name, problem, objectives, x, y, batch_size, num_steps):
        solver = load(checkout, name)()
        self._solver, self._num_steps, self._shape = solver, num_steps, y.shape
        self._set_rates(0.1, 1.0)
        solver.batch_size, solver.random_state = batch_size, 1
        solver.eval_freq, solver.mode_init_memory = num_steps, "zero"
        solver.set_objective(
            *objectives,
            len(problem.inner_data[0]),
            len(problem.outer_data[0]),
            jnp.ravel(y),
            x,
        )

    def _set_rates(self, rate: float, ratio: float) -> None:
        self._solver.step_size, self._solver.outer_ratio = rate, ratio

    def __call__(self, rate: float, ratio: float, seed: int = 1) -> tuple[Any, Any]:
        """x and y, for a rate of y, its quotient with that of x, and the batches."""
        solver = self._solver
        self._set_rates(rate, ratio)
        start = solver.init()
        # SABA keeps its tables beside the rest, and its program writes over them.
        memory, carry = start if isinstance(start, tuple) else (None, start)
        keys = jax.random.split(jax.random.PRNGKey(seed))
        for level, key in zip(("inner", "outer"), keys):
            sampler = carry[f"state_{level}_sampler"]
            carry[f"state_{level}_sampler"] = {**sampler, "key": key}
        if memory is None:
            carry = solver.one_epoch(carry, self._num_steps)
        else:
            carry = solver.one_epoch(carry, memory, self._num_steps)[1]
        return carry["outer_var"], carry["inner_var"].reshape(self._shape)
