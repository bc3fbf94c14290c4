"""Everything that this package uses of its dependencies beyond their public interfaces.

Each function says why it is needed, and has a test in `tests/test_compat.py` that fails
if a new release changes it. The upper bounds in `pyproject.toml` are there for this file.
"""

import contextlib
import functools as ft
import os
import sys
import traceback
import types
from collections.abc import Callable
from typing import Any, cast, Literal, TypeVar

import beartype
import equinox as eqx
import equinox._errors
import equinox._jit
import equinox.internal as eqxi
import equinox.internal._primitive
import jax
import jax._src.core
import jax.core
import jax.extend.core
import jax.numpy as jnp
import jax.tree_util as jtu
import jaxtyping
import lineax as lx
import numpy as np
import optimistix as optx
from jax.experimental.multihost_utils import process_allgather
from jaxtyping import Array, PyTree, Shaped


Fn = TypeVar("Fn", bound=Callable)


#
# JAX
#


def is_traced(value: Any) -> bool:
    """Whether `value` is known only when the program runs.

    JAX has no public function for this. It advises a test for its class of tracers.
    """
    return isinstance(value, jax.core.Tracer)


def may_capture(fn: Any) -> bool:
    """Whether a function may hold a value that is traced, by a look at its cells and
    defaults, and at those of the functions there.

    A method of a module has the arrays of the module as its leaves, and does not hold
    them in this sense. An object that cannot be looked through may hold anything.
    """
    plain = int | float | str | type | None | np.ndarray | np.generic | jax.Array
    left, seen = [fn], set()
    while left:
        value = left.pop()
        # Of Python, or of Equinox.
        if hasattr(value, "__func__") and hasattr(value, "__self__"):
            leaves = jtu.tree_leaves(value.__self__)
            left += [value.__func__, *(u for u in leaves if not eqx.is_array(u))]
        elif isinstance(value, types.FunctionType):
            if value not in seen:
                seen.add(value)
                left += _held(value)
        elif is_traced(value) or not isinstance(value, plain):
            return True
    return False


def _held(fn: types.FunctionType) -> list[Any]:
    held = [*(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).values()]
    for cell in fn.__closure__ or ():
        with contextlib.suppress(ValueError):  # It is empty.
            held.append(cell.cell_contents)
    return held


def is_literal(variable: Any) -> bool:
    """Whether an input of an equation of a jaxpr is a literal constant.

    JAX may change jaxprs and their classes in any minor release.
    """
    return isinstance(variable, jax.extend.core.Literal)


def primitives(program: Any) -> set[str]:
    """The names of the primitives in a jaxpr and in those within it."""
    names = set()
    for equation in program.eqns:
        names.add(equation.primitive.name)
        for within in jax.tree.leaves(list(equation.params.values()), is_leaf=is_program):
            if is_program(within):
                names |= primitives(getattr(within, "jaxpr", within))
    return names


def is_program(value: Any) -> bool:
    """Whether `value` is a jaxpr, with its constants or without."""
    return isinstance(value, jax.extend.core.Jaxpr | jax.extend.core.ClosedJaxpr)


def as_function(program: Any, constants: list[Any]) -> Callable[..., list[Array]]:
    """The function of the arrays that a jaxpr, changed by hand, computes."""
    closed = jax.extend.core.ClosedJaxpr(program, constants)
    return jax.extend.core.jaxpr_as_fun(closed)


def traced_once(fn: Any, *args: Any) -> tuple[Any, Any]:
    """The jaxpr of `fn`, which is a `jax.jit` whose first argument is static, and the
    shapes of its results. JAX keeps both, so that another program which asks for them
    does not trace `fn` again.

    Values of a transformation around us that `fn` closes over would be further arguments
    of that jaxpr. Then they are its constants instead, and nothing is kept; nor with
    `EQX_ON_ERROR=breakpoint`, where Equinox makes `jax.jit` do nothing.
    """
    if hasattr(fn, "trace"):
        traced = fn.trace(*args)
        if len(traced.jaxpr.in_avals) == len(jax.tree.leaves(args[1:])):
            return traced.jaxpr, traced.out_info
    plain = ft.partial(getattr(fn, "__wrapped__", fn), args[0])
    return jax.make_jaxpr(plain, return_shape=True)(*args[1:])


