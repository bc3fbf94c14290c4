"""A Griffe extension: signatures as they were written, and not as Python sees them.

The API pages are made by importing the package, since the docstrings of `__init__` are
set at run time. But there `ScalarLike` is a union of eight types, `X` is `~X`, a field
with a converter has forgotten its type, and a default such as `LBFGS()` is everything
that it holds. So annotations and defaults come from the source.
"""

import ast
import inspect
import itertools
from pathlib import Path

import griffe


_package = "bilevel_eqx"


class Signatures(griffe.Extension):
    """Replaces annotations, defaults and docstrings of what was inspected by those in the
    source."""

    def __init__(self) -> None:
        root = Path(__file__).parent.parent
        self.written = _Written(root, _package)

    def on_function(self, *, func: griffe.Function, **kwargs) -> None:
        del kwargs
        written = self.written.of(func.path)
        for parameter in func.parameters:
            annotation, default = written.get(parameter.name, (None, None))
            if annotation is not None:
                parameter.annotation = annotation
            if parameter.default is not None and default is not None:
                parameter.default = default
            if parameter.name == "self":
                parameter.annotation = None
        if func.name == "__init__":
            func.returns = None
        elif "return" in written:
            func.returns = written["return"][0]

    def on_attribute(self, *, attr: griffe.Attribute, **kwargs) -> None:
        del kwargs
        # What was inspected is the docstring of the type of the value.
        if attr.name in self.written.constants:
            text = self.written.constants[attr.name]
            attr.docstring = griffe.Docstring(text, parent=attr)


# The annotation and the default of each parameter or field.
Signature = dict[str, tuple[str | None, str | None]]


class _Written:
    """The functions of a package, and its classes, whose fields are their signatures."""

    def __init__(self, root: Path, package: str) -> None:
        self.functions: dict[str, Signature] = {}
        self.classes: dict[str, ast.ClassDef] = {}
        # The docstring below each constant of a module, by the constant's name.
        self.constants: dict[str, str] = {}
        for file in sorted((root / package).rglob("*.py")):
            parts = file.relative_to(root).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            self._read(ast.parse(file.read_text()), ".".join(parts))

    def _read(self, tree: ast.AST, path: str) -> None:
        for node in ast.iter_child_nodes(tree):
            if isinstance(node, ast.FunctionDef):
                self.functions[f"{path}.{node.name}"] = _signature(node)
            elif isinstance(node, ast.ClassDef):
                self.classes[f"{path}.{node.name}"] = node
                self._read(node, f"{path}.{node.name}")

        for node, below in itertools.pairwise(ast.iter_child_nodes(tree)):
            if isinstance(node, ast.Assign) and isinstance(below, ast.Expr):
                if isinstance(below.value, ast.Constant):
                    name = ast.unparse(node.targets[0])
                    self.constants[name] = inspect.cleandoc(below.value.value)

    def of(self, path: str) -> Signature:
        """That of the function at `path`, or the fields that it is made from."""
        if path in self.functions:
            return self.functions[path]
        owner = self.classes.get(path.removesuffix(".__init__"))
        return {} if owner is None else self._fields(owner)

    def _fields(self, owner: ast.ClassDef) -> Signature:
        """The fields of a class, and those that it inherits within the package."""
        named = {node.name: node for node in self.classes.values()}
        found: Signature = {}
        for base in owner.bases:
            name = ast.unparse(base).partition("[")[0]
            found |= self._fields(named[name]) if name in named else {}
        for child in owner.body:
            if isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
                annotation = ast.unparse(child.annotation)
                found[child.target.id] = annotation, _default(child.value)
        return found


def _signature(function: ast.FunctionDef) -> Signature:
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    # The last ones have the defaults.
    missing = [None] * (len(positional) - len(arguments.defaults))
    defaults = [*missing, *arguments.defaults, *arguments.kw_defaults]
    found: Signature = {
        argument.arg: (_text(argument.annotation), _text(default))
        for argument, default in zip([*positional, *arguments.kwonlyargs], defaults)
    }
    if function.returns is not None:
        found["return"] = ast.unparse(function.returns), None
    return found


def _default(value: ast.expr | None) -> str | None:
    """The default of a field: what it is set to, or the `default` of an `eqx.field`."""
    if isinstance(value, ast.Call) and ast.unparse(value.func).endswith("field"):
        given = [key.value for key in value.keywords if key.arg == "default"]
        value = given[0] if given else None
    return _text(value)


def _text(node: ast.expr | None) -> str | None:
    return None if node is None else ast.unparse(node)
