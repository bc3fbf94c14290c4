"""A function cut in two: what is needed at every step, and what is asked for later."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._compat import as_function, is_literal


class Halves(NamedTuple):
    """The two halves of a function. See `split`.

    - `first`: from the argument to `state`, `facts` and `rest`, the intermediate values
        that `second` needs.
    - `second`: from `state` and `rest` to `later`.
    - `later`: the shapes and types of what `second` returns.
    - `whole`: the program of the function that was cut.
    """

    first: Callable[[PyTree[Array]], tuple[PyTree[Array], PyTree[Array], list[Array]]]
    second: Callable[[PyTree[Array], list[Array]], PyTree[Array]]
    later: PyTree[jax.ShapeDtypeStruct]
    whole: Any


def split(closed: Any, shapes: tuple[PyTree, PyTree, PyTree]) -> Halves:
    """Cuts the program of a function, which returns `(state, facts, later)` of these
    `shapes`, behind what `state` and `facts` need. Each of its equations ends up in one
    of the halves; but a large sum or product of numbers is in both, if both need it.
    """
    program, later = closed.jaxpr, shapes[2]
    num_state = len(jtu.tree_leaves(shapes[0]))
    num_now = num_state + len(jtu.tree_leaves(shapes[1]))
    now, wanted_later = program.outvars[:num_now], program.outvars[num_now:]

    # What has an effect happens at every step.
    early, others, _ = _needed(program.eqns, now, lambda e: len(e.effects) > 0)
    late, _, wanted = _needed(others, wanted_later, lambda e: False)
    in_state = {v: i for i, v in enumerate(now[:num_state]) if _is_variable(v)}
    again = _cheap(wanted, early, in_state)
    late = [e for e in program.eqns if id(e) in {*map(id, late), *map(id, again)}]
    late, _, wanted = _needed(late, wanted_later, lambda e: False)
    made = {v for equation in late for v in equation.outvars}
    inputs = [v for v in wanted if v not in made and v not in set(program.constvars)]
    rest = [v for v in inputs if v not in in_state]

    def function(**parts):
        return as_function(program.replace(**parts), closed.consts)

    run_first = function(eqns=early, outvars=[*now, *rest])
    run_second = function(eqns=late, invars=inputs, outvars=wanted_later)

    def first(argument):
        out = run_first(*jtu.tree_leaves(argument))
        state, facts = jtu.tree_unflatten(jtu.tree_structure(shapes[:2]), out[:num_now])
        return state, facts, list(out[num_now:])

    def second(state, rest):
        leaves, rest = jtu.tree_leaves(state), iter(rest)
        values = [leaves[in_state[v]] if v in in_state else next(rest) for v in inputs]
        return jtu.tree_unflatten(jtu.tree_structure(later), run_second(*values))

    return Halves(first, second, later, closed)


def _is_variable(atom: Any) -> bool:
    # Literals are constants, and not hashable.
    return not is_literal(atom)


# An entry of the result is a number of operations on one entry of each argument.
_ENTRY_BY_ENTRY = {
    "add",
    "add_any",
    "broadcast_in_dim",
    "convert_element_type",
    "mul",
    "neg",
    "sub",
}


_LARGE = 2**14


def _cheap(wanted: list, equations: Iterable, at_hand: Iterable) -> list:
    """Those of the equations that make large wanted arrays by sums and products, entry by
    entry, but for arrays that are at hand.

    To store such an array costs more than to compute it: a pass over memory at every
    step, by a value that the compiler would not store, since what uses it can compute it
    on the way. What it is computed from is stored anyway, or is of the last step.
    """
    made_by = {v: equation for equation in equations for v in equation.outvars}
    seen, cheap, wanted = set(at_hand), {}, list(wanted)
    while wanted:
        variable = wanted.pop()
        equation = made_by.get(variable)
        if equation is None or variable in seen or variable.aval.size < _LARGE:
            continue
        seen.add(variable)
        if equation.primitive.name in _ENTRY_BY_ENTRY:
            cheap[id(equation)] = equation
            wanted += [v for v in equation.invars if _is_variable(v)]
    return list(cheap.values())


def _needed(equations: Iterable, outputs: Iterable, always: Callable[[Any], bool]):
    """The equations that `outputs` need, the others, and all variables that they read.

    The variables are in an order that does not change from run to run.
    """
    wanted = {v: None for v in outputs if _is_variable(v)}
    needed, others = [], []
    for equation in reversed(list(equations)):
        if always(equation) or any(v in wanted for v in equation.outvars):
            wanted |= {v: None for v in equation.invars if _is_variable(v)}
            needed.append(equation)
        else:
            others.append(equation)
    return needed[::-1], others[::-1], list(wanted)
