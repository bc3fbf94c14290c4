"""Digests of values and of programs: the same for what is equal, in every process."""

import contextlib
import dataclasses
import enum
import functools as ft
import hashlib
import itertools
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree

from .._compat import hidden_program, is_literal, is_program, is_traced
from .._mesh import spans_processes


class Digest(NamedTuple):
    """What tells one value or program from another.

    - `form`: a digest of the structure, the shapes and the types; or of the operations.
    - `numbers`: a digest of the numbers in it.
    """

    form: str
    numbers: str


class Unknown(Exception):
    """A program has a constant whose value is known only when another program runs."""


def digest_of_values(tree: PyTree) -> Digest:
    """The digest of the arrays and numbers in a pytree."""
    parts = _Parts({})
    for path, leaf in jtu.tree_leaves_with_path(tree):
        if eqx.is_array_like(leaf):
            parts.form.append(jtu.keystr(path))
            parts.add_array(leaf)
    return parts.digest()


def digest_of_object(value: Any) -> Digest:
    """The digest of a Python object: of its class and its fields, and of the code of a
    function with what that closes over. It sees less than the digest of a program."""
    parts = _Parts({})
    parts.add(value)
    return parts.digest()


def digest_of_program(
    fn: Callable[..., PyTree[Array]], at: tuple, arguments: Iterable[Any]
) -> Digest:
    """The digest of the program of `fn`, with all that it closes over.

    It does not depend on names, on addresses, or on where the code is written.

    **Arguments:**

    - `at`: the arguments of `fn`, or their shapes.
    - `arguments`: those of the program that is being traced, if any. They have no values
        yet; only which of them is used where is part of the digest.
    """
    return digest_of_jaxpr(jax.make_jaxpr(fn)(*at), arguments)


def digest_of_jaxpr(program: Any, arguments: Iterable[Any]) -> Digest:
    """`digest_of_program`, of a program that is traced already."""
    parts = _Parts({id(u): i for i, u in enumerate(arguments) if is_traced(u)})
    parts.add(program)
    return parts.digest()


def numbers_of(leaf: Any) -> np.ndarray:
    """An array, a number, or what is behind a random key."""
    return np.asarray(jr.key_data(leaf) if is_key(leaf) else leaf)


def is_key(leaf: Any) -> bool:
    is_array = isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)
    return is_array and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


@jax.jit
def _fingerprint(array: Array) -> Array:
    """Four sums over the entries, of mixed bits of the entry and of where it is. They are
    of integers, and so the same in any order, and on any number of devices."""
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    size = min(array.dtype.itemsize, 4)
    bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * size}"))
    bits = bits.astype(jnp.uint32)
    place = jax.lax.iota(jnp.uint32, bits.size).reshape(bits.shape)

    def total(seed):
        mixed = _mixed(bits + _mixed(place + jnp.uint32(seed)))
        return jnp.sum(mixed, dtype=jnp.uint32)

    return jnp.stack([total(0x9E3779B1 * (1 + i) % 2**32) for i in range(4)])


def _mixed(number: Array) -> Array:
    """A mixing of 32 bits (the finaliser of MurmurHash3)."""
    number = (number ^ (number >> 16)) * jnp.uint32(0x85EBCA6B)
    number = (number ^ (number >> 13)) * jnp.uint32(0xC2B2AE35)
    return number ^ (number >> 16)


# The parameters of operations that do not change what is computed: names, rules for
# derivatives and batches, what is kept in memory, and where the operation runs.
_NOT_THE_NUMBERS = {
    *("name", "jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd", "out_trees", "rule", "in_tree"),
    *("out_tree", "policy", "prevent_cse", "donated_invars", "keep_unused", "inline"),
    *("compiler_options_kvs", "ctx_mesh", "mesh", "sharding", "out_sharding"),
    *("in_shardings", "out_shardings", "in_layouts", "out_layouts"),
}


# Operations that only show something.
_SHOWS = {"debug_callback", "debug_print"}


# Closures of these packages hold what differs from process to process, such as where in
# the user's code they were made.
_KNOWN_BY_NAME = ("bilevel_eqx.", "equinox.", "jax.", "jaxtyping.")


