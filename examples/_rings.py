"""What the figures of distilled rings share: their options, pictures and claims.

The experiment itself is in `dataset_distillation.py`.
"""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
from _figure import arguments, Claim, Figure
from jax.flatten_util import ravel_pytree
from matplotlib.colors import to_rgb

from bilevel_eqx import plot


Record = Mapping[str, np.ndarray]

TITLES = {
    "direct": "(a) trained on the data",
    "warm": "(b) warm start",
    "cold": "(c) re-trained from scratch",
}
# By class.
RINGS = ("1st ring", "2nd ring", "3rd ring")


def options(doc: str | None, steps: int, quick_steps: int) -> argparse.Namespace:
    """The command line. A network learns in proportion to its width at the same rate:
    narrower ones get a higher rate."""
    parser = arguments(doc)
    parser.add_argument("--seeds", type=int, help="how many seeds (3; quick: 1)")
    parser.add_argument(
        "--steps", type=int, help=f"outer steps ({steps:,}; quick: {quick_steps:,})"
    )
    parser.add_argument("--width", type=int, default=200, help="hidden units (200)")
    parser.add_argument(
        "--points", type=int, help="points on each ring (100, as in the paper; quick: 50)"
    )
    args = parser.parse_args()
    args.seeds = args.seeds or (1 if args.quick else 3)
    args.steps = args.steps or (quick_steps if args.quick else steps)
    args.points = args.points or (50 if args.quick else 100)
    args.rate = 1e-3 * 200 / args.width
    return args


def each_seed(
    figure: Figure,
    args: argparse.Namespace,
    task: Callable,
    experiment: Callable,
    keep: Literal["last", "best"],
) -> list[Record]:
    """A part of the figure for each seed, with lines on what came out."""

    def run(seed: int) -> dict[str, Any]:
        problem, x0, y0 = task(jr.key(seed), args)
        return experiment(problem, x0, y0, args.steps, args.rate, keep)

    records = []
    for seed in range(args.seeds):
        record = figure.part(
            f"seed {seed}",
            lambda seed=seed: run(seed),
            steps=args.steps,
            width=args.width,
            points=args.points,
            rate=args.rate,
            keep=keep,
        )
        records.append(record)
        for name in TITLES:
            figure.say(
                f"  {TITLES[name][4:]:<24} outer loss {record[f'{name}, loss']:.4f}, "
                f"inner {record[f'{name}, inner']:.4f}, "
                f"accuracy {record[f'{name}, accuracy']:.1%}"
            )
    return records


#
# The picture
#


def draw(
    figure: Figure, record: Record, task: Callable, args: argparse.Namespace
) -> None:
    """What each of the three networks has learned, from what, on the first seed."""
    problem, _, y0 = task(jr.key(0), args)
    _, unravel = ravel_pytree(y0)
    # As far as the network that is drawn has come.
    until = int(len(record["points"]) * record["kept at"] / args.steps)
    paths, shares = record["points"][:until], record["targets"][:until]
    extent = max(1.35 * np.abs(problem.points).max(), 1.15 * np.abs(paths[-1]).max())
    predict = eqx.filter_jit(problem.predict)
    with plot.house_style():
        picture, axes = plt.subplots(1, 3, figsize=(7.2, 3.05), layout="constrained")
        for ax, (name, title) in zip(axes, TITLES.items()):
            y = unravel(jnp.asarray(record[f"{name}, weights"]))
            plot.decision_regions(ax, lambda p, y=y: predict(y, p), extent=extent)
            plot.data_points(ax, problem.points, problem.labels)
            accuracy, loss = record[f"{name}, accuracy"], record[f"{name}, loss"]
            ax.set_title(f"{title}\naccuracy {accuracy:.0%}, loss {loss:.2g}")
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        colours = np.array([to_rgb(colour) for colour in plot.CLASS_COLOURS])
        for i, label in enumerate(shares[-1].argmax(axis=-1)):
            # In the mean colour of its classes: grey where it is of all of them.
            mixed = shares[:, i] @ colours[: shares.shape[-1]]
            plot.trajectory(axes[1], paths[:, i], mixed)
            plot.data_points(
                axes[2],
                paths[-1:, i],
                np.array([label]),
                s=110,
                edgecolors="black",
                zorder=5,
            )
        handles = plot.legend_handles(
            np.unique(problem.labels), RINGS, paths=True, learned=True
        )
        tight = {"ncols": len(handles), "columnspacing": 1.2, "handletextpad": 0.1}
        picture.legend(handles=handles, loc="outside lower center", **tight)
        figure.save(picture)
        plt.close(picture)


