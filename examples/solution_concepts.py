"""Figure 1 of the paper, computed: four answers to one bilevel problem.

    python examples/solution_concepts.py --output outputs

Two learned points, one for each class, teach a classifier; they move so that it does
well on two arcs of data. The classifier has many more weights than there are points, so
that a whole plane of weights fits the two points exactly. Which of them is meant?

- Optimistic: those that suit the data best.
- Cold start: those nearest to the initial weights.
- Warm start: those that training arrives at along the way of the points (drawn).
- Pessimistic: those that suit the data worst, of all within a radius of the cold ones.

All four start from the same points and weights, and all four fit the learned points.
The paper draws its figure by hand; data, features and rates here are choices.
"""

import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
import optax
from _figure import arguments, Claim, Figure
from jaxtyping import Array, Float, Int
from matplotlib.colors import to_rgb

import bilevel_eqx as blx
from bilevel_eqx import plot


INNER_RATE = 0.05
OUTER_RATE = 0.04
# Where the learned points start: at the outer ends of the arcs.
START = ((-1.4, 0.0), (1.4, 0.0))
WINDOW = ((-2.35, 2.35), (-1.7, 1.7))


class TwoPoints(blx.AbstractLeastSquaresProblem[Array, Array]):
    """A model that is linear in its weights, taught by one point for each class."""

    points: Float[Array, "n 2"]
    labels: Int[Array, " n"]
    centers: Float[Array, "m 2"]
    width: float

    def score(self, y, points):
        """Negative in the region of class 0, and positive in that of class 1."""
        square = jnp.sum((points[:, None] - self.centers) ** 2, axis=-1)
        return jnp.exp(-0.5 * square / self.width**2) @ y

    def inner_residual(self, x, y):
        return self.score(y, x) - jnp.array([-1.0, 1.0])

    def outer(self, x, y):
        return 0.5 * jnp.mean((self.score(y, self.points) - (2 * self.labels - 1)) ** 2)

    def accuracy(self, y):
        return jnp.mean((self.score(y, self.points) > 0) == self.labels)


def two_arcs(key, points_per_class=30, noise=0.08):
    """The data, and bumps on a grid around them for features."""
    angles = jnp.linspace(0, jnp.pi, points_per_class)
    arc = jnp.stack([jnp.cos(angles) - 0.5, jnp.sin(angles) - 0.25], axis=-1)
    points = jnp.concatenate([arc, -arc])
    points = points + noise * jr.normal(key, points.shape)
    labels = jnp.repeat(jnp.arange(2), points_per_class)
    across, up = 0.6 * jnp.arange(-3, 4), 0.6 * jnp.arange(-2, 3)
    centers = jnp.stack(jnp.meshgrid(across, up), axis=-1).reshape(-1, 2)
    problem = TwoPoints(points, labels, centers, width=0.4)
    return problem, jnp.array(START), jnp.zeros(len(centers))


def concepts(radius, num_steps):
    """From titles to equilibria, with their pipelines and numbers of outer steps."""
    little_by_little = blx.GradientPipeline(
        blx.Unrolled(optax.sgd(INNER_RATE), 1), optax.adam(OUTER_RATE)
    )
    few = min(20, num_steps)
    return {
        "Optimistic": (blx.Optimistic(), None, few),
        "Cold start": (blx.ColdStart(), None, few),
        "Warm start": (blx.WarmStart(), little_by_little, num_steps),
        "Pessimistic": (blx.Pessimistic(radius), None, few),
    }


def solve_all(problem, x0, y0, radius, num_steps):
    """Each concept's answer, with the way of the points that led to it."""
    answers = {}
    for title, (equilibrium, pipeline, steps) in concepts(radius, num_steps).items():
        solution = blx.solve(
            problem,
            equilibrium,
            x0,
            y0,
            pipeline=pipeline,
            num_steps=steps,
            record=record_points,
        )
        answers |= {
            f"{title} x": solution.x,
            f"{title} y": solution.y,
            f"{title} path": solution.history,
            f"{title} F": solution.value,
            f"{title} f": problem.inner(solution.x, solution.y),
            f"{title} accuracy": problem.accuracy(solution.y),
            f"{title} |y - y0|": jnp.linalg.norm(solution.y - y0),
            f"{title} retrained F": blx.retrain_gap(problem, solution, y0).retrained[0],
            f"{title} certificate": solution.certificate.largest,
        }
    return answers


def record_points(x, y, metrics):
    return x


TITLES = ("Optimistic", "Cold start", "Warm start", "Pessimistic")
COLUMNS = ("F", "f", "accuracy", "|y - y0|", "retrained F", "certificate")


def table(answers):
    """What each concept is worth, and how much of that the points alone carry."""
    lines = [" " * 12 + "".join(f"{column:>13}" for column in COLUMNS)]
    for title in TITLES:
        figures = (float(answers[f"{title} {column}"]) for column in COLUMNS)
        lines.append(f"{title:<12}" + "".join(f"{figure:>13.3g}" for figure in figures))
    return "\n".join(lines)


