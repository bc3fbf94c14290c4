"""Which pipelines reach which equilibrium."""

import dataclasses
from collections.abc import Callable

import equinox as eqx

from .._equilibrium.base import AbstractEquilibrium
from .._problem.base import AbstractBilevelProblem
from .._text import aligned
from .base import AbstractPipeline


Factory = Callable[[AbstractEquilibrium, AbstractBilevelProblem], AbstractPipeline]


class Entry(eqx.Module):
    """A pipeline in the registry.

    **Attributes:**

    - `equilibrium`: the type of the equilibrium that it aims at.
    - `name`: what it is called.
    - `factory`: makes it, from the equilibrium and the problem.
    - `reference`: where it is from.
    - `cost`: what an outer step takes, in Hessian-vector products, gradients and memory.
    - `demands`: what it asks of the problem.
    - `default`: whether `solve` takes it when no pipeline is given.
    """

    equilibrium: type[AbstractEquilibrium]
    name: str
    factory: Factory
    reference: str = ""
    cost: str = ""
    demands: str = ""
    default: bool = False


class Entries(tuple):
    """A tuple of registry entries that prints as a table."""

    def __str__(self):
        if not self:
            return "No pipelines are registered."
        header = ["equilibrium", "pipeline", "cost of an outer step", "demands", "from"]
        rows = [
            [
                entry.equilibrium.__name__,
                entry.name + (" (default)" if entry.default else ""),
                entry.cost or "-",
                entry.demands or "-",
                entry.reference or "-",
            ]
            for entry in self
        ]
        return "\n".join(aligned([header, *rows], "<", ruled=True))


_registry: dict[type[AbstractEquilibrium], dict[str, Entry]] = {}


def register(
    equilibrium_type: type[AbstractEquilibrium],
    name: str,
    factory: Factory,
    *,
    reference: str = "",
    cost: str = "",
    demands: str = "",
    default: bool = False,
) -> None:
    """Adds a pipeline to the registry, for an equilibrium of ours or of your own.

    **Arguments:**

    - `equilibrium_type`: the type of the equilibrium, a subclass of
        `AbstractEquilibrium`.
    - `name`: what to call it; `solve(..., pipeline=name)` then finds it. A name that is
        taken is replaced.
    - `factory`: a function of `(equilibrium, problem)` that returns the pipeline. Where
        it cannot serve the problem it raises, with the reason.
    - `reference`, `cost`, `demands`: what the table of
        [`bilevel_eqx.registered`][] shows. Keyword only arguments.
    - `default`: whether `solve` takes it when no pipeline is given. The first one to be
        registered for an equilibrium is the default until another one claims it. Keyword
        only argument.

    **Raises:**

    A `ValueError` if `equilibrium_type` is not a subclass of `AbstractEquilibrium`.
    """
    if not (
        isinstance(equilibrium_type, type)
        and issubclass(equilibrium_type, AbstractEquilibrium)
    ):
        raise ValueError(
            "`register(equilibrium_type, ...)` takes the type of an equilibrium, such as "
            f"`WarmStart`, and not {equilibrium_type!r}."
        )
    entries = _registry.setdefault(equilibrium_type, {})
    if default:
        for other, entry in entries.items():
            entries[other] = dataclasses.replace(entry, default=False)
    default = default or not any(e.default for n, e in entries.items() if n != name)
    entries[name] = Entry(
        equilibrium_type, name, factory, reference, cost, demands, default
    )


def registered(
    equilibrium_type: type[AbstractEquilibrium] | None = None,
) -> Entries:
    """The registered pipelines; `print` them for a table.

    In the costs of ours, Hv is a product with a Hessian in y; a Newton solve takes n Hv
    and a factorisation where the n inner variables, or the residuals of a sum of squares,
    are at most 1,024, and steps of LSMR elsewhere, each of 2 Hv; and what follows the
    last semicolon is memory, in numbers.

    **Arguments:**

    - `equilibrium_type`: the type of an equilibrium, to see only the pipelines that
        serve it: its own, and those of the concepts that it is a subclass of.

    **Returns:**

    A tuple of entries, each with `equilibrium`, `name`, `factory`, `reference`, `cost`,
    `demands` and `default`.
    """
    if equilibrium_type is None:
        return Entries(e for entries in _registry.values() for e in entries.values())
    found: dict[str, Entry] = {}
    # What is registered for a concept serves its subclasses, which come first.
    for kind in equilibrium_type.__mro__:
        for name, entry in _registry.get(kind, {}).items():
            found.setdefault(name, entry)
    return Entries(found.values())


def default_pipeline(
    equilibrium: AbstractEquilibrium, problem: AbstractBilevelProblem
) -> AbstractPipeline:
    """The pipeline that `solve` takes when it is given none.

    **Arguments:**

    - `equilibrium`: the equilibrium to aim at.
    - `problem`: the bilevel problem.

    **Returns:**

    A pipeline.

    **Raises:**

    A `ValueError` if no pipeline is registered for equilibria of this type, with the
    list of what is.
    """
    for entry in registered(type(equilibrium)):
        if entry.default:
            return entry.factory(equilibrium, problem)
    raise _not_registered(equilibrium)


def pipeline_named(
    name: str, equilibrium: AbstractEquilibrium, problem: AbstractBilevelProblem
) -> AbstractPipeline:
    """The pipeline registered under `name`."""
    for entry in registered(type(equilibrium)):
        if entry.name == name:
            return entry.factory(equilibrium, problem)
    raise _not_registered(equilibrium, name)


def check_pair(equilibrium: AbstractEquilibrium, pipeline: AbstractPipeline) -> None:
    """Refuses a pipeline that can only aim at an equilibrium of another kind."""
    aims_at = type(pipeline).aims_at
    if aims_at is not None and not isinstance(equilibrium, aims_at):
        kinds = " and ".join(f"`{kind.__name__}`" for kind in aims_at)
        raise ValueError(
            f"`{type(pipeline).__name__}` aims at {kinds}, and not at "
            f"`{type(equilibrium).__name__}`. These are registered:\n{registered()}"
        )


def _not_registered(equilibrium, name: str | None = None) -> ValueError:
    concept = type(equilibrium).__name__
    what = "pipeline" if name is None else f"pipeline `{name}`"
    return ValueError(
        f"No {what} is registered for `{concept}`. Pass one as `solve(..., "
        "pipeline=...)`, or add it with `register`. These are registered:\n"
        f"{registered()}"
    )