def one_matrix_at_a_time(decompose: Callable[[Array], Any]) -> Callable[[Array], Any]:
    """`decompose`; under `vmap` on a CPU it takes the matrices of a batch in turn.

    On a CPU, jaxlib (0.10) gives a batch of decompositions to the threads of a pool, runs
    in a thread of the same pool, and waits for the others. If a program has as many
    independent batches as there are threads, they all wait for each other: under `vmap`,
    a program that decomposes two matrices hangs on two cores. On machines with many cores
    such a batch corrupts memory: https://github.com/jax-ml/jax/issues/39292.

    `jax.custom_batching` is public, but labelled experimental.
    """
    safe = jax.custom_batching.custom_vmap(decompose)

    @safe.def_vmap
    def of_batch(axis_size: int, is_batched: list[bool], matrices: Array) -> Any:
        del axis_size, is_batched
        out = jax.lax.platform_dependent(
            matrices,
            cpu=lambda matrices: jax.lax.map(safe, matrices),
            default=jax.vmap(decompose),
        )
        return out, jtu.tree_map(lambda _: True, out)

    return safe


# Options of XLA, by the kind of device. XLA may rename them in any release.

# A loop is one CUDA graph, as is what was one by default. Otherwise a loop that ends by a
# condition copies it to the host in each step, and waits.
LOOPS_IN_GRAPHS: dict[str, dict[str, Any]] = {
    "gpu": {
        "xla_gpu_enable_command_buffer": (
            "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,"
            "CONDITIONAL,WHILE"
        ),
    },
}


# For what is called once. On a CPU, the older code generator for fused loops: it takes
# 60 % of the time, and its code up to a tenth more. On a GPU, cuBLAS for products
# of matrices: to try Triton too, which can be faster in small networks, is nearly all of
# the time of a first call.
QUICK_TO_COMPILE: dict[str, dict[str, Any]] = {
    "cpu": {"xla_cpu_use_fusion_emitters": False},
    "gpu": {"xla_gpu_enable_triton_gemm": False},
}


