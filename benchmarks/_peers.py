"""The hypergradients of A, B and C by other libraries, for those who have them.

Each is called as its own documentation shows, with the same number of products with the
inner Hessian, or of unrolled steps, as the code by hand. Where a library cannot be told
that number, its row says what it did instead. None is a dependency of the package: the
extra `peers` installs them.
"""

# pyright: reportMissingImports=false

import functools as ft
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import _timing
import jax
import jax.numpy as jnp


Make = Callable[..., Callable[[], Any]]


class Lazy:
    """A contender that is made by its first call, so that what is missing fails there."""

    def __init__(self, make: Callable[[], Callable[[], Any]]):
        self._make = make
        self._run: Callable[[], Any] | None = None

    def __call__(self) -> Any:
        if self._run is None:
            self._run = self._make()
        return self._run()


#
# A and B: conjugate gradients at a given inner solution. All return the gradient in x.
#


def _jaxopt_implicit(problem, x, y, num_steps):
    from jaxopt import implicit_diff, linear_solve

    def hypergradient(problem, x, y):
        outer_x, outer_y = jax.grad(problem.outer, argnums=(0, 1))(x, y)

        def optimality(y, x):
            return jax.grad(problem.inner, argnums=1)(x, y)

        # Tolerance zero: all steps are taken.
        solve = ft.partial(linear_solve.solve_cg, maxiter=num_steps, tol=0.0)
        (through,) = implicit_diff.root_vjp(optimality, y, (x,), outer_y, solve=solve)
        return jax.tree.map(jnp.add, outer_x, through)

    return _timing.Jitted(hypergradient, problem, x, y)


def _optimistix_implicit(problem, x, y, num_steps):
    import lineax as lx
    import optimistix as optx

    # It takes the adjoint only of a solve of its own. This one stops where it starts.
    solver = optx.GradientDescent(learning_rate=1e-12, rtol=1e12, atol=1e12)
    tags = frozenset({lx.positive_semidefinite_tag})
    adjoint = optx.ImplicitAdjoint(lx.CG(rtol=1e-3, atol=0.0))

    def hypergradient(problem, x, y):
        def value(x):
            def inner(y, x):
                return problem.inner(x, y)

            found = optx.minimise(
                inner, solver, y, x, adjoint=adjoint, throw=False, tags=tags
            )
            return problem.outer(x, found.value)

        return jax.grad(value)(x)

    return _timing.Jitted(hypergradient, problem, x, y)


def _torch_objectives(problem, x, y):
    import _torch

    outer, inner = _torch.objectives(problem)
    return outer, inner, _torch.tensors(x), _torch.tensors(y)


def _torch_implicit(problem, x, y, num_steps):
    import _torch

    return _torch.hypergradient(problem, x, y, num_steps)


def _torchopt_implicit(problem, x, y, num_steps):
    import _torch
    import torch
    import torchopt
    from torchopt.diff.implicit import custom_root

    outer, inner, x0, y0 = _torch_objectives(problem, x, y)
    solve = torchopt.linear_solve.solve_cg(maxiter=num_steps, rtol=0.0, atol=0.0)

    def optimality(y, x):
        return torch.func.grad(lambda y: inner(list(x), list(y)))(y)

    @custom_root(optimality, argnums=1, solve=solve)
    def answer(y, x):
        return y

    def run():
        x = tuple(_torch.variables(x0))
        y = tuple(_torch.variables(y0))
        return list(torch.autograd.grad(outer(list(x), list(answer(y, x))), x))

    return run


def _betty_implicit(problem, x, y, num_steps):
    import _torch
    import torch
    from betty.hypergradient.cg import cg

    outer, inner, x0, y0 = _torch_objectives(problem, x, y)

    def run():
        x = _torch.variables(x0)
        y = _torch.variables(y0)
        slopes = torch.autograd.grad(outer(x, y), [*x, *y], allow_unused=True)
        outer_x, outer_y = slopes[: len(x)], slopes[len(x) :]
        # What its engine would hand to its own rule, and no more.
        lower = SimpleNamespace(
            paths=(),
            config=SimpleNamespace(cg_iterations=num_steps, cg_alpha=1.0),
            cur_batch=None,
            training_step_exec=lambda batch: inner(x, y),
            parameters=lambda: y,
            trainable_parameters=lambda: y,
        )
        upper = SimpleNamespace(trainable_parameters=lambda: x)
        through = cg(outer_y, lower, upper)
        return [v if u is None else u + v for u, v in zip(outer_x, through)]

    return run