#
# The claims
#


def angle_covered(path: np.ndarray) -> int:
    """How much of the circle a point has seen, in degrees (of 36 sectors of 10)."""
    angles = np.arctan2(path[:, 1], path[:, 0])
    sectors = np.floor((angles + np.pi) / (2 * np.pi) * 36).astype(int) % 36
    return 10 * len(np.unique(sectors))


def listed(numbers: Iterable[Any], form: str = ".2f") -> str:
    return ", ".join(f"{float(number):{form}}" for number in numbers)


def column(records: Sequence[Record], name: str) -> np.ndarray:
    return np.array([record[name] for record in records])


def last_tenth(record: Record, name: str) -> float:
    history = record[name]
    return float(history[-len(history) // 10 :].mean())


def accuracy_claim(
    records: Sequence[Record], at_best: bool = False, within: int = 2
) -> Claim:
    """Within so many points (hundredths) of training on the data themselves."""
    direct, warm = (column(records, f"{k}, accuracy") for k in ("direct", "warm"))
    ends = [record["accuracy"][-1] for record in records]
    means = [last_tenth(record, "accuracy") for record in records]
    if at_best:
        verb, at = "At its best warm start is", f"step {listed(kept_at(records), '.0f')}"
    else:
        verb, at = "Warm start ends", "the end"
    return Claim(
        f"{verb} within {within} points of the accuracy of a network that is trained on "
        f"the rings themselves.",
        "a decision boundary that performs well on the original data",
        f"warm start {listed(warm, '.3f')} at {at}, {listed(ends, '.3f')} at the last "
        f"step, {listed(means, '.3f')} in the mean of the last tenth of the steps; "
        f"trained on the rings {listed(direct, '.3f')}. The first of them decides",
        len(records),
        bool(np.all(warm >= direct - within / 100)),
    )


def kept_at(records: Sequence[Record]) -> np.ndarray:
    return column(records, "kept at")


def loss_claim(records: Sequence[Record], share: float) -> Claim:
    """Of the gap that the re-trained network has, warm start leaves at most a share."""
    direct, warm, cold = (column(records, f"{k}, loss") for k in TITLES)
    shares = (warm - direct) / (cold - direct)
    best = [record["loss"].min() for record in records]
    means = np.array([last_tenth(record, "loss") for record in records])
    mean_shares = (means - direct) / (cold - direct)
    sentence = (
        f"In outer loss above that of training on the rings, warm start keeps at most "
        f"{share:g} of what re-training has."
        if share < 1
        else "The outer loss of warm start is below that of re-training."
    )
    return Claim(
        sentence,
        "low validation loss for warm start, high validation loss for re-training",
        f"warm start {listed(warm)} (least on the way {listed(best)}, mean of the last "
        f"tenth of the steps {listed(means)}); re-trained {listed(cold)}; on the rings "
        f"{listed(direct, '.1g')}. Shares of the gap {listed(shares, '.3f')}, with the "
        f"mean {listed(mean_shares, '.3f')}: the larger one decides",
        len(records),
        bool(np.all(np.maximum(shares, mean_shares) <= share)),
    )


def cold_claim(records: Sequence[Record]) -> Claim:
    cold, fits = (column(records, f"cold, {k}") for k in ("accuracy", "fits"))
    return Claim(
        "The same network trained from scratch on the final points classifies those "
        "correctly and fails on the rings: accuracy at most .70.",
        "correct for the distilled points but high validation loss",
        f"accuracy {listed(cold)} on the rings; {listed(fits)} on the learned points",
        len(records),
        bool(np.all(cold <= 0.7) and np.all(fits == 1)),
    )


def angle_claim(records: Sequence[Record]) -> Claim:
    angles = [
        [angle_covered(record["points"][:, i]) for i in range(record["points"].shape[1])]
        for record in records
    ]
    return Claim(
        "The learned points trace out the rings: each moves through at least 300 "
        "degrees.",
        "trajectories trace out the boundary between the classes, or the data",
        "degrees " + "; ".join(listed(row, ".0f") for row in angles),
        len(records),
        bool(np.min(angles) >= 300),
    )
