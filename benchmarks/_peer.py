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


def steps(checkout: Path, name: str, problem, x, y, rate, batch_size, num_steps):
    """So many steps of its solver on a logistic regression with an exp penalty a feature,
    as a function without arguments. All steps are one compiled loop, as its own are
    between two evaluations.
    """

    def objective(data, penalised):
        features, signs = map(jnp.asarray, data)

        # Slices and losses of a single sample, as in its `datasets/ijcnn1.py`.
        def mean(y, x, start=0, batch_size=1):
            rows = jax.lax.dynamic_slice_in_dim(features, start, batch_size)
            its_signs = jax.lax.dynamic_slice_in_dim(signs, start, batch_size)

            def loss(row, sign):
                return -jax.nn.log_sigmoid(sign * jnp.dot(y, row))

            value = jnp.mean(jax.vmap(loss)(rows, its_signs))
            return value + jnp.dot(jnp.exp(x) * y, y) / 2 if penalised else value

        return mean

    solver = load(checkout, name)()
    for key, value in {"step_size": rate, "outer_ratio": 1.0}.items():
        setattr(solver, key, value)
    solver.batch_size, solver.random_state, solver.eval_freq = batch_size, 1, num_steps
    solver.mode_init_memory = "zero"
    solver.set_objective(
        objective(problem.inner_data, True),
        objective(problem.outer_data, False),
        len(problem.inner_data[0]),
        len(problem.outer_data[0]),
        y,
        x,
    )

    def run():
        # SABA keeps its tables beside the rest, and its program writes over them.
        start = solver.init()
        if isinstance(start, tuple):
            memory, carry = start
            return solver.one_epoch(carry, memory, num_steps)[1]["inner_var"]
        return solver.one_epoch(start, num_steps)["inner_var"]

    return run