IMPLICIT: dict[str, Make] = {
    "jaxopt": _jaxopt_implicit,
    "optimistix, CG to 1e-3": _optimistix_implicit,
    "PyTorch": _torch_implicit,
    "TorchOpt": _torchopt_implicit,
    "Betty": _betty_implicit,
}


#
# C: through steps of gradient descent.
#


def _jaxopt_unrolled(problem, x, y, num_steps, step_size):
    import jaxopt

    def hypergradient(problem, x, y):
        def value(x):
            descent = jaxopt.GradientDescent(
                lambda y, x: problem.inner(x, y),
                maxiter=num_steps,
                tol=0.0,
                stepsize=step_size,
                acceleration=False,
                implicit_diff=False,
                unroll=True,
            )
            return problem.outer(x, descent.run(y, x).params)

        return jax.grad(value)(x)

    return _timing.Jitted(hypergradient, problem, x, y)


def _torch_unrolled(problem, x, y, num_steps, step_size):
    import _torch

    return _torch.unrolled(problem, x, y, num_steps, step_size)


def _module_of(y0):
    import torch

    class Weights(torch.nn.Module):
        """The inner variables, for libraries that want a module."""

        def __init__(self):
            super().__init__()
            leaves = [torch.nn.Parameter(u.detach().clone()) for u in y0]
            self.weights = torch.nn.ParameterList(leaves)

        def forward(self, loss):
            return loss(list(self.weights))

    return Weights()


def _torchopt_unrolled(problem, x, y, num_steps, step_size):
    import _torch
    import torch
    import torchopt

    outer, inner, x0, y0 = _torch_objectives(problem, x, y)

    def run():
        x = _torch.variables(x0)
        module = _module_of(y0)
        optimiser = torchopt.MetaSGD(module, lr=step_size)
        for _ in range(num_steps):
            optimiser.step(module(lambda y: inner(x, y)))
        return list(torch.autograd.grad(module(lambda y: outer(x, y)), x))

    return run


def _higher_unrolled(problem, x, y, num_steps, step_size):
    import _torch
    import higher
    import torch

    outer, inner, x0, y0 = _torch_objectives(problem, x, y)

    def run():
        x = _torch.variables(x0)
        module = _module_of(y0)
        optimiser = torch.optim.SGD(module.parameters(), lr=step_size)
        context = higher.innerloop_ctx(module, optimiser, copy_initial_weights=False)
        with context as (stateless, differentiable):
            for _ in range(num_steps):
                differentiable.step(stateless(lambda y: inner(x, y)))
            return list(torch.autograd.grad(stateless(lambda y: outer(x, y)), x))

    return run


UNROLLED: dict[str, Make] = {
    "jaxopt": _jaxopt_unrolled,
    "PyTorch": _torch_unrolled,
    "TorchOpt": _torchopt_unrolled,
    "higher": _higher_unrolled,
}


#
# D and E.
#


def warm_start(problem, x, y, num_steps) -> Lazy:
    """A loop of PyTorch, with an inner update. The points at the end."""

    def make():
        import _torch
        import warm_start

        run = _torch.warm_start(
            problem,
            x,
            y,
            num_steps,
            inner_rate=warm_start.INNER_RATE,
            outer_rate=warm_start.OUTER_RATE,
            with_inner_update=True,
        )
        return lambda: run()[:-1]

    return Lazy(make)


def _torch_cholesky(features, targets):
    import _torch

    return _torch.dual_cholesky(features, targets)


def _torch_qr(features, targets):
    import _torch

    return _torch.qr(features, targets)


def _lineax_svd(features, targets):
    import lineax as lx

    def response(features, targets):
        operator = lx.MatrixLinearOperator(features)
        return lx.linear_solve(operator, targets, lx.SVD()).value

    return _timing.Jitted(response, features, targets)


MINIMUM_NORM: dict[str, Make] = {
    "lineax, SVD": _lineax_svd,
    "PyTorch, dual Cholesky": _torch_cholesky,
    "PyTorch, QR": _torch_qr,
}


def contenders(peers: dict[str, Make], *args: Any, **kwargs: Any) -> dict[str, Lazy]:
    """The peers on one problem, as functions without arguments."""
    return {name: Lazy(ft.partial(make, *args, **kwargs)) for name, make in peers.items()}


def as_arrays(gradient: Any) -> Any:
    """The leaves of a gradient of any of them, on the host."""
    return [
        leaf if isinstance(leaf, jax.Array) else leaf.detach().cpu().numpy()
        for leaf in jax.tree.leaves(gradient)
    ]
