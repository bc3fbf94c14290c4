"""What the equilibria mean, on the smallest problem in which they differ.

    python examples/concepts.py --output outputs

The inner variables are two weights y, and inner training sets only the first of them,
to x: the inner minima S(x) are a vertical line. Left, the answers of four equilibria in
the plane of the weights, each on its line. Right, what each concept minimises as a
function of x: the outer objective at the best, the nearest and the worst inner minimum. A
warm start minimises none of these functions, and comes to rest where its own
hypergradient is zero.

The points are computed by the library, and the curves are closed forms.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from _figure import arguments, Figure

import bilevel_eqx as blx
from bilevel_eqx import plot


RADIUS, EPSILON = 0.5, 0.5
CONCEPTS = {
    "optimistic": (blx.Optimistic(), plot.CLASS_COLOURS[1]),
    "cold start": (blx.ColdStart(), plot.CLASS_COLOURS[2]),
    "warm start, partial": (blx.WarmStart(EPSILON), plot.CLASS_COLOURS[3]),
    "pessimistic": (blx.Pessimistic(RADIUS), plot.CLASS_COLOURS[0]),
}
LABELS = {
    "optimistic": "F at the best minimum (optimistic)",
    "cold start": "F at the nearest one (cold start)",
    "warm start, partial": "at rest here (warm start)",
    "pessimistic": "F at the worst within R (pessimistic)",
}
# The second weight of the best, the nearest and the worst inner minimum.
SELECTED = {
    "optimistic": lambda x: x,
    "cold start": lambda x: 0 * x,
    "pessimistic": lambda x: np.where(x < 0, RADIUS, -RADIUS),
}


def outer(x, y):
    return 0.5 * ((x - y[1]) ** 2 + (y[0] - 1) ** 2)


def inner(x, y):
    return 0.5 * (y[0] - x) ** 2


def answers():
    """The x, y and F of each concept, started at x = .1 and y = 0."""
    problem, start = blx.BilevelProblem(outer, inner), (jnp.array(0.1), jnp.zeros(2))
    found = {}
    for name, (concept, _) in CONCEPTS.items():
        solution = blx.solve(problem, concept, *start, num_steps=100, tolerance=1e-5)
        found[name] = (float(solution.x), np.asarray(solution.y), float(solution.value))
    return found


def draw(found):
    picture, (plane, values) = plt.subplots(
        1, 2, figsize=(8.6, 3.1), layout="constrained"
    )
    grid = np.linspace(-0.35, 1.25, 200)
    places = {  # of the names beside their points
        "optimistic": (-8, -2, "right"),
        "cold start": (8, 6, "left"),
        "warm start, partial": (-6, 8, "right"),
        "pessimistic": (-8, -4, "right"),
    }
    for name, (_, colour) in CONCEPTS.items():
        x, y, value = found[name]
        plane.axvline(x, color=colour, lw=0.8, ls=":")
        plane.plot(*y, "o", color=colour, ms=6)
        right, up, side = places[name]
        options = dict(textcoords="offset points", color=colour, ha=side, fontsize=8)
        options |= dict(bbox=dict(fc="white", ec="none", pad=0.8))
        plane.annotate(f"{name}", y, (right, up), **options)
        values.plot(x, value, "o", color=colour, ms=6)
        if name in SELECTED:
            curve = outer(grid, np.stack([grid, SELECTED[name](grid)]))
            values.plot(grid, curve, color=colour, label=LABELS[name])
        else:
            values.plot([], [], "o", color=colour, ms=6, label=LABELS[name])
    plane.plot(0, 0, "s", color="0.3", ms=5)
    plane.annotate("$y_0$", (0, 0), (-4, -12), textcoords="offset points", ha="right")
    plane.set(xlim=(-0.6, 1.25), ylim=(-0.75, 1.25), xlabel="$y_1$", ylabel="$y_2$")
    plane.set_title("answers on their lines $S(x)$", loc="left")
    values.set(ylim=(-0.04, 1.3), xlabel="$x$", ylabel="$F$")
    values.set_title("what is minimised over $x$", loc="left")
    values.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return picture


def main():
    figure = Figure("concepts", arguments(__doc__).parse_args())
    with jax.enable_x64(True):
        found = answers()
    for name, (x, y, value) in found.items():
        print(f"{name:<20} x = {x:.4f}, y = ({y[0]:.4f}, {y[1]:.4f}), F = {value:.4f}")
    with plot.house_style():
        figure.save(draw(found))


if __name__ == "__main__":
    main()