def compiler_options(wanted: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Those of the options for the devices at hand that this XLA knows and that are not
    in the environment's `XLA_FLAGS`."""
    flags = os.environ.get("XLA_FLAGS", "")
    options = {}
    for name, value in wanted.get(jax.default_backend(), {}).items():
        if name in flags:
            continue
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            jax.jit(jnp.negative, compiler_options={name: value})(jnp.zeros(()))
            options[name] = value
    return options


def program(fn: Fn, wanted: dict[str, dict[str, Any]], **kwargs: Any) -> Fn:
    """`eqx.filter_jit(fn, **kwargs)`, compiled with these options.

    JAX refuses options within another program, which has its own, and has no public
    function that says whether one is being traced.
    """
    jit: Any = eqx.filter_jit
    plain = jit(fn, **kwargs)

    @ft.cache
    def alone() -> Any:
        options = compiler_options(wanted)
        return jit(fn, compiler_options=options, **kwargs) if options else plain

    @ft.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        within = not jax._src.core.trace_state_clean()
        return (plain if within else alone())(*args, **kwargs)

    call.__dict__["plain"] = plain
    return cast(Fn, call)


def looping(fn: Fn, **kwargs: Any) -> Fn:
    """A program that is mostly loops, and that may be called often."""
    return program(fn, LOOPS_IN_GRAPHS, **kwargs)


def called_once(fn: Fn) -> Fn:
    """A program of which the first call matters most."""
    return program(fn, QUICK_TO_COMPILE)


def manual_axes(array: Array) -> frozenset:
    """The axes of a mesh along which `array` differs, within a `jax.shard_map` that
    checks this.

    How a type says so changes from version to version.
    """
    kind = jax.typeof(array)
    found = getattr(kind, "vma", None)
    if found is None:
        found = getattr(getattr(kind, "manual_axis_type", None), "varying", frozenset())
    return frozenset(found)


def of_all_processes(number: int) -> set[int]:
    """The numbers that all processes have called this with, each at the same time.

    This is public, but labelled experimental.
    """
    if jax.process_count() == 1:
        return {number}
    return set(process_allgather(np.asarray(number)).tolist())


#
# Equinox
#


def any_of_batch(pred: Shaped[Array, "..."]) -> Shaped[Array, ""]:
    """Whether `pred` holds for any element of the batch, as one unbatched value.

    A `lax.cond` with a batched condition computes both branches for every element. With
    this condition it stays a branch. That needs a primitive with its own batching rule,
    which Equinox has.
    """
    return eqxi.unvmap_any(pred)


def closure_to_pytree(fn: Any) -> Any:
    """`fn`, with the arrays that it closes over as its leaves.

    The optimisers of optax are closures. JAX and optax have no such function:
    `jax.closure_convert` is for one call.
    """
    return jtu.tree_map(_told_apart, eqxi.closure_to_pytree(fn))


def _told_apart(leaf: Any) -> Any:
    function = getattr(leaf, "fn", None)
    return Function(function) if isinstance(function, types.FunctionType) else leaf


class Function:
    """A function without what it closes over, equal to another if both do the same.

    Equinox compares the text of the sources. But two functions of one text differ if
    their defaults or the globals that they read do.
    """

    def __init__(self, fn: types.FunctionType):
        self.fn = fn
        values = [*(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).values()]
        values += [fn.__globals__.get(name) for name in _global_names(fn.__code__)]
        # Kept, so that no other object takes an address that is compared.
        self._values = values
        self._key = fn.__code__, id(fn.__globals__), *map(_by_value, values)

    def __hash__(self):
        return hash(self._key)

    def __eq__(self, other):
        return isinstance(other, Function) and self._key == other._key


def _global_names(code: types.CodeType) -> list[str]:
    nested = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return [*code.co_names, *(name for c in nested for name in _global_names(c))]


def _by_value(value: Any) -> Any:
    """Numbers and strings as they are, and anything else by its identity."""
    simple = isinstance(value, bool | int | float | complex | str | bytes | None)
    return (type(value), repr(value)) if simple else (type(value), id(value))


def hidden_program(equation: Any) -> Any:
    """The jaxpr of an operation that Equinox has defined, such as the linear solves of
    lineax; `None` for all others.

    The parameters of such an operation are any Python objects, and its program is none of
    them. It is traced again here.
    """
    if not isinstance(
        equation.params.get("flatten"), equinox.internal._primitive.Flatten
    ):
        return None
    implementation = ft.partial(equation.primitive.impl, **equation.params)
    try:
        return jax.make_jaxpr(implementation)(*(v.aval for v in equation.invars))
    except jax.errors.ConcretizationTypeError:
        # That of `equinox.internal.noinline` runs on the host.
        return None


def checkpointed_while_loop(
    cond_fn: Callable, body_fn: Callable, init: PyTree, *, checkpoints: int
) -> PyTree:
    """A `lax.while_loop` that has a reverse-mode derivative, for which it stores at most
    `checkpoints` of its states. JAX has no such loop.
    """
    return eqxi.while_loop(
        cond_fn, body_fn, init, kind="checkpointed", checkpoints=checkpoints
    )


def nondifferentiable(tree: PyTree, *, name: str) -> PyTree:
    """`tree`. A derivative with respect to it raises an error with its `name`.

    `jax.lax.stop_gradient` would silently make that derivative zero.
    """
    return eqxi.nondifferentiable(tree, name=name)


def not_differentiable(tree: PyTree, sentence: str) -> PyTree:
    """`tree`. A derivative of it raises an error with this sentence."""
    return eqxi.nondifferentiable(tree, msg=sentence)


def batched_as(tree: PyTree[Array], other: PyTree[Array]) -> PyTree[Array]:
    """`tree`. Under `jax.vmap` it is batched wherever `other` is.

    Equinox cannot transpose a primitive, such as the linear solve of lineax, of which a
    linear input is not batched and another input is.
    """
    # True of all numbers; `vmap` does not know that.
    numbers = [jnp.sum(jnp.isnan(leaf)) for leaf in jtu.tree_leaves(other)]
    true = ft.reduce(jnp.add, numbers) >= 0
    return jtu.tree_map(lambda u: jnp.where(true, u, jnp.zeros_like(u)), tree)


def static(value: Any) -> PyTree:
    """`value` as a pytree without leaves, for the state of a lineax solver, which must be
    a pytree.
    """
    return eqxi.Static(value)


#
# Equinox's errors. `eqx.error_if` fixes its message when the program is traced. Our
# messages contain numbers of the run.
#


def say_instead(item: Any, message: str) -> None:
    """Gives an item of an enumeration another message than the one it has inherited.

    In the body of a class Equinox warns of that, because the base class has the other.
    """
    messages = item._enumeration._index_to_message
    messages[int(item._value)] = message


def code_of(item: Any) -> Array:
    """The number of an item of an enumeration. Equinox compares items by a program."""
    return item._value


_Item: Any = type(optx.RESULTS.successful)


class _Said(_Item):
    """An item of an enumeration that prints as its message alone."""

    def __str__(self):
        return self._enumeration[self]

    def __repr__(self):
        return f"{self._enumeration.__name__}<{self}>"


def said(enumeration: Any) -> Any:
    """A decorator: the items of this enumeration print as their messages.

    Equinox puts the path of the module in front, and makes all items itself: those that
    have names when the class is made, and the others in `promote` and `where`.
    """
    items = enumeration._name_to_item
    items.update({name: _Said(item._value, enumeration) for name, item in items.items()})

    def again(method):
        def made(cls, *args):
            item = method.__func__(cls, *args)
            # A subclass that is no such enumeration has plain items. All items of one
            # must be of one class, or they are different pytrees.
            kind: Any = type(next(iter(cls._name_to_item.values())))
            return kind(item._value, cls)

        return classmethod(ft.wraps(method.__func__)(made))

    enumeration.promote = again(eqx.Enumeration.promote)
    enumeration.where = again(eqx.Enumeration.where)
    return enumeration


def on_error() -> Literal["raise", "breakpoint", "nan", "off"]:
    """What the environment variable `EQX_ON_ERROR` says, as `eqx.error_if` reads it."""
    return equinox._errors.EQX_ON_ERROR  # pyright: ignore


_RULE = "\n\n\n--------------------\n"


_FROM = "In the program, this was called from:\n"


_UNWRAPPED = (
    "This error occurred in a JAX program that is not wrapped in `equinox.filter_jit`. "
    "(You probably see a very long and uninformative error message.) If you wrap it, "
    "only the text above is shown."
)


def raise_on_host(sentence: str, stack: str) -> None:
    """Raises an error in a callback, from which `eqx.filter_jit` makes an
    `eqx.EquinoxRuntimeError`.

    XLA passes on the text of a Python exception, not the exception. `eqx.filter_jit`
    looks for the name of Equinox's error in that text, and then shows the message that it
    finds in a global variable. Another thread may have changed that variable in the
    meantime. So this stores an object there that reads the message from the text.
    """
    equinox._jit.last_error_info = _IN_FLIGHT  # pyright: ignore
    raise equinox._errors._EquinoxRuntimeError(
        f"{sentence}{_RULE}{_FROM}{stack}{_RULE}{_UNWRAPPED}{_RULE}"
    )


class _InFlight:
    """The message and the stack of the error that this thread handles."""

    def __iter__(self):
        text = str(sys.exc_info()[1])
        _, _, text = text.partition(f"{equinox._errors._EquinoxRuntimeError.__name__}: ")
        # Equinox's own messages end with the same rule.
        sentence, _, rest = text.partition(_RULE)
        ours = rest.startswith(_FROM)
        stack = rest.removeprefix(_FROM).partition(_RULE)[0] if ours else ""
        return iter((sentence, [stack]))


_IN_FLIGHT = _InFlight()


def stack_inside() -> str:
    """The lines of the user's code that led here; inside `eqx.filter_jit`, those after
    it. They are read when the program is traced.
    """
    frames, end = [], None
    # Not `None`, which skips frames; how many depends on the version of Python.
    for frame, line in traceback.walk_stack(sys._getframe()):
        if "__equinox_jit_id__" in frame.f_locals:
            end = len(frames)
        if not frame.f_code.co_filename.startswith(_NOT_THE_USERS):
            frames.append((frame, line))
    summary = traceback.StackSummary.extract(frames[:end])
    summary.reverse()
    return "".join(summary.format())


_NOT_THE_USERS = (
    os.path.dirname(__file__) + os.sep,
    *(m.__path__[0] + os.sep for m in (beartype, eqx, jax, jaxtyping, lx)),
    "<@beartype",
)


#
# lineax
#


def lsmr(
    operator: lx.AbstractLinearOperator,
    vector: PyTree[Array],
    *,
    rtol: float,
    conlim: float,
    max_steps: int,
) -> tuple[PyTree[Array], dict[str, Array]]:
    """The solution of `lineax.LSMR`, and its statistics `num_steps`, `norm_A`, `norm_r`,
    `norm_Ar`, `norm_x`, which are not documented.

    This calls the method of the solver, whose state is the operator itself.
    `lx.linear_solve` would solve again for a derivative, but the caller is a solver that
    lineax differentiates already.

    `lineax.LSMR` (0.1.1) has Python floats in the carry of its loop. They are float64 if
    64-bit types are enabled, and it then refuses data in float32.
    """
    solver = lx.LSMR(rtol=rtol, atol=0.0, max_steps=max_steps, conlim=conlim)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(vector)}
    with jax.enable_x64(jnp.dtype(jnp.float64) in dtypes):
        solution, _, stats = solver.compute(operator, vector, {})
    return solution, stats
