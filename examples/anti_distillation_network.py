"""Figure 8 of the paper: anti-distillation by a network, where there is no closed form.

    python examples/anti_distillation_network.py --output outputs

Thirteen learned targets are fitted by a network of one hidden layer of 10 ReLUs, so that
it passes through a single validation point, (0, 2). As in the linear case, every number
of steps fits that point, and fewer steps make the weights smaller and the targets larger.

- Neumann: the network is trained from scratch for 5,000 steps before each outer update,
  whose hypergradient has K Neumann terms: a cold start.
- Unrolled: one outer step through K unrolled steps, then one inner step, from where the
  network is (Algorithm 1): a warm start.

All K and seeds of a method are one compiled program. A seed draws the initial weights.

The paper gives the network, the 5,000 steps, and gradient descent at 1e-2 for both
levels. What is chosen here: the inputs lie on [-2, 2], where that inner rate is stable;
the weights start LeCun-normal with zero biases; the losses are half a sum of squares, as
in Section 4.2. The outer rates are larger than the paper's, 0.2 with Neumann and 0.05
with unrolling, because at 1e-2 a single step (K = 1) would take some 60,000 outer updates
to arrive. K ends at 40: the network does not quite interpolate, so that its inner Hessian
has negative eigenvalues, on which a Neumann series of a hundred terms diverges.
"""

import functools as ft

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
import optax
from _figure import arguments, Claim, Figure

import bilevel_eqx as blx
from bilevel_eqx import plot, tasks


INNER_RATE = 1e-2
NUM_SEEDS = 3
GRID = np.linspace(-2.2, 2.2, 221)
METHODS = {
    "neumann": "Neumann, trained from scratch",
    "unrolled": "unrolled, alternating",
}


def schedule(quick):
    """K, the steps of a training from scratch, and how far the outer level goes."""
    return {
        "terms": [5, 20] if quick else [1, 2, 5, 10, 20, 40],
        "training": 1000 if quick else 5000,
        "neumann": (0.2, 400 if quick else 1500),
        "unrolled": (0.05, 3000 if quick else 10_000),
    }


def algorithm(method, K, outer_rate, training):
    """The equilibrium that is aimed at, and the paper's way there."""
    optimiser, inner = optax.sgd(outer_rate), optax.sgd(INNER_RATE)
    if method == "neumann":
        # However far the training came, that is where the paper goes on from.
        train = blx.GradientDescent(INNER_RATE, training)
        response = blx.Implicit(train, blx.Neumann(K, INNER_RATE), tolerance=None)
        return blx.ColdStart(), blx.GradientPipeline(response, optimiser)
    look_ahead, step = blx.Unrolled(inner, K, mode="forward"), blx.Unrolled(inner, 1)
    return blx.WarmStart(), blx.GradientPipeline(look_ahead, optimiser, step)


@eqx.filter_jit
def sweep(method, terms, keys, outer_rate, num_steps, training):
    """All K and all seeds at once."""

    def run(K, key):
        problem, x0, y0 = tasks.anti_distillation_network(key)
        equilibrium, pipeline = algorithm(method, K, outer_rate, training)
        solution = blx.solve(
            problem,
            equilibrium,
            x0,
            y0,
            pipeline=pipeline,
            num_steps=num_steps,
            save_every=num_steps,
            throw=False,
        )
        x, y = solution.x, solution.y
        return {
            "targets": x,
            "weights": jax.flatten_util.ravel_pytree(y)[0],
            "fit": problem.predict(y, jnp.asarray(GRID)),
            "misfit": jnp.sqrt(2 * solution.value),
            "sound": solution.result == blx.RESULTS.successful,
        }

    over_terms = eqx.filter_vmap(run, in_axes=(0, None))
    return eqx.filter_vmap(over_terms, in_axes=(None, 0))(terms, keys)


def norm(array):
    return np.linalg.norm(array, axis=-1)


def in_order(found):
    """How many steps of the grid of K go the way of the claim, of how many; and whether
    all seeds do from its one end to the other."""
    changes = [np.diff(norm(found["weights"])), -np.diff(norm(found["targets"]))]
    count = sum(int(np.sum(c > 0)) for c in changes)
    ends = all(bool(np.all(c.sum(axis=-1) > 0)) for c in changes)
    return count, sum(c.size for c in changes), ends


