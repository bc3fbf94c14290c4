"""The documentation: that it is complete, and that what it shows runs."""

import contextlib
import importlib.util
import io
import re
import shutil
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


def _pages():
    """Every page with code in it, by its path."""
    pages = (page for page in DOCS.rglob("*.md") if "```python\n" in page.read_text())
    # The code of the gallery is that of its scripts. It and the pictures have tests of
    # their own.
    others = (DOCS / "gallery", DOCS / "api" / "plot.md")
    return sorted(page for page in pages if not {page, page.parent} & set(others))


QUICK = ("index.md",)  # The first that a user runs.
_BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", re.M | re.S)
_NUMBER = re.compile(r"(?<![\w.])[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?(?!\w)")


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(
            page,
            id=page.relative_to(DOCS).as_posix(),
            marks=() if page.name in QUICK else pytest.mark.slow,
        )
        for page in _pages()
    ],
)
def test_pages_run(page, as_a_user, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for what a page writes
    text = page.read_text()
    namespace = {"__name__": page.stem}
    for block in _BLOCK.finditer(text):
        if page.name == "programs.md":  # each is a program by itself
            assert block[1].count("\n") <= 40
            namespace = {"__name__": page.stem}
        packages = re.findall(r"^(?:from|import) (\w+)", block[1], re.MULTILINE)
        missing = {name for name in packages if importlib.util.find_spec(name) is None}
        if "sklearn" in missing:
            pytest.skip("The rest of the page needs scikit-learn.")
        if missing:  # a recipe for a package that is no dependency
            continue
        # Empty lines before it, so that a traceback has the line of the page.
        line = text.count("\n", 0, block.start(1))
        code = compile("\n" * line + block[1], str(page), "exec")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, namespace)
        if block[2] is not None:
            _assert_alike(printed.getvalue(), block[2])
    for expression in _in_last_columns(text) if page.name == "coming_from.md" else ():
        eval(compile(expression, expression, "eval"), namespace)


def _assert_alike(printed, shown):
    """What a page shows is what was printed, but for line breaks and small differences of
    numbers. A line of three dots stands for anything. A number after a tilde stands
    for any number: it is a time that was measured."""
    pattern, numbers, number = "", [], rf"\s*({_NUMBER.pattern})\s*"
    for part in re.split(r"(^\s*\.\.\.\s*$|~\d+)", shown, flags=re.MULTILINE):
        if part.strip() == "...":
            pattern += ".*"
        elif part.startswith("~"):
            pattern += r"\d+"
        else:
            numbers += map(float, _NUMBER.findall(part))
            words = (word.split() for word in _NUMBER.split(part))
            words = (r"\s*".join(map(re.escape, word)) for word in words)
            pattern += r"\s*" + number.join(words) + r"\s*"
    found = re.fullmatch(pattern, printed, re.DOTALL)
    assert found, f"The page shows\n{shown}\nand its code prints\n{printed}"
    for number, shown_number in zip(map(float, found.groups()), numbers, strict=True):
        # Residuals are zero to rounding, which differs from one machine to another.
        zero = max(abs(number), abs(shown_number)) < 1e-4
        assert zero or number == pytest.approx(shown_number, rel=0.05), printed


def _in_last_columns(text):
    """The code in the last columns of tables that calls something."""
    for row in re.findall(r"^\|.*\|$", text, re.MULTILINE):
        for code in re.findall(r"`([^`]+)`", row.rsplit(" | ", 1)[-1]):
            if "(" in code:
                yield code


def test_the_readme_shows_the_code_of_the_home_page():
    readme = (DOCS.parent / "README.md").read_text()
    home = (DOCS / "index.md").read_text()
    blocks = re.findall(r"```(?:python|text)\n.*?```", home, re.DOTALL)
    assert len(blocks) == 4
    assert all(block in readme for block in blocks)


