"""The imports between the floors of the package, and the picture of them.

`docs/architecture.md` lists the floors in order. This file reads that list and the
imports of the package. `mkdocs` calls it when it builds that page, so that the picture is
of the present source. `python docs/imports.py` prints the same as text.
"""

import ast
import re
from collections.abc import Mapping
from pathlib import Path


ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "bilevel_eqx"
PAGE = ROOT / "docs" / "architecture.md"

_PLACEHOLDER = "<!-- the picture of imports -->"


#
# What the page says
#


def floors(page: str) -> dict[str, list[str]]:
    """The floors that the page lists, in order, each with its files in order."""
    table = page.partition("## The floors")[2].partition("\n## ")[0]
    found = {}
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        names = re.findall(r"`([\w/.]+)`", cells[0])
        if len(cells) == 3 and len(names) == 1:
            (name,) = names
            files = re.findall(r"`(\w+)`", cells[1])
            found[name] = [f"{name}{file}.py" for file in files] or [name]
    return found


def floor_of(file: str) -> str:
    """The floor that a file is on: its folder, or the file itself."""
    folder, slash, _ = file.partition("/")
    return folder + slash


#
# What the package does
#


def imports(package: Path = PACKAGE) -> dict[str, set[str]]:
    """Which files of the package each of its files imports, wherever it does so.

    Files are named by their path in the package. Empty ones are left out.
    """
    files = {path.relative_to(package).as_posix(): path for path in package.rglob("*.py")}
    sources = {name: path.read_text() for name, path in sorted(files.items())}
    sources = {name: text for name, text in sources.items() if text.strip()}
    return {
        name: {
            target
            for module in _imported_modules(name, ast.parse(text), package.name)
            if (target := _file(module, sources)) not in (None, name)
        }
        for name, text in sources.items()
    }


def _imported_modules(file: str, tree: ast.AST, package: str):
    """The modules of the package that a file may mean, as paths within the package."""
    folder = Path(file).parent
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first, *rest = alias.name.split(".")
                if first == package:
                    yield Path(*rest)
        elif isinstance(node, ast.ImportFrom):
            parts = node.module.split(".") if node.module else []
            if node.level > 0:
                base = folder.joinpath(*[".."] * (node.level - 1), *parts)
                base = Path(*_without_dots(base.parts))
            elif parts[0] == package:
                base = Path(*parts[1:])
            else:
                continue
            # `from a import b` means the module b, if there is one, and else a.
            for alias in node.names:
                yield base / alias.name


def _without_dots(parts: tuple[str, ...]) -> list[str]:
    kept: list[str] = []
    for part in parts:
        if part == "..":
            kept.pop()
        else:
            kept.append(part)
    return kept


def _file(module: Path, sources: Mapping[str, str]) -> str | None:
    for path in (module, module.parent):
        for name in (f"{path.as_posix()}.py", (path / "__init__.py").as_posix()):
            if name in sources:
                return name
    return None


#
# The one beside the other
#


def back_arrows(graph: Mapping[str, set[str]], order: list[str]) -> list[tuple[str, str]]:
    """The imports of a file that does not come earlier in the order."""
    place = {name: i for i, name in enumerate(order)}
    return [
        (file, target)
        for file, targets in graph.items()
        for target in sorted(targets)
        if place[target] >= place[file]
    ]


def between_floors(graph: Mapping[str, set[str]]) -> set[tuple[str, str]]:
    """The pairs of floors of which the first imports from the second."""
    pairs = {(floor_of(a), floor_of(b)) for a, targets in graph.items() for b in targets}
    return {(a, b) for a, b in pairs if a != b}


#
# The picture
#


_CELL, _LEFT, _TOP, _RIGHT = 20, 140, 120, 60


def picture(names: list[str], pairs: set[tuple[str, str]]) -> str:
    """A table of floors by floors, as SVG. A dot says that the row imports the column."""
    side = _CELL * len(names)
    width, height = _LEFT + side + _RIGHT, _TOP + side
    parts = [
        f'<svg class="imports" viewBox="0 0 {width} {height}" width="{width}" role="img" '
        'xmlns="http://www.w3.org/2000/svg" '
        'aria-label="Which floor imports from which: all dots lie below the diagonal.">'
    ]
    for i, row in enumerate(names):
        y = _TOP + _CELL * i + _CELL / 2
        x = _LEFT + _CELL * i + _CELL / 2
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4}">{row}</text>')
        turned = f'transform="rotate(-60 {x} {_TOP - 8})"'
        parts.append(f'<text class="top" x="{x}" y="{_TOP - 8}" {turned}>{row}</text>')
        parts.append(
            f'<rect x="{x - _CELL / 2}" y="{y - _CELL / 2}" '
            f'width="{_CELL}" height="{_CELL}"/>'
        )
        for j, column in enumerate(names):
            if (row, column) in pairs:
                kind = ' class="back"' if j > i else ""
                title = f"<title>{row} imports from {column}</title>"
                center = _LEFT + _CELL * j + _CELL / 2
                dot = f'<circle{kind} cx="{center}" cy="{y}" r="5">{title}</circle>'
                parts.append(dot)
    return "".join([*parts, "</svg>"])


def on_page_markdown(markdown: str, *, page, config, files) -> str:
    """Called by mkdocs: puts the picture into its page."""
    del page, config, files
    if _PLACEHOLDER not in markdown:
        return markdown
    drawing = picture(list(floors(markdown)), between_floors(imports()))
    # A block of HTML, or Markdown would take underscores in it for emphasis.
    return markdown.replace(_PLACEHOLDER, f"<div>{drawing}</div>")


def main() -> None:
    names = list(floors(PAGE.read_text()))
    pairs = between_floors(imports())
    for name in names:
        targets = [other for other in names if (name, other) in pairs]
        print(f"{name:<18} {' '.join(targets)}")


if __name__ == "__main__":
    main()
