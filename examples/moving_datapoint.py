"""Figure 4 of the paper: warm and cold start in the plane of the weights.

    python examples/moving_datapoint.py --output outputs

A line is fitted to a single datapoint, which moves: there are two weights, and so a whole
line of weights fits the datapoint wherever it is. Four of its places are visited in turn.
A full warm start projects the weights on the next line, which is a step of Kaczmarz'
algorithm; a partial one goes some of the way; a cold start projects the origin each time.
The former two cycle to where the four lines meet: these weights fit the datapoint in all
of its places. The latter never gets to know more than one of them.

Every step is taken by the library and held against its closed form, for the problem that
is drawn and for random ones: lines, places and starting points that are random numbers,
with two weights and with five, where the solution sets meet in a space of three
dimensions. A cycle is an affine map of the weights, and so cycling on for ever is a
matter of squaring it repeatedly.

The paper gives no numbers for this figure: the data are those of
`bilevel_eqx.tasks.line`, and the four places, the rate and epsilon are choices.
"""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _figure import arguments, Claim, Figure

import bilevel_eqx as blx
from bilevel_eqx import plot, tasks


jax.config.update("jax_enable_x64", True)
import matplotlib.pyplot as plt  # noqa: E402


PLACES = (-1.9, -0.3, 0.5, 1.8)
EPSILON = 2.0
EPSILONS = (0.01, 0.1, 1.0, 10.0, 100.0)
# Of a partial warm start by gradient descent: its steps, and their size in terms of the
# largest curvature that is met.
NUM_STEPS = 3
STEP = 0.3
# Of gradient descent to convergence: .9^300 is rounding.
MANY_STEPS = 300
SMALL_STEP = 0.1
DOUBLINGS = 16
EXACT = 1e-10
# Rounding, which a damping of .01 amplifies, adds up over the cycles.
IN_THE_LIMIT = 1e-6

FULL = blx.Implicit(blx.Projection(), blx.Pseudoinverse())


def proximal(epsilon):
    return blx.Proximal(epsilon, blx.Projection(), blx.Pseudoinverse())


def square(problem, x):
    """The curvature of the inner objective."""
    features, _ = problem.datapoint(x)
    return features @ features


def online(problem, places):
    """A few steps of gradient descent, and the epsilon that has the same effect at x."""
    rate = STEP / jnp.max(jax.vmap(ft.partial(square, problem))(places))

    def epsilon(x):
        curvature = square(problem, x)
        share = 1 - (1 - rate * curvature) ** NUM_STEPS
        return curvature * (1 / share - 1)

    return blx.Unrolled(optax.sgd(rate), NUM_STEPS), epsilon


def path(step, places, y0, warm=True):
    """The weights at each place, each answered from the last weights or from y0."""

    def move(y, x):
        y = step(x, jnp.where(warm, y, y0))
        return y, y

    return jnp.concatenate([y0[None], jax.lax.scan(move, y0, places)[1]])


def by_library(problem, response):
    return lambda x, y: blx.best_response(problem, x, y, response)


def by_formula(problem, epsilon):
    return lambda x, y: tasks.kaczmarz_step(problem, x, y, epsilon=epsilon(x))


def for_ever(problem, places, y0, response):
    """Where cycling ends: a power of one cycle, which is an affine map of the weights."""
    # Where a cycle leads from zero and from each unit vector says what map it is.
    starts = jnp.concatenate([jnp.zeros((1, y0.size)), jnp.eye(y0.size)])
    cycle = jax.vmap(lambda y: path(by_library(problem, response), places, y)[-1])
    shift, *columns = cycle(starts)
    linear = jnp.stack(columns, axis=1) - shift[:, None]
    affine = jnp.block([[linear, shift[:, None]], [jnp.zeros_like(y0), 1]])
    affine, _ = jax.lax.scan(lambda a, _: (a @ a, None), affine, length=DOUBLINGS)
    return (affine @ jnp.append(y0, 1))[:-1]


def with_fixed_features(problem, x):
    """The features stay what they are at x, and only the target moves."""
    features, _ = problem.datapoint(x)
    origin = problem.origin.at[:-1].set(features)
    direction = problem.direction.at[:-1].set(0)
    return eqx.tree_at(lambda p: (p.origin, p.direction), problem, (origin, direction))