def claims(seeds):
    """What Figure 1 says, over the seeds' answers."""
    best, cold, warm, worst = (
        np.array([answers[f"{title} F"] for answers in seeds]) for title in TITLES
    )
    retrained = np.array([answers["Warm start retrained F"] for answers in seeds])
    fits = max(float(answers[f"{title} f"]) for answers in seeds for title in TITLES)
    ordered = (best < np.minimum(cold, warm)) & (np.maximum(cold, warm) < worst)
    values = ", ".join(
        f"{title} {value.min():.2g} to {value.max():.2g}"
        for title, value in zip(TITLES, (best, cold, warm, worst))
    )
    return [
        Claim(
            "The four solution concepts give four answers to one problem, all of which "
            "fit the learned points; the optimistic one is best and the pessimistic "
            "one worst.",
            "drawn by hand in Figure 1",
            f"F: {values}; f at most {fits:.0e}",
            len(seeds),
            bool(np.all(ordered)) and fits < 1e-3,
        ),
        Claim(
            "What a warm start knows is not all in the learned points: weights that are "
            "trained on them from scratch do worse.",
            "implied",
            f"F rises from {warm.mean():.2g} to {retrained.mean():.2g} in the mean, and "
            f"by {(retrained - warm).min():.2g} at least",
            len(seeds),
            bool(np.all(retrained > warm)),
        ),
    ]


def regions(ax, problem, y):
    """The two sides of the boundary, softer where the score is small."""
    across, up = (np.linspace(*side, 240) for side in WINDOW)
    grid = np.stack(np.meshgrid(across, up), axis=-1)
    score = np.asarray(problem.score(y, jnp.asarray(grid.reshape(-1, 2), y.dtype)))
    score = np.clip(score, -1, 1).reshape(grid.shape[:2])
    low, high = (np.array(to_rgb(colour)) for colour in plot.CLASS_COLOURS[:2])
    shares = np.array([0.34, 0.24, 0.14, 0.14, 0.24, 0.34])[:, None]
    sides = np.stack([low] * 3 + [high] * 3)
    levels = [-1.1, -0.6, -0.25, 0, 0.25, 0.6, 1.1]
    ax.contourf(across, up, score, levels, colors=1 - shares * (1 - sides), zorder=0)
    ax.contour(across, up, score, [0], colors="0.15", linewidths=1.1, zorder=1)


def arrows(ax, path, colour, start_marker):
    """The way of a learned point, with heads at equal distances along it."""
    length = np.append(0, np.cumsum(np.linalg.norm(np.diff(path, axis=0), axis=1)))
    if length[-1] == 0:
        return
    ax.plot(*path.T, color="white", lw=2.4, zorder=3)
    ax.plot(*path.T, color=colour, lw=1.1, zorder=3)
    ax.plot(*path[0], start_marker, ms=6, mfc="white", mec=colour, mew=1.1, zorder=4)
    for share in (0.15, 0.4, 0.65, 0.9):
        ends = [
            np.interp(at * length[-1], length, p)
            for at in (share, share + 0.02)
            for p in path.T
        ]
        ax.annotate(
            "",
            ends[2:],
            ends[:2],
            arrowprops={
                "arrowstyle": "-|>",
                "color": colour,
                "lw": 0,
                "mutation_scale": 11,
            },
            zorder=4,
        )


def panel(ax, problem, title, x, y, value, path):
    regions(ax, problem, y)
    plot.data_points(ax, problem.points, problem.labels, s=13)
    for i, marker in enumerate("os"):
        if path is not None:
            arrows(ax, path[:, i], plot.CLASS_COLOURS[i], marker)
        plot.data_points(
            ax,
            x[i : i + 1],
            np.array([i]),
            s=95,
            edgecolors="black",
            linewidths=1.1,
            zorder=5,
        )
    ax.set(xticks=[], yticks=[], xlim=WINDOW[0], ylim=WINDOW[1], aspect="equal")
    ax.set_title(f"{title}: $F = {float(value):.3f}$")
    ax.spines[:].set_visible(False)


def draw(problem, answers, radius):
    """All four panels."""
    notes = (
        "the best weights for the data",
        "the weights nearest to $y_0$",
        "the weights that the way leads to",
        f"the worst weights within $R = {radius:g}$",
    )
    with plot.house_style():
        figure, axes = plt.subplots(1, 4, figsize=(9.6, 2.25), layout="constrained")
        for ax, note, title in zip(axes, notes, TITLES):
            x, y, value, path = (
                answers[f"{title} {name}"] for name in ("x", "y", "F", "path")
            )
            path = path if title == "Warm start" else None
            panel(ax, problem, title, x, y, value, path)
            ax.set_xlabel(note, fontsize=8)
    return figure


def main():
    parser = arguments(__doc__)
    parser.add_argument(
        "--seeds", type=int, default=3, help="how many data sets; the first is drawn (3)"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=1000,
        help="outer steps of the warm start; the others take 20 at most (1000)",
    )
    parser.add_argument(
        "--radius",
        type=float,
        default=1.0,
        help="how far from the cold weights the pessimist looks (1)",
    )
    args = parser.parse_args()
    this = Figure("solution_concepts", args)

    seeds = []
    for seed in range(args.seeds):
        problem, x0, y0 = two_arcs(jr.key(seed))
        answers = this.part(
            f"seed-{seed}",
            lambda: solve_all(problem, x0, y0, args.radius, args.steps),
            steps=args.steps,
            radius=args.radius,
        )
        print(table(answers))
        seeds.append(answers)
    print(
        "Retrained: with the weights of a cold start at the same points. Certificate: "
        "the largest\nresidual."
    )
    problem, _, _ = two_arcs(jr.key(0))
    this.save(draw(problem, seeds[0], args.radius))
    this.conclude(claims(seeds))


if __name__ == "__main__":
    main()
