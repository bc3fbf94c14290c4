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

import matplotlib.pyplot as plt
import numpy as np
from _figure import lighten, options

from bilevel_eqx import plot


Results = dict[str, Any]
# Two for each pixel of a page, where they are half as wide: screens of today show both.
DOTS_PER_INCH = 300


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
        draw(results).savefig(picture, dpi=DOTS_PER_INCH)
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


def draw_images(results: Results) -> Any:
    """A row of images for each of the results that is not a single number."""
    rows = {name: images for name, images in results.items() if np.ndim(images) > 0}
    shape = len(rows), len(next(iter(rows.values())))
    figure, axes = plt.subplots(*shape, figsize=(6, 1.4), layout="constrained")
    for row, (name, images) in zip(axes, rows.items()):
        row[0].set_ylabel(name)
        for ax, image in zip(row, images):
            ax.imshow(np.reshape(image, (8, 8)), cmap="gray_r")
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
    return figure
