"""The gallery: the claim of each script holds, and its page shows the script."""

import importlib
import re
import textwrap
from pathlib import Path

import jax
import pytest


ROOT = Path(__file__).parent.parent
EXAMPLES, PAGES, FIGURES = (
    ROOT / folder for folder in ("examples", "docs/gallery", "docs/figures")
)
GALLERY = (
    "feature_penalties",
    "few_inner_steps",
    "hyper_cleaning",
    "influence",
    "meta_learning",
    "learned_augmentation",
    "lasso",
    "svm",
    "architecture_search",
    "deep_equilibrium",
    "distillation",
    "flax_model",
    "gan",
    "learning_rates",
)


def test_every_page_is_tested():
    assert {page.stem for page in PAGES.glob("*.md")} == {*GALLERY, "index"}


@pytest.mark.parametrize("name", GALLERY)
def test_page(name):
    """The code of a page is in its script, the script is short, and the figure small."""
    script = (EXAMPLES / f"{name}.py").read_text()
    assert script.count("\n") <= (60 if name == "distillation" else 120)
    page = (PAGES / f"{name}.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        assert block in script or textwrap.indent(block, " " * 4) in script, block
    assert f"../figures/gallery_{name}.png" in page
    assert (FIGURES / f"gallery_{name}.png").stat().st_size <= 100_000


@pytest.fixture
def script(request, monkeypatch):
    """A script as a module, in the settings of a user and not those of the tests. Most
    of the time of a quick form is the compiler's, so that optimises little."""
    for needed in ("matplotlib", "mlxtend", "sklearn"):
        pytest.importorskip(needed, reason="This needs the extra `examples`.")
    if request.param == "flax_model":
        pytest.importorskip("flax", reason="This needs the extra `flax`.")
    importlib.import_module("matplotlib").use("agg")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        before = jax.config.read("jax_disable_most_optimizations")
        jax.config.update("jax_disable_most_optimizations", True)
        yield importlib.import_module(request.param)
        jax.config.update("jax_disable_most_optimizations", before)


@pytest.mark.slow
@pytest.mark.parametrize("script", GALLERY, indirect=True)
def test_claim(script):
    results = script.run(True)
    script.check(results)
    script.draw(results).clear()
