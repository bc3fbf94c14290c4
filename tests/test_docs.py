"""The documentation: that it is complete, and that what it shows runs."""

import re
import types
from pathlib import Path

import jax
import pytest

import bilevel_eqx as blx
import bilevel_eqx.tasks


DOCS = Path(__file__).parent.parent / "docs"


def _public_names(module):
    return {
        f"{module.__name__}.{name}"
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }


def _plot_names():
    # Read and not imported: the tests do not need matplotlib.
    source = (Path(blx.__file__).parent / "plot" / "__init__.py").read_text()
    return {f"bilevel_eqx.plot.{name}" for name in re.findall(r"(\w+) as \1\b", source)}


def _documented_names():
    pages = [page.read_text() for page in sorted((DOCS / "api").glob("*.md"))]
    return re.findall(r"^::: (\S+)$", "\n".join(pages), re.MULTILINE)


MODULES = (blx, blx.pipelines, blx.reports, bilevel_eqx.tasks)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_public_name_is_documented(module):
    assert _public_names(module) - set(_documented_names()) == set()


def test_every_plot_is_documented():
    assert _plot_names() - set(_documented_names()) == set()


def test_nothing_else_is_documented_nor_anything_twice():
    documented = _documented_names()
    assert len(set(documented)) == len(documented)
    public = _plot_names().union(*map(_public_names, MODULES))
    assert set(documented) - public == set()


@pytest.fixture
def as_a_user():
    """The settings that a user's session starts with, and not those of the tests."""
    x64 = jax.config.read("jax_enable_x64")
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        # Not `jax.enable_x64(False)`, which would overrule a page that enables it.
        jax.config.update("jax_enable_x64", False)
        yield
        jax.config.update("jax_enable_x64", x64)


@pytest.mark.parametrize(
    "name",
    (
        *("index", "extending", "right", "roots"),
        pytest.param("equations", marks=pytest.mark.slow),
        pytest.param("batches", marks=pytest.mark.slow),
        pytest.param("devices", marks=pytest.mark.slow),
    ),
)
def test_pages_run(name, as_a_user):
    page = DOCS / f"{name}.md"
    text = page.read_text()
    namespace = {"__name__": name}
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    assert blocks
    for block in blocks:
        # Empty lines before it, so that a traceback has the line of the page.
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], str(page), "exec"), namespace)
