"""A Griffe extension: signatures as they were written, and not as Python sees them.

The API pages are made by importing the package, since the docstrings of `__init__` are
set at run time. But there `ScalarLike` is a union of eight types, `X` is `~X`, and a
field with a converter has forgotten its type. So annotations come from the source.
"""

import ast
from pathlib import Path

import griffe


_package = "bilevel_eqx"


class Signatures(griffe.Extension):
    """Replaces the annotations of what was inspected by those in the source."""

    def __init__(self) -> None:
        root = Path(__file__).parent.parent
        self.written = _Written(root, _package)

    def on_function(self, *, func: griffe.Function, **kwargs) -> None:
        del kwargs
        annotations = self.written.annotations(func.path)
        for parameter in func.parameters:
            if parameter.name in annotations:
                parameter.annotation = annotations[parameter.name]
            if parameter.name == "self":
                parameter.annotation = None
        if func.name == "__init__":
            func.returns = None
        elif "return" in annotations:
            func.returns = annotations["return"]


class _Written:
    """The annotations of a package's functions, and of its classes' fields."""

    def __init__(self, root: Path, package: str) -> None:
        self.functions: dict[str, dict[str, str]] = {}
        self.fields: dict[str, dict[str, str]] = {}
        for file in sorted((root / package).rglob("*.py")):
            parts = file.relative_to(root).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            self._read(ast.parse(file.read_text()), ".".join(parts))

    def _read(self, tree: ast.AST, path: str) -> None:
        for node in ast.iter_child_nodes(tree):
            if isinstance(node, ast.FunctionDef):
                arguments = node.args
                found = {
                    a.arg: ast.unparse(a.annotation)
                    for a in [*arguments.args, *arguments.kwonlyargs]
                    if a.annotation is not None
                }
                if node.returns is not None:
                    found["return"] = ast.unparse(node.returns)
                self.functions[f"{path}.{node.name}"] = found
            elif isinstance(node, ast.ClassDef):
                self.fields[f"{path}.{node.name}"] = {
                    child.target.id: ast.unparse(child.annotation)
                    for child in node.body
                    if isinstance(child, ast.AnnAssign)
                    and isinstance(child.target, ast.Name)
                }
                self._read(node, f"{path}.{node.name}")

    def annotations(self, path: str) -> dict[str, str]:
        """Those of the function at `path`, or of the fields that it is made from."""
        owner = path.removesuffix(".__init__")
        return self.functions.get(path, self.fields.get(owner, {}))
