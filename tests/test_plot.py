"""The pictures: what is drawn, where, and with which labels."""

import dataclasses
import importlib
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest


matplotlib.use("agg")

import matplotlib.pyplot as plt
from matplotlib.colors import to_rgb
from PIL import Image

import bilevel_eqx as blx
import bilevel_eqx.plot as blp


DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def _solution(history: Any, num_steps: Any = 17, save_every=5, value: Any = 2.5):
    result = blx.RESULTS.successful
    if np.ndim(num_steps) == 1:
        bad = jnp.arange(len(num_steps)) == 0
        failed = blx.RESULTS.nonfinite_step
        result = jax.vmap(lambda b: blx.RESULTS.where(b, failed, result))(bad)
    return blx.Solution(
        x=jnp.zeros(2),
        y=jnp.zeros(3),
        value=jnp.asarray(value),
        result=result,
        certificate=None,  # pyright: ignore
        history=history,
        stats={"num_steps": jnp.asarray(num_steps), "save_every": np.asarray(save_every)},
        state=None,
    )


def _labels(ax):
    legend = ax.get_legend()
    return [] if legend is None else [text.get_text() for text in legend.get_texts()]


def _texts(ax):
    return [text.get_text().strip() for text in ax.texts]


def _curves(ax):
    """What a reader sees: for each label its points."""
    return {line.get_label(): np.asarray(line.get_xydata()).T for line in ax.lines}


#
# The course of a run
#


def test_history():
    default = {
        "value": jnp.array([5.0, 3.0, 2.5]),
        "outer_residual": jnp.array([1.0, 1e-3, 1e-6]),
        "inner_residual": jnp.zeros(3),
    }
    upper, lower = axes = blp.plot(_solution(default))
    ((_, curve),) = _curves(upper).items()
    assert np.array_equal(curve, [[5, 10, 15], [5, 3, 2.5]])
    below = _curves(lower)
    outer = next(curve for label, curve in below.items() if "outer" in label)
    assert np.array_equal(outer, [[5, 10, 15], [1, 1e-3, 1e-6]])
    assert lower.get_yscale() == "log" and upper.get_yscale() == "linear"
    # With units.
    assert "[unit of $F$]" in upper.get_ylabel()
    assert "[unit of $F$ / unit of $x$]" in " ".join(_labels(lower))
    assert any("exactly zero" in label for label in _labels(lower))
    assert lower.get_xlabel() == "outer step"
    assert "successful after 17 steps" in upper.get_title() and "2.5" in upper.get_title()
    # In axes of one's own, and then in their style.
    _, own = plt.subplots(2)
    again = blp.plot(_solution(default), axes=own)
    assert [a is b for a, b in zip(again, own)] == [True, True]
    assert axes[0].spines["top"].get_visible() is False
    assert own[0].spines["top"].get_visible() is True
    with pytest.raises(ValueError, match="a sequence of 2 `Axes`"):
        blp.history(_solution(default), axes=own[:1])


def test_history_of_ones_own():
    """All that is one number an entry, of each element of a batch."""
    record = {
        "loss": jnp.array([[1.0, 0.5], [2.0, jnp.nan]]),
        "x": jnp.ones((2, 2, 7)),
        "nested": {"accuracy": jnp.array([[0, 1], [1, 1]])},
    }
    (ax,) = blp.plot(_solution(record, num_steps=[2, 1], save_every=1, value=[1.0, 2.0]))
    assert _labels(ax) == ["loss", "nested.accuracy"]
    drawn = sorted(np.nan_to_num(line.get_ydata()).tolist() for line in ax.lines)
    assert drawn == [[0, 1], [1, 0.5], [1, 1], [2, 0]]
    assert ax.get_title() == "2 runs, 1 of them successful"
    for nothing in (None, {"x": jnp.ones((3, 7))}, {"value": jnp.ones(0)}):
        with pytest.raises(ValueError, match="no series of numbers"):
            blp.history(_solution(nothing))
    with pytest.raises(ValueError, match="under `jax.jit`"):
        jax.eval_shape(lambda u: blp.plot(_solution({"value": u})), jnp.ones(3))


#
# Residuals, eigenvalues, and the table
#


def _certificate(**values):
    meanings = {name: (value, f"what {name} is") for name, value in values.items()}
    return blx.Certificate("a start", meanings)