def experiment(problem, places, y0, num_cycles):
    """All that is measured on one problem."""
    tour = jnp.tile(places, num_cycles)
    fixed = with_fixed_features(problem, places[0])
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), problem, fixed)

    def answers(problem, warm):
        return path(by_library(problem, FULL), tour, y0, warm)

    # Warm and cold, each with features that move and with fixed ones.
    kinds = jax.vmap(answers, in_axes=(0, None))
    warm, cold = jax.vmap(kinds, in_axes=(None, 0))(both, jnp.array([True, False]))
    few_steps, like_few_steps = online(problem, tour)
    ways = {"full": warm[0], "cold": cold[0]}
    ways["online"] = path(by_library(problem, few_steps), tour, y0)
    ways["proximal"] = path(by_library(problem, proximal(EPSILON)), tour, y0)
    formulas = {
        "full": by_formula(problem, lambda x: 0.0),
        "cold": by_formula(problem, lambda x: 0.0),
        "online": by_formula(problem, like_few_steps),
        "proximal": by_formula(problem, lambda x: EPSILON),
    }
    found = {f"way, {kind}": way for kind, way in ways.items()}
    for kind, step in formulas.items():
        expected = path(step, tour, y0, warm=kind != "cold")
        found[f"formula, {kind}"] = distance(ways[kind], expected)
    found["apart, moving"] = distance(warm[0], cold[0])
    found["apart, fixed"] = distance(warm[1], cold[1])

    # Gradient descent to convergence, from y0 to the first place.
    rate = SMALL_STEP / square(problem, places[0])
    descent = blx.Implicit(blx.GradientDescent(rate, MANY_STEPS), blx.Pseudoinverse())
    descended = blx.best_response(problem, places[0], y0, descent)
    projected = tasks.kaczmarz_step(problem, places[0], y0)
    found["descent"] = distance(descended, projected)

    meeting = tasks.meeting_point(problem, y0)
    found["meeting, full"] = distance(for_ever(problem, places, y0, FULL), meeting)

    def meets(epsilon):
        return distance(for_ever(problem, places, y0, proximal(epsilon)), meeting)

    found["meeting, proximal"] = jax.vmap(meets)(jnp.array(EPSILONS))

    # The inner objective at all of the places, with the weights of the last.
    inner = jax.vmap(problem.inner, in_axes=(0, None))
    found["all places, warm"] = jnp.max(inner(places, meeting))
    found["all places, cold"] = jnp.max(inner(places, cold[0][-1]))
    return found


def distance(a, b):
    """Relative to b, where that is large."""
    return jnp.max(jnp.abs(a - b)) / jnp.maximum(1, jnp.max(jnp.abs(b)))


def nearly_parallel(a, b):
    return abs(a @ b) > 0.9 * np.linalg.norm(a) * np.linalg.norm(b)


def random_problem(seed, num_weights):
    """A random line in data space, four places on it in random order, a random start.

    Lines whose features hardly turn are left out: the solution sets are nearly parallel
    then, and how many cycles it takes grows beyond all bounds.
    """
    rng = np.random.default_rng(seed)
    origin, direction = rng.normal(size=(2, num_weights + 1))
    while nearly_parallel(origin[:-1], direction[:-1]):
        direction = rng.normal(size=num_weights + 1)
    problem, _, _ = tasks.line(
        origin=jnp.array(origin),
        direction=jnp.array(direction),
        validation_features=jnp.ones((5, num_weights)),
        validation_targets=jnp.ones(5),
    )
    places = rng.permutation(np.linspace(-1.5, 1.5, 4) + 0.3 * rng.normal(size=4))
    return problem, jnp.array(places), jnp.array(rng.normal(size=num_weights))


def experiments(cases, num_cycles):
    """All that is measured on several problems of the same size, at once."""
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *cases)

    @eqx.filter_jit
    @jax.vmap
    def run(problem, places, y0):
        return experiment(problem, places, y0, num_cycles)

    return run(*stacked)


def cases(num_seeds, num_weights):
    """Random problems, after the one that is drawn if that has as many weights."""
    problem, _, y0 = tasks.line()
    random = [random_problem(seed, num_weights) for seed in range(num_seeds)]
    drawn = [(problem, jnp.array(PLACES), y0)] if y0.size == num_weights else []
    return drawn + random


