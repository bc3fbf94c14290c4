"""The contenders written by hand in PyTorch, for those who have it.

Eagerly, as most would write them: the graph of the inner gradient is kept, and a product
with the inner Hessian is one more backward pass through it. Nothing is read from the
device before the end. The arrays are those of the problems in JAX, not copies.
"""

# PyTorch is no dependency, not even of the benchmarks.
# pyright: reportMissingImports=false

import functools as ft
from collections.abc import Callable
from typing import Any

import jax
import torch
from _problems import PenalisedNetwork, PenalisedRegression
from torch.autograd import grad
from torch.nn import functional


Run = Callable[[], list[torch.Tensor]]


class Call:
    """A function without arguments that waits for its value, as a list of tensors.

    It is made by the first call, so that what fails, fails there.
    """

    def __init__(self, make: Callable[[], Run]):
        self._make = make
        self._run: Run | None = None

    def __call__(self) -> list[torch.Tensor]:
        if self._run is None:
            self._run = self._make()
        out = self._run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return out

    def temporary_mebibytes(self) -> float | None:
        """By how much the memory in use rises during a call."""
        if not torch.cuda.is_available():
            return None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self()
        return (torch.cuda.max_memory_allocated() - before) / 2**20


def _call(make: Callable[..., Run]) -> Callable[..., Call]:
    return lambda *args, **kwargs: Call(ft.partial(make, *args, **kwargs))


def use_float32() -> None:
    """Matrix products of float32 in float32, not in TF32."""
    torch.set_float32_matmul_precision("highest")


def as_arrays(tensors: list[torch.Tensor]) -> list[Any]:
    """On the host."""
    return [u.detach().cpu().numpy() for u in tensors]


def tensors(tree: Any) -> list[torch.Tensor]:
    return [torch.from_dlpack(leaf) for leaf in jax.tree.leaves(tree)]


def variables(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [u.detach().clone().requires_grad_() for u in tensors]


#
# The objectives. Variables are lists of tensors, in the order of the leaves in JAX.
#


Objective = Callable[[list[torch.Tensor], list[torch.Tensor]], torch.Tensor]


def _penalty(x, y):
    return 0.5 * sum((torch.exp(u) * v**2).sum() for u, v in zip(x, y))


def _network(y, inputs):
    *hidden, (matrix, bias) = zip(y[::2], y[1::2])
    for m, b in hidden:
        inputs = torch.relu(inputs @ m + b)
    return inputs @ matrix + bias


def objectives(problem: Any) -> tuple[Objective, Objective]:
    """F and f."""
    if isinstance(problem, PenalisedRegression):
        features, signs = tensors((problem.features, problem.signs))
        validation = tensors((problem.validation_features, problem.validation_signs))

        def logistic(y, features, signs):
            return functional.softplus(-signs * (features @ y[0])).mean()

        return (
            lambda x, y: logistic(y, *validation),
            lambda x, y: logistic(y, features, signs) + _penalty(x, y),
        )
    if isinstance(problem, PenalisedNetwork):
        inputs, labels = tensors((problem.inputs, problem.labels))
        validation = tensors((problem.validation_inputs, problem.validation_labels))

        def loss(y, inputs, labels):
            return functional.cross_entropy(_network(y, inputs), labels.long())

        return (
            lambda x, y: loss(y, *validation),
            lambda x, y: loss(y, inputs, labels) + _penalty(x, y),
        )
    points, labels, own_labels = tensors(
        (problem.points, problem.labels, problem.distilled_labels)
    )

    def ring_loss(y, points, labels):
        return functional.cross_entropy(_network(y, points), labels.long())

    return (
        lambda x, y: ring_loss(y, points, labels),
        lambda x, y: ring_loss(y, x[0], own_labels),
    )


#
# A and B
#


@_call
def hypergradient(problem: Any, x: Any, y: Any, num_steps: int) -> Run:
    """With so many steps of conjugate gradients."""
    outer, inner = objectives(problem)
    x0, y0 = tensors(x), tensors(y)

    def dot(a, b):
        return sum((u * v).sum() for u, v in zip(a, b))

    def axpy(scale, a, b):
        return [scale * u + v for u, v in zip(a, b)]

    def run():
        x, y = variables(x0), variables(y0)
        outer_y = grad(outer(x, y), y)
        gradient = grad(inner(x, y), y, create_graph=True)

        def product(v):
            return grad(gradient, y, grad_outputs=v, retain_graph=True)

        q = [torch.zeros_like(u) for u in y]
        r = p = list(outer_y)
        rr = dot(r, r)
        for _ in range(num_steps):
            Hp = product(p)
            step_size = rr / dot(p, Hp)
            q, r = axpy(step_size, p, q), axpy(-step_size, Hp, r)
            new_rr = dot(r, r)
            p, rr = axpy(new_rr / rr, p, r), new_rr
        return [-u for u in grad(gradient, x, grad_outputs=q)]

    return run


#
# C and D
#


def _descend(inner, x, y, rate, *, create_graph):
    if create_graph:
        gradient = grad(inner(x, y), y, create_graph=True)
        return [u - rate * g for u, g in zip(y, gradient)]
    y = [u.detach().requires_grad_() for u in y]
    gradient = grad(inner(x, y), y)
    return [(u - rate * g).detach().requires_grad_() for u, g in zip(y, gradient)]


@_call
def unrolled(problem: Any, x: Any, y: Any, num_steps: int, rate: float) -> Run:
    """Through so many steps of gradient descent."""
    outer, inner = objectives(problem)
    x0, y0 = tensors(x), tensors(y)

    def run():
        x, y = variables(x0), variables(y0)
        for _ in range(num_steps):
            y = _descend(inner, x, y, rate, create_graph=True)
        return list(grad(outer(x, y), x))

    return run


@_call
def warm_start(
    problem: Any,
    x: Any,
    y: Any,
    num_steps: int,
    *,
    inner_rate: float,
    outer_rate: float,
    with_inner_update: bool,
) -> Run:
    """The run of D, with its history of values, which stay on the device."""
    outer, inner = objectives(problem)
    x0, y0 = tensors(x), tensors(y)

    def respond(x, y):
        answer = _descend(inner, x, y, inner_rate, create_graph=True)
        value = outer(x, answer)
        for u, g in zip(x, grad(value, x)):
            u.grad = g
        return value.detach(), [u.detach().requires_grad_() for u in answer]

    def run():
        x, y = variables(x0), variables(y0)
        optimiser = torch.optim.Adam(x, lr=outer_rate, fused=x[0].is_cuda)
        _, answer = respond(x, y)
        y = y if with_inner_update else answer
        values = []
        for _ in range(num_steps):
            optimiser.step()
            if with_inner_update:
                y = _descend(inner, x, y, inner_rate, create_graph=False)
            value, answer = respond(x, y)
            y = y if with_inner_update else answer
            values.append(value)
        return [*x, torch.stack(values)]

    return run


#
# E
#


@_call
def dual_cholesky(features: Any, targets: Any) -> Run:
    A, t = tensors((features, targets))

    def run():
        factor = torch.linalg.cholesky(A @ A.T)
        return [torch.cholesky_solve(t[:, None], factor)[:, 0] @ A]

    return run


@_call
def qr(features: Any, targets: Any) -> Run:
    """Of the transpose."""
    A, t = tensors((features, targets))

    def run():
        orthogonal, triangular = torch.linalg.qr(A.T)
        solved = torch.linalg.solve_triangular(triangular.T, t[:, None], upper=False)
        return [orthogonal @ solved[:, 0]]

    return run