class _Parts:
    """Collects what a digest is of.

    What is met several times, such as a function that is called more than once, is only
    read the first time.
    """

    def __init__(self, places: dict[int, int], seen: dict | None = None):
        self.places = places
        self.form: list[str] = []
        self.numbers: list[bytes] = []
        # By identity; the object itself is kept, so that no other one gets its address.
        self.seen: dict[int, tuple[Any, Digest | None]] = {} if seen is None else seen

    def digest(self) -> Digest:
        numbers = hashlib.sha256()
        for number in self.numbers:
            numbers.update(number)
        # Each entry is quoted, so that no two lists have one text.
        return Digest(_sha(repr(self.form).encode()), numbers.hexdigest())

    def add(self, value: Any) -> None:
        if is_traced(value):
            if id(value) not in self.places:
                raise Unknown
            self.form.append(f"argument {self.places[id(value)]}")
        elif value is None or isinstance(
            value, bool | int | float | complex | str | bytes
        ):
            self.form.append(repr(value))
        elif isinstance(value, type):
            self.form.append(_name(value))
        elif isinstance(value, enum.Enum | np.dtype):
            self.form.append(str(value))
        elif hasattr(value, "__array__"):
            self.add_array(value)
        elif isinstance(value, tuple | list):
            self.form.append(f"{_name(type(value))} of {len(value)}")
            self._add_all(value)
        else:
            self._add_once(value)

    def add_array(self, value: Any) -> None:
        if spans_processes(value):
            # No process has all of it.
            array = jr.key_data(value) if is_key(value) else value
            self.form.append(f"{value.dtype}{list(array.shape)}")
            self.numbers.append(np.asarray(_fingerprint(array)).tobytes())
            return
        array = numbers_of(value)
        dtype = value.dtype if hasattr(value, "dtype") else type(value).__name__
        self.form.append(f"{dtype}{list(array.shape)}")
        self.numbers.append(_sha(np.ascontiguousarray(array).tobytes()).encode())

    def _add_once(self, value: Any) -> None:
        if id(value) not in self.seen:
            # Something that contains itself is `None` within.
            self.seen[id(value)] = value, None
            parts = _Parts(self.places, self.seen)
            parts._add_contents(value)
            self.seen[id(value)] = value, parts.digest()
        digest = self.seen[id(value)][1]
        if digest is not None:
            self.form.append(digest.form)
            self.numbers.append(digest.numbers.encode())

    def _add_contents(self, value: Any) -> None:
        if is_program(value):
            self._add_program(value)
            return
        self.form.append(_name(type(value)))
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                self.form.append(str(key))
                self.add(value[key])
        elif isinstance(value, set | frozenset):
            self.form.extend(sorted(map(str, value)))
        elif isinstance(value, ft.partial):
            self._add_all((value.func, value.args, value.keywords))
        elif isinstance(value, types.MethodType):
            self._add_all((value.__func__, value.__self__))
        elif isinstance(value, types.FunctionType):
            self._add_function(value)
        elif dataclasses.is_dataclass(value):
            # A field may not be set yet.
            for field in dataclasses.fields(value):
                self.form.append(field.name)
                self.add(getattr(value, field.name, None))
        else:
            # Of the rest, only functions: other things may change while a program runs.
            self.form.append(getattr(value, "__name__", ""))
            held = {"wrapped": getattr(value, "__wrapped__", None)}
            held |= getattr(value, "__dict__", {})
            self._add_all(u for u in held.values() if isinstance(u, types.FunctionType))

    def _add_all(self, values: Iterable[Any]) -> None:
        for value in values:
            self.add(value)

    def _add_program(self, program: Any) -> None:
        """The operations of a jaxpr, with its variables by number."""
        self._add_all(getattr(program, "consts", ()))
        program = getattr(program, "jaxpr", program)
        variables: dict[Any, int] = {}

        def add_variables(variables_of):
            for variable in variables_of:
                if is_literal(variable):
                    self.add(np.asarray(variable.val, variable.aval.dtype))
                else:
                    number = variables.setdefault(variable, len(variables))
                    self.form.append(f"{number}: {_kind(variable.aval)}")

        add_variables((*program.constvars, *program.invars))
        for equation in program.eqns:
            name = equation.primitive.name
            self.form.append(name)
            add_variables(equation.invars)
            if name not in _SHOWS:
                self._add_parameters(equation)
            self.form.append("to")
            add_variables(equation.outvars)
        add_variables(program.outvars)

    def _add_parameters(self, equation: Any) -> None:
        hidden = hidden_program(equation)
        if hidden is not None:
            self.add(hidden)
            return
        for name in sorted(equation.params.keys() - _NOT_THE_NUMBERS):
            self.form.append(name)
            self.add(equation.params[name])

    def _add_function(self, function: types.FunctionType) -> None:
        self.form.append(_name(function))
        if f"{function.__module__}.".startswith(_KNOWN_BY_NAME):
            return
        self._add_code(function.__code__)
        defaults = function.__defaults__ or (), (function.__kwdefaults__ or {}).values()
        for value in itertools.chain(*defaults, _closed_over(function)):
            # What may change while a program runs is not part of it.
            changes = isinstance(value, list | dict | set)
            self.form.append(_name(type(value))) if changes else self.add(value)

    def _add_code(self, code: types.CodeType) -> None:
        self.form.append(f"{code.co_code.hex()} {code.co_names}")
        for constant in code.co_consts:
            is_code = isinstance(constant, types.CodeType)
            self._add_code(constant) if is_code else self.add(constant)


def _closed_over(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        # One that is not filled yet has no contents.
        with contextlib.suppress(ValueError):
            yield cell.cell_contents


def _name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


def _kind(aval: Any) -> str:
    return f"{getattr(aval, 'dtype', type(aval).__name__)}{getattr(aval, 'shape', '')}"


def _sha(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()