def claims(found, seeds):
    def largest(name):
        return max(float(np.max(f[name])) for f in found)

    def smallest(name):
        return min(float(np.min(f[name])) for f in found)

    kinds = ("full", "online", "proximal", "cold")
    off = {k: largest(f"formula, {k}") for k in kinds}
    epsilons = f"{len(EPSILONS)} epsilons from {EPSILONS[0]:g} to {EPSILONS[-1]:g}"
    warm, cold = largest("all places, warm"), smallest("all places, cold")
    full, partial = largest("meeting, full"), largest("meeting, proximal")
    return [
        Claim(
            "Each step of a full warm start is a step of Kaczmarz' algorithm; of a "
            "partial one, a damped one; of a cold start, one from the initial weights.",
            "w + phi (t - phi w) / |phi|^2",
            "largest difference, to 1e-10: "
            + ", ".join(f"{kind} {error:.1e}" for kind, error in off.items()),
            seeds,
            max(off.values()) <= EXACT,
        ),
        Claim(
            "Gradient descent tends to the projection of its start on the solutions.",
            "cold start projects from the origin, warm start from the current weights",
            f"largest distance after {MANY_STEPS} steps, to 1e-10: "
            f"{largest('descent'):.1e}",
            seeds,
            largest("descent") <= EXACT,
        ),
        Claim(
            "With fixed features full warm start equals cold start on every path; they "
            "separate only when the features move.",
            "the solution sets must differ in direction (implied)",
            f"largest distance with fixed features {largest('apart, fixed'):.1e}; "
            f"smallest with moving ones {smallest('apart, moving'):.2g}",
            seeds,
            largest("apart, fixed") <= EXACT and smallest("apart, moving") >= 1e-3,
        ),
        Claim(
            "Cycling through the solution sets converges to the projection of the start "
            "on their intersection.",
            "the inner parameters converge to the intersection of the solution sets",
            f"largest distance, to 1e-6, after 2^{DOUBLINGS} cycles with 2 and with 5 "
            f"weights: {full:.1e}",
            seeds,
            full <= IN_THE_LIMIT,
        ),
        Claim(
            "Partial (proximal) cycling reaches the same point for every epsilon.",
            "not stated; its partial warm start is drawn on the way there",
            f"largest distance, to 1e-6, for {epsilons}: {partial:.1e}",
            seeds,
            partial <= IN_THE_LIMIT,
        ),
        Claim(
            "A cycling warm start finds weights that are right for all values of the "
            "outer variable at once, and a cold start does not.",
            "inner parameters that perform well for multiple outer parameters at once",
            f"worst inner objective of the four places: warm start at most {warm:.1e}, "
            f"cold start at least {cold:.2g}",
            seeds,
            warm <= 1e-16 and cold >= 1e-3,
        ),
    ]


#
# The picture
#

VALIDATION = "#7a7a7a"
COLOURS = {
    "full": plot.CLASS_COLOURS[0],
    "online": plot.CLASS_COLOURS[2],
    "proximal": plot.CLASS_COLOURS[1],
    "cold": plot.CLASS_COLOURS[0],
}
WINDOW = ((-0.75, 2.05), (-0.45, 2.05))


def draw(paths):
    problem, _, _ = tasks.line()
    figure, axes = plt.subplots(1, 4, figsize=(11.2, 3.0), layout="constrained")
    data_space(axes[0], problem, paths)
    titles = {
        1: "(b) warm start, full",
        2: "(c) warm start, partial",
        3: "(d) cold start",
    }
    for i, title in titles.items():
        weight_space(axes[i], problem)
        axes[i].set_title(title)
    walk(axes[1], paths["full"], COLOURS["full"], "projections")
    label = f"{NUM_STEPS} steps of descent"
    walk(axes[2], paths["online"], COLOURS["online"], label)
    label = rf"proximal, $\epsilon = {EPSILON:g}$"
    walk(axes[2], paths["proximal"], COLOURS["proximal"], label, marker="s")
    for end in paths["cold"][1 : 1 + len(PLACES)]:
        step = np.stack([paths["cold"][0], end])
        walk(axes[3], step, COLOURS["cold"])
    axes[3].plot([], [], "o-", color=COLOURS["cold"], ms=3, label="projections")
    for ax in axes[1:]:
        # Below the axes, where there is nothing to cover.
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    return figure


