"""What tells one run from another, and in words what has changed between two."""

import dataclasses
import importlib.metadata
from typing import Any

import equinox as eqx
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .digest import (
    digest_of_jaxpr,
    digest_of_object,
    digest_of_program,
    digest_of_values,
    Unknown,
)
from .loop import initial_state, Progress, Run, Start


# All of an identity can be written as JSON: names to texts, or to lists of texts.
Identity = dict[str, dict[str, Any]]


_STEP = "a step of the pipeline"


_FIRST_STATE = "the first state of the pipeline"


# What makes it another run. The rest only helps to say so.
_DECISIVE = ("texts", "values", "programs")


# Another version of one of these may trace the same run to another program.
_PACKAGES = ("bilevel_eqx", "equinox", "jax", "lineax", "optax", "optimistix")


def programs_of(
    run: Run, start: Start, progress: Progress, step: Any
) -> dict[str, list[str]] | None:
    """The digests of the programs of a run, by name. `None` if one of them closes over
    something whose value is not known now.

    To be called where the run is traced: `step` is traced already, and the others are
    short.
    """
    x, y, problem = progress.state.x, progress.state.y, run.problem
    functions = {
        "the outer objective": (problem.outer, (x, y)),
        "the inner objective": (problem.inner, (x, y)),
        "`project_x`": (problem.project_x, (x,)),
        "`project_y`": (problem.project_y, (y,)),
        "`record`": (run.record, (x, y, progress.metrics)),
        _FIRST_STATE: (lambda: _arrays(initial_state(run, start)), ()),
    }
    arguments = jtu.tree_leaves((run, start))
    try:
        programs = {
            name: digest_of_program(function, at, arguments)
            for name, (function, at) in functions.items()
            if function is not None
        }
        programs[_STEP] = digest_of_jaxpr(step, arguments)
    except Unknown:
        return None
    return {name: list(digest) for name, digest in programs.items()}


def identity_of(run: Run, start: Start, programs: dict[str, list[str]]) -> Identity:
    """What tells a run from others. See `changes`.

    How long the run is, what it reports and when it saves are no part of it.
    """
    # Of these also what is no number: an inner solver's class, an optimiser's closures.
    parts = _fields(run.equilibrium, "equilibrium") | _fields(run.pipeline, "pipeline")
    values = {
        **_fields(run.problem, "problem"),
        **parts,
        "`record`": run.record,
        "`x0`": start.x,
        "`y0`": start.y,
        "`key`": start.key,
        "`state`": start.state,
    }
    return {
        "texts": {
            "`equilibrium`": type(run.equilibrium).__name__,
            "`pipeline`": type(run.pipeline).__name__,
            "`tolerance`": str(run.tolerance),
            "`save_every`": str(run.save_every),
        },
        "values": {k: list(digest_of_values(v)) for k, v in values.items()},
        "programs": programs,
        "parts": {k: list(digest_of_object(v)) for k, v in parts.items()},
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def changes(found: Any, given: Identity) -> list[str]:
    """What is not as it was, each in words. Empty if it is the same run."""
    if not _is_identity(found, given):
        return ["it does not say which run it is of"]
    texts = [
        f"{name} was `{was}` and is `{now}`"
        for name, was, now in _different(found, given, "texts")
    ]
    values = _different(found, given, "values")
    programs = {
        name: _changed(name, was, now, "program", "data in the program")
        for name, was, now in _different(found, given, "programs")
    }
    versions = []
    if len(programs) > 0:
        versions = [
            f"it was written with {name} {was}, and this is {now}, which may matter"
            for name, was, now in _different(found, given, "versions")
        ]
    # These contain the others.
    whole = [programs.pop(name) for name in (_FIRST_STATE, _STEP) if name in programs]
    told = texts + [
        _changed(name, was, now, "structure or the type", "values")
        for name, was, now in values
    ]
    # All programs are others where variables have other shapes or types.
    if all(was[0] == now[0] for _, was, now in values):
        told += programs.values()
    if len(told) == 0 and len(whole) > 0:
        parts = _different(found, given, "parts")
        told = [f"{name} changed" for name, _, _ in parts] or whole
    if len(told) == 0 and any(found[kind] != given[kind] for kind in _DECISIVE):
        told = ["it has other parts"]
    return told + versions


def _changed(name: str, was: list[str], now: list[str], form: str, numbers: str) -> str:
    return f"the {form if was[0] != now[0] else numbers} of {name} changed"


def _is_identity(found: Any, given: Identity) -> bool:
    """Whether it has the form of one. Anything may be written in a file."""
    if not isinstance(found, dict):
        return False
    kinds = [(found.get(kind), given[kind]) for kind in given]
    return all(
        isinstance(was, dict)
        and all(_form(was[name]) == _form(now[name]) for name in now if name in was)
        for was, now in kinds
    )


def _form(entry: Any) -> Any:
    return list(map(type, entry)) if isinstance(entry, list) else isinstance(entry, str)


def _different(found: Identity, given: Identity, kind: str) -> list[tuple]:
    was, now = found[kind], given[kind]
    return [(k, was[k], now[k]) for k in now if k in was and was[k] != now[k]]


def _fields(module: eqx.Module, owner: str) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(module)]
    return {f"`{owner}.{name}`": getattr(module, name) for name in names}


def _arrays(tree: PyTree) -> list[Array]:
    return [u for u in jtu.tree_leaves(tree) if eqx.is_array(u)]
