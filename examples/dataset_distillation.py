"""Figure 2 of the paper: two learned points teach a network two rings, by warm start.

    python examples/dataset_distillation.py --seed 0 --output outputs

A network is trained on two learned points, which move so that it does well on a data
set of two concentric rings. Warm-started, it ends up nearly as good as one trained on
the rings themselves; but the same network trained from scratch on the final two points
fails. What the first one knows is not in the points: it is in the way that they took.

The paper gives the data's size, the network and the rates. The radii, the noise, the
initial weights and the number of steps are choices: see `bilevel_eqx.tasks.rings`.
"""

import argparse
import pathlib

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib
import numpy as np
import optax

import bilevel_eqx as blx
from bilevel_eqx import plot, tasks


matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402


INNER_RATE = 1e-3
OUTER_RATE = 1e-2


def direct_training(problem, y0, num_steps):
    """The reference: the network trained on the rings themselves."""
    on_the_data = blx.BilevelProblem(
        outer=problem.outer, inner=lambda x, y: problem.outer(x, y) + 0 * jnp.sum(x)
    )
    train = blx.Unrolled(optax.adam(1e-3), num_steps)
    return blx.best_response(on_the_data, jnp.zeros(1), y0, train)


def warm_start(problem, x0, y0, num_steps, save_every):
    """Algorithm 1 with K = 1: one step of the points, one step of the network."""
    step = blx.Unrolled(optax.sgd(INNER_RATE), 1)
    pipeline = blx.GradientPipeline(step, optax.adam(OUTER_RATE), follower=step)
    return blx.solve(
        problem,
        blx.WarmStart(),
        x0,
        y0,
        pipeline=pipeline,
        num_steps=num_steps,
        save_every=save_every,
        record=lambda x, y, metrics: {
            "points": x["points"],
            "loss": problem.outer(x, y),
            "accuracy": problem.accuracy(y),
        },
        progress=report,
    )


def cold_retraining(problem, x, y0, num_steps):
    """The network trained from scratch on the final points.

    For how long, the paper does not say. At ten times the rate it fits them about
    ten times as well as the warm-started one does: that is as converged as one gets.
    """
    train = blx.Unrolled(optax.sgd(10 * INNER_RATE), num_steps)
    return blx.best_response(problem, x, y0, train)


def report(step, num_steps, metrics):
    if step % max(1, num_steps // 10) == 0:
        print(
            f"  step {step:>6} of {num_steps}: outer loss {float(metrics['value']):.3f}",
            flush=True,
        )


def angle_covered(path):
    """How much of the circle a point has seen, in degrees (of 36 sectors of 10)."""
    angles = np.arctan2(path[:, 1], path[:, 0])
    sectors = np.floor((angles + np.pi) / (2 * np.pi) * 36).astype(int) % 36
    return 10 * len(np.unique(sectors))


def draw(problem, direct, warm, cold, file):
    paths = np.asarray(warm.history["points"])
    extent = max(1.35 * np.abs(problem.points).max(), 1.15 * np.abs(paths[-1]).max())
    labels = np.asarray(problem.distilled_labels)
    panels = [
        ("(a) trained on the data", direct),
        ("(b) warm start", warm.y),
        ("(c) re-trained from scratch", cold),
    ]
    with plot.house_style():
        figure, axes = plt.subplots(1, 3, figsize=(7.2, 2.75), layout="constrained")
        for ax, (title, y) in zip(axes, panels):
            accuracy = float(problem.accuracy(y))
            loss = float(problem.outer(warm.x, y))
            plot.decision_regions(
                ax, eqx.filter_jit(lambda p, y=y: problem.predict(y, p)), extent=extent
            )
            plot.data_points(ax, problem.points, problem.labels)
            ax.set_title(f"{title}\naccuracy {accuracy:.0%}, loss {loss:.2g}")
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        for i, label in enumerate(labels):
            colour = plot.CLASS_COLOURS[label]
            plot.trajectory(axes[1], paths[:, i], colour)
            plot.data_points(
                axes[2],
                paths[-1:, i],
                labels[i : i + 1],
                s=110,
                edgecolors="black",
                zorder=5,
            )
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file)
        plt.close(figure)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="the random seed (0)")
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path("outputs"),
        help="the folder for dataset_distillation.png (outputs)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=20_000,
        help="outer steps of the warm start (20000)",
    )
    parser.add_argument("--width", type=int, default=200, help="hidden units (200)")
    args = parser.parse_args()
    save_every = max(1, args.steps // 2000)

    problem, x0, y0 = tasks.rings(jr.key(args.seed), width=args.width)
    num_weights = sum(leaf.size for leaf in jax.tree.leaves(y0))
    print(f"Two learned points, {num_weights:,} weights, seed {args.seed}.")
    print("Training on the rings themselves ...", flush=True)
    direct = direct_training(problem, y0, min(2000, args.steps))
    print(f"Warm start, {args.steps} steps ...", flush=True)
    warm = warm_start(problem, x0, y0, args.steps, save_every)
    print("Re-training from scratch on the final points ...", flush=True)
    cold = cold_retraining(problem, warm.x, y0, args.steps)

    print(f"\n{'':<28}{'outer loss':>12}{'inner loss':>12}{'accuracy':>10}")
    for name, y in (
        ("trained on the data", direct),
        ("warm start", warm.y),
        ("re-trained from scratch", cold),
    ):
        outer, inner = problem.outer(warm.x, y), problem.inner(warm.x, y)
        accuracy = problem.accuracy(y)
        print(f"{name:<28}{outer:>12.4f}{inner:>12.4f}{accuracy:>10.1%}")

    loss, accuracy = (np.asarray(warm.history[k]) for k in ("loss", "accuracy"))
    tail = slice(-len(loss) // 10, None)
    print(
        f"\nAlong the warm start: best loss {loss.min():.4f}, mean of the last tenth "
        f"{loss[tail].mean():.4f}; accuracy there {accuracy[tail].mean():.1%}."
    )
    for i, path in enumerate(np.moveaxis(np.asarray(warm.history["points"]), 1, 0)):
        print(f"Learned point {i} has seen {angle_covered(path)} degrees of the circle.")
    leaked = float(problem.outer(warm.x, cold) - problem.outer(warm.x, warm.y))
    print(f"Leaked into the weights: {leaked:.3f} of outer loss that x does not carry.")
    print(f"\n{warm.certificate}")

    file = args.output / "dataset_distillation.png"
    draw(problem, direct, warm, cold, file)
    print(f"\nDrawn in {file}")


if __name__ == "__main__":
    main()
