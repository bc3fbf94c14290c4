"""What is shown while a run goes on, and how long it took."""

import functools as ft
import io
import re
import sys
import types
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import Array

import bilevel_eqx as blx
from bilevel_eqx._solve import bar, segments


class Cliff(blx.AbstractBilevelProblem):
    """x moves by 0.1 a step, y follows at once, and F = -y; up to the edge."""

    edge: Array

    def outer(self, x, y):
        return jnp.where(y > self.edge, jnp.nan, -y)

    def inner(self, x, y):
        return 0.5 * (y - x) ** 2


step = blx.Unrolled(optax.sgd(1.0), 1)
march = blx.GradientPipeline(step, optax.sgd(0.1))
zero = jnp.array(0.0)


def _march(edge=np.inf, num_steps=15, **options):
    return blx.solve(
        Cliff(jnp.asarray(edge)),
        blx.WarmStart(),
        options.pop("x0", zero),
        zero,
        pipeline=march,
        num_steps=num_steps,
        **{"progress": True, "throw": False, "certify": False, **options},
    )


class Terminal(io.StringIO):
    """What an emulated terminal has been sent."""

    def isatty(self):
        return True

    @property
    def frames(self):
        """All that has stood on any line, in order."""
        return [text.strip() for text in re.split("[\r\n]", self.getvalue())]

    @property
    def lines(self):
        """What stands there at the end."""
        texts = [line.split("\r") for line in self.getvalue().split("\n")]
        last = [[t for t in line if t != ""][-1:] for line in texts]
        return [t[0].strip() for t in last if t and t[0].strip() != ""]


@pytest.fixture
def terminal(monkeypatch):
    """In place of the standard error, which pytest replaces. The bar is drawn anew at
    each update, and segments are of six steps."""
    terminal = Terminal()
    options = {"file": terminal, "mininterval": 0, "ncols": 120}
    monkeypatch.setattr(bar, "_tqdm", ft.partial(bar._tqdm, **options))
    monkeypatch.setattr(segments._Pace, "end", lambda self, done, every: done + self.n)
    monkeypatch.setattr(segments._Pace, "n", 0, raising=False)
    monkeypatch.setattr(segments._Pace, "took", lambda p, *_: setattr(p, "n", 6))
    return terminal


def _figures(frame):
    """The step, F and the outer residual that a frame shows."""
    match = re.search(r"(\d+)/\d+ \[.*, F (\S+), inner (\S+), outer ([^\]]+)\]", frame)
    return None if match is None else tuple(float(match[i]) for i in (1, 2, 4))


def test_bar(terminal):
    solution = _march(certify=True)
    compiling = [f for f in terminal.frames if f.startswith("compiling:   0%")]
    assert compiling and terminal.frames.index(compiling[0]) < 4
    found = [_figures(frame) for frame in terminal.frames]
    steps = [(6, -0.6, 1), (12, -1.2, 1), (15, -1.5, 1)]
    assert list(dict.fromkeys(f for f in found if f is not None)) == steps
    # The certificate is told of, and then the line is gone.
    assert "certifying" in terminal.frames
    (line,) = terminal.lines
    assert line.startswith("100%") and _figures(line) == (15, -1.5, 1)
    assert re.search(r"\[00:\d\d<00:00, +\S+ steps/s, F", line)
    assert solution.stats["num_steps"] == 15


def test_a_bar_costs_no_program(terminal):
    """With a bar or without one, it is the same."""
    compiled = []
    _march(progress=False)

    def listen(event: str, duration_secs: float, **_) -> None:
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        _march()
        assert compiled == []
        _march(progress=lambda *_: None)  # To see that it would be heard.
        assert compiled != []
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_silent_where_there_is_no_terminal(capfd):
    _march(certify=True)
    assert capfd.readouterr() == ("", "")


def test_one_line_after_a_failure(terminal):
    solution = _march(1.05)
    assert solution.result == blx.RESULTS.nonfinite_step
    (line,) = terminal.lines
    assert line.startswith("failed:") and _figures(line) == (10, -1, 1)
    # And of one that fails from the start, none: the error says it.
    before = len(terminal.lines)
    with pytest.raises(eqx.EquinoxRuntimeError, match="At outer step 1"):
        _march(0.05, throw=True)
    assert len(terminal.lines) == before