def test_the_version_is_the_same_everywhere():
    project = (DOCS.parent / "pyproject.toml").read_text()
    citation = (DOCS / "CITATION.cff").read_text()
    changes = (DOCS / "changelog.md").read_text()
    patterns = (r'^version = "(.*)"$', r"^version: (.*)$", r"^## ([\d.]+)")
    versions = {
        re.search(pattern, text, re.MULTILINE)[1]
        for pattern, text in zip(patterns, (project, citation, changes), strict=True)
    }
    assert len(versions) == 1


def test_dead_links_are_found(tmp_path, monkeypatch):
    pytest.importorskip("mkdocs", reason="This needs the extra `docs`.")
    monkeypatch.syspath_prepend(str(DOCS))
    links = importlib.import_module("links")
    (tmp_path / "sub").mkdir()
    good = '<h1 id="top"></h1><a href="sub/#here"></a><a href="https://else.where/x">'
    (tmp_path / "index.html").write_text(good)
    sub = '<p id="here"><a href="../#top"></a><a href="../#off"></a><img src="no.png">'
    (tmp_path / "sub" / "index.html").write_text(sub)
    (tmp_path / "404.html").write_text('<a href="/base/sub/"></a>')
    assert links.dead_links(tmp_path, "base/") == [
        "sub/index.html links to ../#off: no anchor",
        "sub/index.html links to no.png: no such file",
    ]


def test_pictures_are_links_to_themselves(monkeypatch):
    pytest.importorskip("mkdocs", reason="This needs the extra `docs`.")
    monkeypatch.syspath_prepend(str(DOCS))
    links = importlib.import_module("links")
    image = '<img alt="A &gt; B" src="../figures/a.png" width="9" />'
    page = links.on_page_content(f"<p>{image}</p>", page=None, config=None, files=None)
    assert page == f'<p><a class="picture" href="../figures/a.png">{image}</a></p>'


def test_signatures_are_as_written(monkeypatch):
    """And not as Python sees them: such a default has thousands of characters."""
    pytest.importorskip("griffe", reason="This needs the extra `docs`.")
    monkeypatch.syspath_prepend(str(DOCS))
    written = importlib.import_module("signatures")._Written(DOCS.parent, "bilevel_eqx")
    descent = written.of("bilevel_eqx._pipeline.null_space.NullSpaceDescent.__init__")
    kinds = "optax.GradientTransformation | AbstractDescent"
    assert descent["optimiser"] == (kinds, "LBFGS()")  # a field of its base class
    solve = written.of("bilevel_eqx._solve.solve.solve")
    assert solve["num_steps"] == ("int", None)
    assert solve["throw"] == ("bool", "True")
    assert solve["return"] == ("Solution[X, Y]", None)
    # A name that is not public is spelled out if that is short.
    assert solve["record"][1] == "record_metrics"
    assert written.of("bilevel_eqx._equilibrium.base.certify")["max_products"][1] == "128"
    ascent = written.of("bilevel_eqx._pipeline.penalty.PenaltyAscent.__init__")
    falling = "optax.adam(lambda count: 0.02 / (1 + count / 1000))"
    assert ascent["optimiser"][1] == falling
    # And the text of a constant is its own, and not that of `tuple`.
    assert written.constants["CLASS_COLOURS"] == "One colour for each class."


def test_no_line_begins_with_the_mark_after_a_formula(monkeypatch):
    pytest.importorskip("mkdocs", reason="This needs the extra `docs`.")
    monkeypatch.syspath_prepend(str(DOCS))
    mathematics = importlib.import_module("mathematics")
    if shutil.which("node") is None or not mathematics.CACHE.exists():
        pytest.skip("This needs Node.js, and KaTeX as the build of the site keeps it.")
    page = (
        r'<span class="arithmatex">\(x = y\)</span>, <div class="arithmatex">\[z\]</div>'
    )
    written = mathematics.formulas_set({DOCS: page})[DOCS]
    # Within the last part, in which a browser does not break a line.
    last = written.split('<span class="base">')[2]
    assert '<span class="mark">,</span></span></span></span></span> <div' in last
    assert "\\(" not in written and "\\[" not in written