def test_residuals():
    certificate = _certificate(outer=1e-3, inner=0.0)
    ax = blp.plot(certificate)
    (points,) = ax.collections[1:2]
    (outer, row), (inner, lower_row) = np.asarray(points.get_offsets())
    assert outer == 1e-3 and row > lower_row
    # On a logarithmic axis zero is far below all others, and a ring.
    assert inner <= 1e-4 and ax.get_xscale() == "log"
    assert np.allclose(points.get_facecolors()[1, :3], 1)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["outer", "inner"]
    assert {"what outer is", "what inner is", "1e-03", "0"} <= set(_texts(ax))
    assert _labels(ax) == ["residual", "exactly zero"]
    assert "[no unit" in ax.get_xlabel() and ax.get_title() == "Certificate for a start"
    errors = {"outer": jnp.array(2e-4), "inner": jnp.array(0.0)}
    estimated = eqx.tree_at(
        lambda c: c.standard_errors,
        certificate,
        errors,
        is_leaf=lambda leaf: leaf is None,
    )
    ax = blp.residuals(estimated)
    span = ax.collections[2].get_segments()[0]
    assert np.allclose(np.asarray(span)[:, 0], [6e-4, 1.4e-3])
    assert "± 2 standard errors" in _labels(ax)
    with pytest.raises(ValueError, match="of a batch"):
        blp.plot(_certificate(outer=jnp.ones(2)))


def _diagnosis(eigenvalues, cut, **figures):
    values = np.asarray(eigenvalues)
    is_zero = np.abs(values) <= cut
    fields = dict.fromkeys(f.name for f in dataclasses.fields(blx.reports.Diagnosis))
    fields |= {"eigenvalues": values, "is_zero": is_zero, "cut": cut, "margin": 1e6}
    fields |= {"rank": int(np.sum(~is_zero)), "num_variables": len(values), "exact": True}
    return blx.reports.Diagnosis(**{**fields, **figures})  # pyright: ignore


def test_spectrum():
    ax = blp.plot(_diagnosis([-2.0, 0.0, 1e-18, 3.0, 7.0], cut=1e-14))
    found = {c.get_label(): np.asarray(c.get_offsets()) for c in ax.collections}
    assert found["positive"].tolist() == [[1, 7], [2, 3]]
    assert found["negative"].tolist() == [[3, 2]]
    (rounding, zero) = found["count as zero"]
    assert rounding.tolist() == [4, 1e-18] and zero[0] == 5 and 0 < zero[1] < 1e-18
    (cut,) = ax.lines
    assert set(cut.get_ydata()) == {1e-14} and cut.get_label() == "cut at 1.0e-14"
    assert len(_labels(ax)) == 4
    assert ax.get_title() == "rank 3 of 5, clear by a factor of 1e+06"
    assert r"[unit of $f$ / (unit of $y$)$^2$]" in ax.get_ylabel()
    # A zero operator, and one that was not decomposed.
    ax = blp.spectrum(_diagnosis([0.0, 0.0], cut=0.0, exact=False, margin=3.0))
    assert ax.get_title() == "rank about 0 of 2, not clear by a factor of 3e+00"
    assert ax.get_xlabel().startswith("Ritz value")
    assert len(ax.collections[0].get_offsets()) == 2


def test_equilibrium_table():
    names = ("ColdStart()", "WarmStart()", "Nash()")
    figures = {"F": 1.25, "f": 0.5, "|x|": 2.0, "|y|": 3.0, "|y - y0|": 4.0}
    solutions: dict = dict.fromkeys(names[:2])
    certificates = {
        a: {b: _certificate(outer=1e-9 if a == b else 0.25) for b in names[:2]}
        for a in names[:2]
    }
    del certificates["WarmStart()"]["ColdStart()"]
    comparison = blx.reports.Comparison(
        names,
        solutions,
        dict.fromkeys(names[:2], {k: jnp.array(v) for k, v in figures.items()}),
        certificates,
        {"Nash()": "not for this problem"},
    )
    ax = blp.plot(comparison)
    texts = _texts(ax)
    assert [label.get_text() for label in ax.get_yticklabels()] == list(names)
    assert texts.count("1.25") == texts.count("4") == 2
    assert [texts.count(t) for t in ("1e-09", "2e-01", "-")] == [2, 1, 1]
    assert sum("not computed" in text for text in texts) == 1
    # A residual is the darker, the larger it is; that of its own kind has a frame.
    shades = [patch.get_alpha() for patch in ax.patches if patch.get_fill()]
    assert shades[1] > 5 * shades[0] and shades[0] == shades[2]
    assert sum(not patch.get_fill() for patch in ax.patches) == 2


#
# The plane
#


POINTS = np.array([[1.0, 0.5], [0.5, -1.0], [-1.0, 0.2]])
LABELS = np.array([1, 1, 0])


def _side(points):
    """Class 1 is to the right."""
    return jnp.stack([-points[:, 0], points[:, 0]], axis=1)


def _marks(ax, marker):
    return [line for line in ax.lines if line.get_marker() == marker]