def data_space(ax, problem, paths):
    """The datapoint's way and places, the validation data, and what is fitted."""
    inputs = np.array([-2.6, 2.6])
    for end in paths["cold"][1 : 1 + len(PLACES)]:
        label = None if ax.lines else "fits of cold start"
        ax.plot(inputs, end[0] * inputs + end[1], "--", color="0.55", lw=1, label=label)
    slope, intercept = paths["full"][-1]
    label = "fit of warm start"
    ax.plot(inputs, slope * inputs + intercept, "-", color="black", lw=1, label=label)
    ax.plot(
        problem.validation_features[:, 0],
        problem.validation_targets,
        "D",
        color=VALIDATION,
        ms=3.6,
        label="validation data",
    )
    for number, x in enumerate(PLACES, 1):
        features, target = problem.datapoint(x)
        ax.plot(features[0], target, "o", color=plot.CLASS_COLOURS[3], mec="black", ms=7)
        ax.annotate(
            str(number),
            (float(features[0]), float(target)),
            xytext=(-9, 5),
            textcoords="offset points",
            fontsize=8,
        )
    ax.plot([], [], "o", color=plot.CLASS_COLOURS[3], mec="black", label="the datapoint")
    ax.set(xlabel="input", ylabel="target", title="(a) one datapoint on a line")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)


def weight_space(ax, problem):
    """The four solution sets over the contours of the validation loss."""
    across, up = (np.linspace(*side, 150) for side in WINDOW)
    grid = jnp.stack(jnp.meshgrid(jnp.array(across), jnp.array(up)), axis=-1)
    loss = jax.vmap(jax.vmap(lambda y: problem.outer(0.0, y)))(grid)
    levels = np.geomspace(float(loss.min()) * 1.02, float(loss.max()), 14)
    ax.contourf(across, up, loss, levels, cmap="Greys_r", alpha=0.35, zorder=0)
    for number, x in enumerate(PLACES, 1):
        (slope, bias), target = problem.datapoint(x)
        ax.plot(across, (target - slope * across) / bias, color="black", lw=0.8, zorder=1)
        # The number stands where the line ends, on the right, below or above.
        height = np.clip((target - slope * across[-1]) / bias, *WINDOW[1])
        edge = float((target - height * bias) / slope), float(height)
        below = height == WINDOW[1][0]
        ax.annotate(
            str(number),
            edge,
            xytext=(0, 4) if height == WINDOW[1][1] else (4, 4 if below else -3),
            textcoords="offset points",
            ha="center" if height == WINDOW[1][1] else "left",
            fontsize=8,
            annotation_clip=False,
        )
    meeting = tasks.meeting_point(problem, jnp.zeros(2))
    white = {"ls": "none", "color": "white", "mec": "black", "zorder": 5}
    ax.plot(*meeting, marker="*", ms=12, label="where all meet", **white)
    best = jnp.linalg.lstsq(problem.validation_features, problem.validation_targets)[0]
    ax.plot(*best, marker="P", ms=7, label="validation optimum", **white)
    ax.plot(0, 0, "x", ms=6, color="black", mew=1.6, zorder=6, label="start")
    ax.set(xlabel="slope $w_1$", ylabel="intercept $w_2$")
    ax.set(xlim=WINDOW[0], ylim=WINDOW[1])


def walk(ax, way, colour, label=None, marker="o"):
    """Steps with a head on each of the longer ones."""
    way = np.asarray(way)
    ax.plot(*way.T, f"{marker}-", color=colour, lw=1.2, ms=3, zorder=4, label=label)
    for start, end in zip(way[:-1], way[1:]):
        if np.linalg.norm(end - start) > 0.15:
            ax.annotate(
                "",
                end,
                start,
                arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 0, "shrinkB": 1},
                zorder=4,
            )


def main():
    args = arguments(__doc__).parse_args()
    figure = Figure("moving_datapoint", args)
    num_seeds, num_cycles = (5, 10) if figure.quick else (50, 25)
    settings = {"seeds": num_seeds, "cycles": num_cycles}
    found = [
        figure.part(
            f"{n} weights",
            lambda n=n: experiments(cases(num_seeds, n), num_cycles),
            **settings,
        )
        for n in (2, 5)
    ]
    # The problem that is drawn is the first of those with two weights.
    paths = {kind: found[0][f"way, {kind}"][0] for kind in COLOURS}
    with plot.house_style():
        picture = draw(paths)
        figure.save(picture)
        plt.close(picture)
    figure.conclude(claims(found, num_seeds))


if __name__ == "__main__":
    main()