def test_ends_of_a_run(terminal):
    """Also of one that goes on from a checkpoint: what was there is no part of the
    rate."""
    failed = types.SimpleNamespace(failed=jnp.array(False))
    ends = (("converged", True, False), ("interrupted", False, True))
    for number, (said, converged, interrupted) in enumerate(ends):
        shown = bar.Bar(40)
        shown.begins(20)
        shown.segment(None, 20, 30, lambda: {"value": jnp.array(2.0)})
        progress = types.SimpleNamespace(verdict=failed, converged=jnp.array(converged))
        assert shown._bar.format_dict["initial"] == 20
        shown.ends(progress, 20, 30, interrupted)  # pyright: ignore
        shown.close()
        assert terminal.lines[number].startswith(f"{said}:  75%")
        assert "30/40" in terminal.lines[number] and "F 2]" in terminal.lines[number]


def test_bar_in_a_program(terminal):
    run = jax.jit(lambda edge, x0: _march(edge, x0=x0, save_every=4).x)
    # The second is no new program, and has a bar of its own.
    for start in (0.0, 1.0):
        run(jnp.array(np.inf), jnp.array(start)).block_until_ready()
        jax.effects_barrier()
        assert _figures(terminal.lines[-1]) == (15, -1.5 - start, 1)
    assert len(terminal.lines) == 2
    # A batch has one bar, that of the element which is ahead.
    jax.vmap(run, (0, None))(jnp.array([0.65, np.inf]), zero).block_until_ready()
    jax.effects_barrier()
    assert len(terminal.lines) == 3 and "15/15" in terminal.lines[2]
    assert bar.IN_PROGRAMS._bar is None


def test_seconds():
    solution = _march(certify=True, progress=False, save_every=5)
    seconds = {n: solution.stats[f"{n}_seconds"] for n in ("compile", "run", "certify")}
    assert all(eqx.is_array(s) and s.dtype == jnp.float64 for s in seconds.values())
    assert all(0 < s < 600 for s in seconds.values())
    assert solution.stats["save_every"] == 5
    text = str(solution)
    assert re.search(
        r"seconds +\S+ to compile, \S+ to run, \S+ to certify\nCertificate", text
    )
    assert "save_every" not in text and "Array" not in text
    # Under a transformation there is nothing to measure.
    traced = eqx.filter_jit(_march)(progress=False)
    assert not any("seconds" in name for name in traced.stats)
    assert "seconds" not in str(traced)


def test_success_is_called_successful():
    assert str(blx.RESULTS.successful) == "successful"
    assert blx.RESULTS[blx.RESULTS.successful] == "successful"


#
# The recipes of the FAQ
#


def _recipe(module):
    """The code block of the FAQ that imports a module."""
    text = (Path(__file__).parent.parent / "docs" / "faq.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    (block,) = [block for block in blocks if re.search(rf"\b{module}\b", block)]
    return block


class Writer:
    """Stands for a writer of TensorBoard and for a run of Weights & Biases."""

    def __init__(self):
        self.written, self.closed = {}, False

    def add_scalar(self, tag, scalar_value, global_step):
        assert isinstance(global_step, int) and np.ndim(scalar_value) == 0
        self.written.setdefault(global_step, {})[tag] = float(scalar_value)

    def log(self, data, step):
        assert isinstance(step, int) and all(type(v) is float for v in data.values())
        self.written[step] = data

    def close(self):
        self.closed = True

    finish = close


@pytest.mark.parametrize("module", ("tensorboardX", "wandb"))
def test_recipes(module, monkeypatch):
    writer = Writer()
    fake: dict = {
        "tensorboardX": {"SummaryWriter": lambda logdir: writer},
        "wandb": {"init": lambda project, name: writer},
    }[module]
    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**fake))
    names = {"problem": Cliff(jnp.array(np.inf)), "equilibrium": blx.WarmStart()}
    namespace = {"blx": blx, "x0": zero, "y0": zero, "pipeline": march, **names}
    exec(_recipe(module), namespace)
    assert writer.closed and list(writer.written) == list(range(10, 110, 10))
    for at, metrics in writer.written.items():
        assert set(metrics) == {"value", "outer_residual", "inner_residual"}
        assert np.isclose(metrics["value"], -0.1 * at, rtol=1e-12)


def test_a_notebook_has_a_bar(monkeypatch, capsys):
    """Its output is no terminal, and a bar of text can be seen there all the same."""

    class IPython:  # what the package and its shell have in a notebook
        config = {"IPKernelApp": {}}

        @classmethod
        def get_ipython(cls):
            return cls

    monkeypatch.setattr(bar.importlib.util, "find_spec", lambda name: None)
    for module, disabled in ((None, True), (IPython, False)):
        monkeypatch.setitem(sys.modules, "IPython", module)
        with bar._tqdm(total=2) as made:
            assert made.disable is disabled
    assert "0/2" in capsys.readouterr().err