def test_classifier():
    paths = np.array([[[0.1, 0.2], [-0.3, 0.1]], [[2.0, 1.5], [-0.4, 0.1]]])
    names = ["left", "right"]
    ax = blp.classifier(_side, POINTS, LABELS, paths=paths, names=names, resolution=8)
    regions = ax.collections[0].get_array()
    assert np.array_equal(regions, np.broadcast_to(np.arange(8) >= 4, (8, 8)))
    assert ax.get_xlim() == ax.get_ylim() == (-2.3, 2.3)
    assert _labels(ax) == [
        *("data, left", "data, right"),
        *("learned point, start", "learned point, end"),
    ]
    # Each marker of the picture is one of the legend, and the other way round.
    legend = {line.get_marker() for line in ax.get_legend().get_lines()}
    drawn = {line.get_marker() for line in ax.lines}
    assert legend == drawn | {"o", "s"} and drawn == {"x", "*"}
    marks = {
        m: [t.get_xydata()[0] for t in ax.lines if t.get_marker() == m] for m in "x*"
    }
    assert np.array_equal(marks["x"], paths[0]) and np.array_equal(marks["*"], paths[1])
    colours = [to_rgb(t.get_color()) for t in ax.lines if t.get_marker() == "*"]
    assert np.allclose(colours, [to_rgb(c) for c in blp.CLASS_COLOURS[:2]])
    # A learned label mixes the colours of its classes.
    shares = np.broadcast_to([0.25, 0.75], (2, 2, 2))
    options: dict = {"paths": paths, "path_labels": shares, "resolution": 8}
    ax = blp.classifier(_side, POINTS, LABELS, extent=3.0, legend=False, **options)
    (mixed, _) = [to_rgb(mark.get_color()) for mark in _marks(ax, "*")]
    assert np.allclose(mixed, np.array([0.25, 0.75]) @ np.array(colours))
    assert ax.get_legend() is None and ax.get_xlim() == (-3, 3)


def test_legend_handles():
    handles = blp.legend_handles([0, 2], learned=True)
    labels = [handle.get_label() for handle in handles]
    assert labels == ["data, class 0", "data, class 2", "large: learned point"]


def test_distillation_gif(tmp_path):
    paths = np.linspace(-1, 1, 10).reshape(5, 1, 2)
    weights = {"angle": jnp.linspace(0, 1.5, 5)}

    def predict(y, points):
        at = points @ jnp.stack([jnp.cos(y["angle"]), jnp.sin(y["angle"])])
        return jnp.stack([-at, at], axis=1)

    options: dict = {"num_frames": 3, "resolution": 10, "dots_per_inch": 40}
    data = predict, weights, paths, POINTS, LABELS
    file = tmp_path / "film.gif"
    ax = blp.distillation_gif(file, *data, steps=np.arange(0, 50, 10), **options)
    assert ax.get_title() == "outer step 40"
    assert len(_labels(ax)) == 4
    with Image.open(file) as film:
        assert film.n_frames == 3  # pyright: ignore
        frames = []
        for i in range(3):
            film.seek(i)
            frames.append(np.asarray(film.convert("RGB"), float))
    assert frames[0].shape == frames[2].shape
    assert np.mean(np.abs(frames[0] - frames[2])) > 2
    with pytest.raises(ValueError, match=r"lengths are \[4, 5\]"):
        blp.distillation_gif(file, predict, weights, paths[:4], POINTS, LABELS)


#
# One call
#


def test_plot_of_something_else():
    with pytest.raises(ValueError, match="no picture of a `dict`. It draws `Solution`"):
        blp.plot({})


def test_plot_comes_on_request():
    assert blx.__getattr__("plot") is blp
    assert "plot" not in dir(blx)


def test_without_matplotlib(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("bilevel_eqx.plot")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match="with its extra `plot`"):
        importlib.import_module("bilevel_eqx.plot")


@pytest.mark.slow
def test_pictures_of_the_docs(tmp_path):
    """Each picture that the page shows is made by its code, and is that of the docs."""
    path = DOCS / "pictures.py"
    spec = importlib.util.spec_from_file_location("pictures", path)
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        tool.run_page(tmp_path)
    page = (DOCS / "api" / "plot.md").read_text()
    shown = re.findall(r"\]\(\.\./figures/(\S+)\)", page)
    assert len(shown) == 6 and sorted(shown) == sorted(p.name for p in tmp_path.iterdir())
    for name in shown:
        with (
            Image.open(tmp_path / name) as new,
            Image.open(DOCS / "figures" / name) as old,
        ):
            # The same picture, but for the fonts and the rounding of this machine.
            assert np.allclose(new.size, old.size, rtol=0.05)
            assert getattr(new, "n_frames", 1) == getattr(old, "n_frames", 1)
