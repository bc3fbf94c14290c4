"""A Griffe extension: signatures as they were written, and not as Python sees them.

The API pages are made by importing the package, since the docstrings of `__init__` are
set at run time. But there `ScalarLike` is a union of eight types, `X` is `~X`, a field
with a converter has forgotten its type, and a default such as `LBFGS()` is everything
that it holds. So annotations and defaults come from the source; and where a default is a
name that a user cannot import, what it stands for.
"""

import ast
import collections
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
        # What the name of a number, or of a function that is one expression, stands for
        # in each module that has it.
        self.values: dict[str, set[str]] = collections.defaultdict(set)
        for file in sorted((root / package).rglob("*.py")):
            parts = file.relative_to(root).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            tree = ast.parse(file.read_text())
            self._read(tree, ".".join(parts))
            for name, value in filter(None, map(_named_value, tree.body)):
                self.values[name].add(value)

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
        owner = self.classes.get(path.removesuffix(".__init__"))
        fields = {} if owner is None else self._fields(owner)
        found = self.functions.get(path, fields)
        return {name: (kind, self._spelled_out(d)) for name, (kind, d) in found.items()}

    def _spelled_out(self, default: str | None) -> str | None:
        if default is None:
            return None
        tree = ast.parse(default, mode="eval")
        return ast.unparse(_SpellOut(self.values).visit(tree))

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


class _SpellOut(ast.NodeTransformer):
    """Replaces names by what they stand for."""

    def __init__(self, values: dict[str, set[str]]) -> None:
        self.values = values

    def visit_Name(self, node: ast.Name) -> ast.expr:
        found = self.values.get(node.id, set())
        # A name with two meanings stays, and one for what would fill the signature.
        if len(found) != 1 or len(*found) > 60:
            return node
        return ast.parse(*found, mode="eval").body


def _named_value(node: ast.AST) -> tuple[str, str] | None:
    """The name and the number, or the function as a lambda, of a simple definition."""
    match node:
        case ast.Assign(targets=[ast.Name(name)], value=ast.Constant() as value):
            return name, ast.unparse(value)
        case ast.FunctionDef(name, body=[*_, ast.Return(ast.expr() as value)] as body):
            # One expression, maybe below a docstring.
            if len(body) == 1 or (len(body) == 2 and isinstance(body[0], ast.Expr)):
                names = ", ".join(argument.arg for argument in node.args.args)
                return name, f"lambda {names}: {ast.unparse(value)}"
    return None


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
