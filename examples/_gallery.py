"""What the scripts of the gallery share: their command line, and data.

Each script has

- `run(quick)`: computes its results, a dictionary. Single numbers are reported, and
  arrays are for the picture. With `quick` it takes a few seconds, for a test.
- `check(results)`: raises an `AssertionError` if the results are not what the script
  claims, for `quick` results too.
- `draw(results)`: a figure of matplotlib's.

and ends with `main(__file__, __doc__, run, check, draw)`. The data of several are here.
"""

import pathlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from _figure import lighten, options

from bilevel_eqx import plot


Results = dict[str, Any]


def main(
    file: str,
    doc: str | None,
    run: Callable[[bool], Results],
    check: Callable[[Results], None],
    draw: Callable[[Results], Any],
) -> None:
    """Runs a script: prints its numbers, checks its claim, and saves its picture."""
    name = pathlib.Path(file).stem
    args = options(doc).parse_args()
    start = time.perf_counter()
    results = run(args.quick)
    seconds = time.perf_counter() - start
    for key, value in results.items():
        if np.ndim(value) == 0:
            print(f"{key:<40} {float(value):.4g}")
    print(f"{'seconds, compilation included':<40} {seconds:.1f}")
    check(results)
    args.output.mkdir(parents=True, exist_ok=True)
    picture = args.output / f"gallery_{name}.png"
    with plot.house_style():
        draw(results).savefig(picture, dpi=150)
    lighten(picture)
    print(f"The claim holds. The picture is {picture}")


def digits(seed: int, *ends: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Scikit-learn's 1,797 images of digits (8 x 8 pixels between zero and one) with
    their labels, in a random order, cut at these places."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    images = np.asarray(images[order] / 16, "float32")
    return list(zip(np.split(images, ends), np.split(labels[order], ends)))
