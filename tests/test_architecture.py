"""The architecture: files import only from above, and its page describes the code."""

import importlib.util
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import jax.numpy as jnp
import pytest

import bilevel_eqx as blx


ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text()


def _load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = _load(ROOT / "docs" / "imports.py")
FLOORS = tool.floors(PAGE)
ORDER = [file for files in FLOORS.values() for file in files]
GRAPH = tool.imports()


def _circle(graph):
    """Whether what is left has no file that imports nothing of the rest."""
    left = dict(graph)
    while free := [file for file, targets in left.items() if not targets & left.keys()]:
        for file in free:
            del left[file]
    return sorted(left)


def test_page_names_every_file():
    assert sorted(ORDER) == sorted(GRAPH), "Mend the table of docs/architecture.md."


def test_imports_come_from_above():
    # Also within a floor.
    assert tool.back_arrows(GRAPH, ORDER) == []


def test_no_circle():
    assert _circle(GRAPH) == []


def test_nothing_below_imports_the_audits():
    importers = {a for a, targets in GRAPH.items() for b in targets if "_trust/" in b}
    # Pictures are of what they return.
    importers = {file for file in importers if not file.startswith(("_trust/", "plot/"))}
    assert importers == {"reports.py", "__init__.py"}


def test_tasks_and_plots_are_imported_by_nothing():
    for folder in ("tasks/", "plot/"):
        importers = {a for a, targets in GRAPH.items() for b in targets if folder in b}
        assert {tool.floor_of(file) for file in importers} <= {folder}


def test_faults_are_found(tmp_path):
    package = tmp_path / "house"
    sources = {
        "__init__.py": "from ._top.a import a as a",
        "_top/__init__.py": "",
        "_top/a.py": "def a():\n    from .._bottom import b\n",
        "_top/c.py": "import house._top.a, os",
        "_bottom.py": "from . import x\nfrom ._top import c\nfrom house._top.a import a",
    }
    for name, text in sources.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    graph = tool.imports(package)
    assert graph == {
        "__init__.py": {"_top/a.py"},
        "_top/a.py": {"_bottom.py"},
        "_top/c.py": {"_top/a.py"},
        "_bottom.py": {"__init__.py", "_top/a.py", "_top/c.py"},
    }
    order = ["_top/a.py", "_top/c.py", "_bottom.py", "__init__.py"]
    arrows = [("_bottom.py", "__init__.py"), ("_top/a.py", "_bottom.py")]
    assert sorted(tool.back_arrows(graph, order)) == arrows
    assert _circle(graph) == sorted(graph)
    pairs = tool.between_floors(graph)
    assert ("_top/", "_bottom.py") in pairs
    drawing = tool.picture(["_top/", "_bottom.py", "__init__.py"], pairs)
    assert drawing.count('class="back"') == 2


@pytest.mark.slow
def test_picture_is_in_the_page():
    page = tool.on_page_markdown(PAGE, page=None, config=None, files=None)
    drawing = ElementTree.fromstring(re.search("<svg.*</svg>", page).group())
    dots = [child for child in drawing if child.tag.endswith("circle")]
    assert len(dots) == len(tool.between_floors(GRAPH))
    assert not any("class" in dot.attrib for dot in dots)


#
# The two roads
#


def _road(title):
    """The rooms of a road, in order, and all files that its text names."""
    text = PAGE.partition(f"## {title}")[2].partition("\n## ")[0]
    rooms = re.findall(r"^\d+\. \*\*`([\w/.]+)`\*\*", text, re.MULTILINE)
    return rooms, set(re.findall(r"`([\w/]+\.py)`", text))


def _walk(call):
    """The files of the package that `call` enters, in order, at each entry."""
    inside = str(Path(blx.__file__).parent) + "/"
    entered = []

    # Called for each call of a Python function and, since it returns nothing, for no line
    # of it. A profiler would be called for all returns and for C functions, too.
    def note(frame, event, _):
        file = frame.f_code.co_filename
        # Not the bodies of classes and the generated methods of dataclasses.
        if file.startswith(inside):
            entered.append(file.removeprefix(inside))

    before = sys.gettrace()
    sys.settrace(note)
    try:
        call()
    finally:
        sys.settrace(before)
    return entered


def _is_subsequence(rooms, entered):
    entries = iter(entered)
    return all(any(room == file for file in entries) for room in rooms)


def _problem():
    # Made anew, so that nothing is compiled yet and every room is entered.
    return blx.BilevelProblem(
        lambda x, y: jnp.sum((y - 1) ** 2),
        lambda x, y: jnp.sum((y[:1] * jnp.sin(y[1:]) - x) ** 2) + jnp.sum(y**2),
    )


def _one_hypergradient():
    response = blx.Implicit(blx.Projection(), blx.Pseudoinverse())
    blx.hypergradient(_problem(), jnp.ones(2), jnp.ones(3), response)


def _one_solve():
    blx.solve(_problem(), blx.ColdStart(), jnp.ones(2), jnp.ones(3), num_steps=2)


ROADS = {
    "The road of one hypergradient": _one_hypergradient,
    "The road of one solve": _one_solve,
}


@pytest.mark.slow
@pytest.mark.parametrize("title", ROADS)
def test_roads_are_those_of_the_code(title):
    rooms, named = _road(title)
    assert 0 < len(rooms) <= 9
    entered = _walk(ROADS[title])
    assert _is_subsequence(rooms, entered)
    assert not _is_subsequence(rooms[::-1], entered)
    # Nothing on the way is left out.
    _, first = _road("The road of one hypergradient")
    tools = set(re.findall(r"`([\w/]+\.py)`", PAGE.partition("Some tools are used")[2]))
    assert set(entered) - named - first - tools == set()