def claims_of(found, terms):
    claims = []
    for method, name in METHODS.items():
        runs = found[method]
        w, targets = (norm(runs[k]).mean(axis=0) for k in ("weights", "targets"))
        count, of, ends = in_order(runs)
        claims.append(
            Claim(
                f"A network ({name}): fewer steps end with smaller weights and larger "
                "targets.",
                "similar conclusions hold when training an MLP (Appendix D.2)",
                f"K from {terms[0]} to {terms[-1]}: mean |w| from {w[0]:.3f} to "
                f"{w[-1]:.3f}, mean |lambda| from {targets[0]:.3f} to "
                f"{targets[-1]:.3f}; between the ends all seeds agree: {ends}; between "
                f"neighbours on the grid {count} of {of} changes go that way",
                NUM_SEEDS,
                ends,
            )
        )
    misfit = float(max(np.max(runs["misfit"]) for runs in found.values()))
    sound = all(bool(np.all(runs["sound"])) for runs in found.values())
    claims.append(
        Claim(
            "A network fits the validation point with every number of steps.",
            "any solution that places a learned datapoint on top of the validation "
            "point perfectly fits the outer objective (Section 4.2)",
            f"K = {', '.join(map(str, terms))}, both methods: within {misfit:.2g} of "
            f"the target of 2; no run diverged: {sound}",
            NUM_SEEDS,
            sound and misfit < 0.05,
        )
    )
    return claims


BLUE, ORANGE = "#1f3b73", "#e08214"


def draw_fits(ax, runs, terms):
    inputs = np.linspace(-2, 2, runs["targets"].shape[-1])
    picks = np.unique(np.linspace(0, len(terms) - 1, 4).round().astype(int))
    colours = plt.get_cmap("viridis_r")(np.linspace(0.12, 0.95, len(picks)))
    for colour, i in zip(colours, picks):
        ax.plot(GRID, runs["fit"][0, i], color=colour, lw=0.9)
        ax.plot(
            inputs,
            runs["targets"][0, i],
            "o",
            color=colour,
            ms=3.4,
            label=f"$K = {terms[i]}$",
        )
    ax.plot(0, 2, "X", color="#c2185b", ms=8, mec="white", mew=0.6, zorder=5)
    # The legend is below the curves.
    top = runs["targets"][0, picks].max() + 0.4
    ax.set(xlabel="input", ylabel="learned target, and fit", ylim=(-2.2, top))
    ax.legend(loc="lower center", ncols=2, handletextpad=0.2, columnspacing=0.8)


def draw_norms(ax, runs, terms):
    """The mean over the seeds, and each of them as a thin line."""
    right = ax.twinx()
    right.spines["right"].set_visible(True)
    for axes, name, colour, marker, style, tex in (
        (ax, "weights", BLUE, "o", "-", r"$\|w\|$"),
        (right, "targets", ORANGE, "s", "--", r"$\|\lambda\|$"),
    ):
        norms = norm(runs[name])
        axes.plot(terms, norms.mean(axis=0), color=colour, ls=style, label=tex)
        axes.plot(terms, norms.T, marker + style, color=colour, ms=2.6, lw=0.5, alpha=0.5)
        axes.set_ylabel(tex, color=colour)
    ax.set(xscale="log", xlabel="$K$", xticks=terms)
    ax.set_xticks([], minor=True)
    ax.set_xticklabels(map(str, terms))
    handles = [h for a in (ax, right) for h in a.get_legend_handles_labels()[0]]
    ax.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 0.97), ncols=2)


def draw(found, terms):
    with plot.house_style():
        picture, axes = plt.subplots(1, 4, figsize=(11, 2.6), layout="constrained")
        for letter, ax, (method, name) in zip("ab", axes[:2], METHODS.items()):
            draw_fits(ax, found[method], terms)
            ax.set_title(f"({letter}) {name}")
        for letter, ax, method in zip("cd", axes[2:], METHODS):
            draw_norms(ax, found[method], terms)
            ax.set_title(f"({letter}) norms, {METHODS[method].split(',')[0]}", pad=17)
    return picture


def main():
    args = arguments(__doc__).parse_args()
    figure = Figure("anti_distillation_network", args)
    plan = schedule(figure.quick)
    terms, training = plan["terms"], plan["training"]
    keys = jax.vmap(jr.key)(jnp.arange(NUM_SEEDS))
    found = {}
    for method in METHODS:
        outer_rate, num_steps = plan[method]
        compute = ft.partial(
            sweep, method, jnp.array(terms), keys, outer_rate, num_steps, training
        )
        found[method] = figure.part(method, compute, seeds=NUM_SEEDS, **plan)
        print(f"{'K':>6}{'|w|':>24}{'|lambda|':>24}{'misfit':>26}  one for each seed")
        for i, K in enumerate(terms):
            runs = (norm(found[method][k])[:, i] for k in ("weights", "targets"))
            columns = [*runs, found[method]["misfit"][:, i]]
            cells = [" ".join(f"{v:7.4f}" for v in column) for column in columns]
            print(f"{K:>6}" + "".join(f"{cell:>26}" for cell in cells))
    figure.save(draw(found, terms))
    figure.conclude(claims_of(found, terms))


if __name__ == "__main__":
    main()
