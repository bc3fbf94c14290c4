"""What comes with `import bilevel_eqx`, and what does not."""

import importlib.metadata
import inspect
import re
import subprocess
import sys
import types
from pathlib import Path

import equinox as eqx
import pytest

import bilevel_eqx as blx
from bilevel_eqx import tasks


MODULES = {
    "bilevel_eqx": blx,
    "pipelines": blx.pipelines,
    "reports": blx.reports,
    "tasks": tasks,
}
each_module = pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)


def _public(module):
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }


@pytest.fixture(scope="module")
def fresh():
    """What an interpreter of its own says after the import. Here, others may have
    imported anything; and an imported submodule is an attribute too."""
    code = (
        "import sys, bilevel_eqx as blx\n"
        "print(','.join(sorted(m.split('.')[0] for m in sys.modules)))\n"
        "from jax._src import xla_bridge\n"
        "print(xla_bridge.backends_are_initialized())\n"
        "print(','.join(dir(blx)))\n"
        "print(type(blx.pipelines.NullSpaceDescent()).__name__)\n"
        "print(blx.reports.Comparison.__name__)\n"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout.split()


def test_import_is_light(fresh):
    modules, started, *_ = fresh
    assert "bilevel_eqx" in modules.split(",")
    assert "matplotlib" not in modules.split(",")
    # Whoever sets a platform or a precision after the import must still be heard.
    assert started == "False"


def test_typed_marker():
    assert (Path(blx.__file__).parent / "py.typed").is_file()


def test_version():
    assert blx.__version__ == importlib.metadata.version("bilevel_eqx")


def test_public_names():
    # The names that are promised; there may be more.
    promised = """
        AbstractBilevelProblem BilevelProblem AbstractLeastSquaresProblem
        LeastSquaresProblem inner_hessian cross_derivative response_jacobian Neumann
        TruncatedCG Pseudoinverse IdentityInverse Implicit Proximal Unrolled Fixed
        best_response hypergradient GradientDescent Projection ColdStart WarmStart
        AbstractPipeline GradientPipeline register default_pipeline registered solve
        Solution certify RESULTS
    """
    assert set(promised.split()) <= set(_public(blx))


def test_no_more_public_names_than_can_be_overlooked():
    assert len(dir(blx)) <= 55


def test_dir_shows_the_public_names_and_nothing_else(fresh):
    assert fresh[2].split(",") == sorted({*_public(blx), "pipelines", "reports"})
    for name in dir(blx):
        value = getattr(blx, name)
        own = value.__name__ if isinstance(value, types.ModuleType) else value.__module__
        assert own.startswith("bilevel_eqx.")


def test_submodules_come_with_the_package(fresh):
    assert fresh[3:] == ["NullSpaceDescent", "Comparison"]
    # And nothing is there twice.
    for module in (blx.pipelines, blx.reports):
        assert _public(module).keys() & _public(blx).keys() == set()


@pytest.mark.parametrize("name", ("__init__", "pipelines", "reports"))
def test_public_modules_hold_sorted_imports(name):
    source = Path(blx.__file__).with_name(f"{name}.py").read_text()
    imports = re.findall(r"^from (\.\S*) import", source, re.MULTILINE)
    assert imports and imports == sorted(imports)
    # No name is made there.
    module = blx if name == "__init__" else getattr(blx, name)
    made = [n for n, v in _public(module).items() if v.__module__ == module.__name__]
    assert made == []


@each_module
def test_every_public_name_has_a_docstring(module):
    for name, value in _public(module).items():
        if isinstance(value, type) or callable(value):
            # Not one that is inherited from a base class that says something else.
            doc = vars(value).get("__doc__") if isinstance(value, type) else value.__doc__
            assert doc and doc.strip(), name


@each_module
def test_every_method_has_a_docstring(module):
    inherited = {"init", "step", "certify", "compute", "transpose", "conj", "terminate"}
    inherited |= {"postprocess", "assume_full_rank", "best_response", "reaches"}
    inherited |= {"outer", "inner", "inner_residual", "root", "check", "field", "select"}
    inherited |= {"propose", "judge", "outer_derivatives"}
    inherited |= {f"{a}_{b}" for a in ("inner", "outer") for b in ("losses", "penalty")}
    for name, value in _public(module).items():
        if not (isinstance(value, type) and issubclass(value, eqx.Module)):
            continue
        for method, fn in vars(value).items():
            if method.startswith("_") or not inspect.isfunction(inspect.unwrap(fn)):
                continue
            # What implements an abstract method is documented there.
            bases = value.__mro__[1:]
            if method in inherited and any(hasattr(base, method) for base in bases):
                continue
            assert fn.__doc__ and fn.__doc__.strip(), f"{name}.{method}"
