"""Figures 3 and 7 of the paper: which outer solution is found hangs on the hypergradient.

    python examples/anti_distillation.py --output outputs                     # Figure 3
    python examples/anti_distillation.py --output outputs --basis reciprocal  # Figure 7

Thirteen learned targets are fitted by a linear regression on 21 Fourier features, so that
it passes through a single validation point, (0, 2). Every setting of the hypergradient
(K Neumann terms, K unrolled steps, a proximal epsilon) fits that point. But the fewer
steps or the larger epsilon, the smaller are the weights w and the larger the targets.

Each setting is run from zero to its fixed point, which is held against its closed form.
All settings and all validation points are one compiled program.

The paper gives the features, the starting values and the rates: 1e-8 (Figure 3) or 1e-3
(Figure 7) for the weights, and 1e-2 for the targets. What is chosen here:

- The inputs lie on [-3, 3]: on [-pi, pi] the two ends would have the same features.
- The grids of K and epsilon go from one end of the trade-off to the other.
- The paper's experiment has nothing random in it. The seeds are further validation
  points, at random inputs. Their targets are 2 throughout: that only sets the scale.

What is exact here: the inner solve is the projection on the set of minima (at a rate of
1e-8, gradient descent would take 7 million steps for each e-fold of the flattest
direction), and a Neumann series whose length is known only at run time is summed in the
eigenbasis of H. The outer optimiser is L-BFGS, which like gradient descent moves only
within the span of the gradients and so comes to rest at the same point. In Figure 7,
whose rates allow it, plain gradient descent at both levels is run as well (unless
--quick).
"""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import optax
from _figure import arguments, Claim, Figure

import bilevel_eqx as blx
from bilevel_eqx import plot, tasks


jax.config.update("jax_enable_x64", True)
import matplotlib.pyplot as plt  # noqa: E402


INNER_RATES = {"exponential": 1e-8, "reciprocal": 1e-3}
NAMES = {"exponential": "anti_distillation", "reciprocal": "anti_distillation_reciprocal"}
NUM_SEEDS = 4
# One validation point makes F a parabola along the gradient, which never turns: after a
# first step the secant step of L-BFGS is exact, and the others undo its rounding.
NUM_STEPS = 12


def grids(basis, quick):
    """K, from one step to the limit, and epsilon, the same the other way round."""
    decades, (low, high) = (9, (-1, 8)) if basis == "exponential" else (5, (-3, 3))
    per_decade = 1 if quick else (3 if basis == "exponential" else 4)
    terms = np.logspace(0, decades, per_decade * decades + 1).round().astype(int)
    epsilons = np.logspace(low, high, per_decade * (high - low) + 1)
    return {
        "neumann": terms,
        "unrolled": terms[terms <= (100 if quick else 1000)],
        "proximal": epsilons,
    }


def validation_inputs():
    """The paper's, and one for each further seed."""
    keys = jax.vmap(jr.key)(jnp.arange(1, NUM_SEEDS))
    others = jax.vmap(lambda key: jr.uniform(key, minval=-3.0, maxval=3.0))(keys)
    return jnp.concatenate([jnp.zeros(1), others])


def all_problems(basis):
    """The task with one validation input after the other, as one batched problem."""
    make = ft.partial(tasks.anti_distillation, basis=basis)
    at = eqx.filter_vmap(lambda u: make(validation_inputs=u[None])[0])
    _, x0, y0 = make()
    return at(validation_inputs()), x0, y0


def exactly_solved(linear_solver):
    """The projection on the minima, with a Jacobian of whatever stands for H^-1."""
    return blx.Implicit(blx.Projection(), linear_solver)


@eqx.filter_jit
def sweep(problems, x0, y0, settings, rate):
    """Where all settings of all kinds come to rest, for all problems: one program."""
    # The response, and what moves y if that is not the response. K is an array here.
    # The proximal point of a minimum is the minimum itself: nothing is left to solve.
    project = exactly_solved(blx.Pseudoinverse())
    recipes = {
        "neumann": lambda K: (exactly_solved(blx.Neumann(K, rate)), None),
        "unrolled": lambda K: (
            blx.Unrolled(optax.sgd(rate), K, mode="forward"),
            project,
        ),
        "proximal": lambda eps: (blx.Proximal(eps, None, lx.Cholesky()), project),
        "limit": lambda _: (project, None),
    }

    def rest(kind, problem, setting):
        response, inner_update = recipes[kind](setting)
        optimiser = optax.lbfgs(1.0, memory_size=1, linesearch=None)
        solution = blx.solve(
            problem,
            blx.WarmStart(setting if kind == "proximal" else 0.0),
            x0,
            y0,
            pipeline=blx.GradientPipeline(response, optimiser, inner_update),
            num_steps=NUM_STEPS,
            save_every=NUM_STEPS,
        )
        return solution.x, solution.y

    out = {}
    for kind, values in settings.items():
        of_one = eqx.filter_vmap(ft.partial(rest, kind), in_axes=(None, 0))
        x, y = eqx.filter_vmap(of_one, in_axes=(eqx.if_array(0), None))(problems, values)
        out |= {f"{kind}_targets": x, f"{kind}_weights": y}
    return out


@eqx.filter_jit
def plain_descent(problems, x0, y0, K, rate, num_steps):
    """The paper's algorithms as they stand, with plain gradient descent."""
    one, many = (blx.Unrolled(optax.sgd(rate), k) for k in (1, K))
    pipelines = {
        "algorithm 1": blx.GradientPipeline(many, optax.sgd(1e-2), inner_update=one),
        "algorithm 3": blx.GradientPipeline(
            blx.Proximal(1 / (rate * K), blx.Projection(), lx.Cholesky()),
            optax.sgd(1e-1),
        ),
        "Neumann": blx.GradientPipeline(
            exactly_solved(blx.Neumann(K, rate)), optax.sgd(1e-1)
        ),
    }

    def rest(pipeline, steps, problem):
        solution = blx.solve(
            problem,
            blx.WarmStart(),
            x0,
            y0,
            pipeline=pipeline,
            num_steps=steps,
            save_every=steps,
        )
        return solution.x, solution.y

    out = {}
    for name, pipeline in pipelines.items():
        run = ft.partial(rest, pipeline, num_steps[name])
        x, y = eqx.filter_vmap(run)(problems)
        out |= {f"{name}_targets": x, f"{name}_weights": y}
    return out


def spectral_filter(kind, setting, rate):
    """What each setting makes of the eigenvalues of H."""
    if kind == "limit":
        return tasks.pseudoinverse_filter()
    if kind == "proximal":
        return tasks.proximal_filter(setting)
    return tasks.neumann_filter(setting, rate)


def closed_form(problems, kind, settings, rate):
    """Where each setting ought to rest: targets and weights, by problem and setting."""

    def at(problem, setting):
        return tasks.fixed_point(problem, spectral_filter(kind, setting, rate))

    over = eqx.filter_vmap(at, in_axes=(None, 0))
    over = eqx.filter_jit(eqx.filter_vmap(over, in_axes=(eqx.if_array(0), None)))
    targets, weights = over(problems, jnp.asarray(settings))
    return {"targets": np.asarray(targets), "weights": np.asarray(weights)}


def relative_error(found, expected):
    """The largest over all settings, of the targets and of the weights."""
    errors = [
        np.linalg.norm(found[name] - expected[name], axis=-1)
        / np.linalg.norm(expected[name], axis=-1)
        for name in ("targets", "weights")
    ]
    return float(np.max(errors))


def rises(values):
    """Whether values rise along the last axis, up to rounding."""
    return bool(np.all(np.diff(values) >= -1e-9 * np.abs(values[..., 1:])))


def norm(array):
    return np.linalg.norm(array, axis=-1)


def validation_error(problems, weights):
    """How far the fits are from their validation points, at most."""
    fit = np.einsum("sn,skn->sk", problems.validation_features[:, 0], weights)
    return float(np.abs(fit - np.asarray(problems.validation_targets)).max())


def bound_of_the_filters():
    """The ratio of the filters of K steps and of epsilon = 1 / (alpha K), over all
    alpha s in (0, 1]: its least and largest value, and the largest for many steps."""
    u = np.geomspace(1e-9, 1, 20_001)
    steps = np.logspace(0, 6, 61).round()[:, None]
    kept = np.expm1(steps * np.log1p(-np.minimum(u, 1 - 1e-16)))
    ratio = -kept * (1 + 1 / (steps * u))
    return float(ratio.min()), float(ratio.max()), float(ratio[-1].max())


def report(figure, settings, found, errors):
    """A table of the norms, for the paper's validation point."""
    for kind, values in settings.items():
        figure.say(f"{kind}: largest relative error {errors[kind]:.1e}")
        print(f"{'':>12}{'|w|':>11}{'|lambda|':>11}")
        weights, targets = found[kind]["weights"][0], found[kind]["targets"][0]
        for value, w, target in zip(values, norm(weights), norm(targets)):
            label = "infinity" if kind == "limit" else f"{value:.3g}"
            print(f"{label:>12}{w:>11.4g}{target:>11.5g}")


def claims_of(problems, settings, found, errors, plain):
    """What the paper says of the figure, measured."""
    both = slice(0, len(settings["unrolled"]))
    neumann = {k: v[:, both] for k, v in found["neumann"].items()}
    apart = relative_error(found["unrolled"], neumann)
    monotone, ranges = True, []
    for kind in settings:
        # A larger epsilon stands for fewer steps.
        order = slice(None, None, -1 if kind == "proximal" else 1)
        w, targets = (norm(found[kind][k])[:, order] for k in ("weights", "targets"))
        monotone = monotone and rises(w) and rises(-targets)
        if kind in ("neumann", "proximal"):
            ranges.append(
                f"{kind}, from fewest to most: |w| from {w[0, 0]:.4g} to "
                f"{w[0, -1]:.4g}, |lambda| from {targets[0, 0]:.4g} to "
                f"{targets[0, -1]:.4g}"
            )
    misfit = max(validation_error(problems, f["weights"]) for f in found.values())
    count = sum(len(values) for values in settings.values())
    # Off the grid the limit has the targets of least norm too, but not at one input.
    limit = found["limit"]["targets"][0, 0]
    least_norm = float(np.abs(limit - 2 * np.eye(limit.size)[limit.size // 2]).max())
    worst = max(errors.values())
    low, high, many = bound_of_the_filters()
    claims = [
        Claim(
            "K Neumann terms and K unrolled steps have the same fixed points.",
            "truncated Neumann and differentiation through truncated unrolls have the "
            "same fixed points because this problem is convex (Figure 3)",
            f"for {len(settings['unrolled'])} values of K up to "
            f"{settings['unrolled'][-1]}, targets and weights agree to a relative "
            f"{apart:.1e}",
            NUM_SEEDS,
            apart < 1e-6,
        ),
        Claim(
            "Fewer steps or a larger epsilon make the weights smaller and the targets "
            "larger, at each step of the grid.",
            "fewer unrolling steps or a larger epsilon yield smaller-norm inner "
            "parameters and larger-norm outer parameters (Figure 3)",
            f"monotone: {monotone}; at the paper's validation point, "
            + "; ".join(ranges),
            NUM_SEEDS,
            monotone,
        ),
        Claim(
            "Every setting fits the validation point.",
            "we can achieve the good performance for the outer objective by either "
            "making larger updates to the inner or the outer parameters (Section 4.2)",
            f"{count} settings: the fit is within {misfit:.1e} of the point",
            NUM_SEEDS,
            misfit < 1e-6,
        ),
        Claim(
            "Every setting rests where the closed form says.",
            "not in the paper",
            f"{count} settings: the largest relative error of targets or weights is "
            f"{worst:.1e}; in the limit of infinite K only the target at the validation "
            f"point has moved (the others by {least_norm:.1e})",
            NUM_SEEDS,
            worst < 1e-6 and least_norm < 1e-6,
        ),
        Claim(
            "A proximal epsilon of 1 / (alpha K) stands for K steps: their filters of "
            "the spectrum are within a factor of two of each other.",
            "a small number of gradient steps is formalised as a proximal step "
            "(Section 3, Appendix C)",
            f"the ratio is between {low:.4f} and {high:.4f}, and at most {many:.4f} for "
            "many steps, over all alpha s up to 1",
            0,
            low >= 1 - 1e-9 and high <= 2 + 1e-9 and abs(many - 1.2984) < 1e-3,
        ),
    ]
    if plain:
        claims.append(
            Claim(
                "Algorithm 1, Algorithm 3 and Neumann with an exact inner solve reach "
                "the closed form by plain gradient descent.",
                "an unroll of K steps and one inner step (Algorithm 1), a proximal step "
                "(Algorithm 3)",
                "K = 10, epsilon = 1 / (alpha K): relative errors of targets or weights "
                + ", ".join(f"{e:.1e} ({name})" for name, e in plain.items()),
                NUM_SEEDS,
                max(plain.values()) < 1e-6,
            )
        )
    return claims


def check_plain_descent(figure, problems, x0, y0, rate):
    """Runs the algorithms as they stand, at the paper's rates; where the inner problem
    is solved at each step the outer rate is ten times that, to save time."""
    K, steps = 10, {"algorithm 1": 80_000, "algorithm 3": 9_000, "Neumann": 9_000}
    arrays = figure.part(
        "plain", lambda: plain_descent(problems, x0, y0, K, rate, steps), K=K, steps=steps
    )
    errors = {}
    for name in steps:
        kind, setting = "neumann", K
        if name == "algorithm 3":
            kind, setting = "proximal", 1 / (rate * K)
        expected = closed_form(problems, kind, [setting], rate)
        found = {k: arrays[f"{name}_{k}"][:, None] for k in ("targets", "weights")}
        errors[name] = relative_error(found, expected)
    return errors


#
# The picture
#

BLUE, ORANGE = "#1f3b73", "#e08214"
TEX = {"neumann": "K", "proximal": r"\epsilon"}


def shades(count):
    """Colours that go from light to dark, so that their order survives greyscale: the
    darker, the more inner optimisation."""
    return plt.get_cmap("viridis_r")(np.linspace(0.12, 0.95, count))


def draw_fits(ax, kind, settings, found, basis):
    grid = jnp.linspace(-3.3, 3.3, 400)
    features = np.asarray(tasks.fourier_features(grid, basis=basis))
    inputs = np.linspace(-3, 3, found["targets"].shape[-1])
    decades = np.abs(np.log10(settings) % 1) < 1e-9
    whole = np.flatnonzero(decades)
    picks = whole[np.linspace(0, len(whole) - 1, 4).round().astype(int)]
    colours = shades(len(picks))[:: -1 if kind == "proximal" else 1]
    for colour, i in zip(colours, picks):
        label = rf"${TEX[kind]} = 10^{{{round(float(np.log10(settings[i])))}}}$"
        ax.plot(grid, features @ found["weights"][0, i], color=colour, lw=0.9)
        ax.plot(inputs, found["targets"][0, i], "o", color=colour, ms=3.4, label=label)
    ax.plot(0, 2, "X", color="#c2185b", ms=8, mec="white", mew=0.6, zorder=5)
    ax.set(xlabel="input", ylim=(-2.7, 2.7), ylabel="learned target, and fit")
    ax.legend(loc="lower center", ncols=2, handletextpad=0.2, columnspacing=0.8)


def draw_norms(ax, kind, settings, found, problems, rate):
    fine = np.geomspace(settings[0], settings[-1], 200)
    first = jax.tree.map(lambda leaf: leaf[:1], problems)
    expected = closed_form(first, kind, fine, rate)
    right = ax.twinx()
    right.spines["right"].set_visible(True)
    for axes, name, colour, marker, style, tex in (
        (ax, "weights", BLUE, "o", "-", r"$\|w\|$"),
        (right, "targets", ORANGE, "s", "--", r"$\|\lambda\|$"),
    ):
        axes.plot(fine, norm(expected[name][0]), color=colour, ls=style, label=tex)
        axes.plot(
            settings, norm(found[kind][name][0]), marker, color=colour, ms=3.6, ls="none"
        )
        axes.set_ylabel(tex, color=colour)
        if kind == "neumann":
            unrolled = norm(found["unrolled"][name][0])
            axes.plot(
                settings[: len(unrolled)],
                unrolled,
                marker,
                ms=7,
                mfc="none",
                mec="black",
                mew=0.7,
                ls="none",
                label="unrolled" if name == "weights" else None,
            )
    ax.set(xscale="log", xlabel=f"${TEX[kind]}$")
    handles = [h for a in (ax, right) for h in a.get_legend_handles_labels()[0]]
    ax.legend(
        handles=handles,
        loc="lower center",
        bbox_to_anchor=(0.5, 0.97),
        ncols=3,
        columnspacing=1,
        handlelength=1.6,
    )


def draw(problems, basis, settings, found, rate):
    with plot.house_style():
        picture, axes = plt.subplots(1, 4, figsize=(11, 2.6), layout="constrained")
        for ax, kind, title in (
            (axes[0], "neumann", "(a) Neumann, unrolled"),
            (axes[1], "proximal", "(b) proximal"),
        ):
            draw_fits(ax, kind, settings[kind], found[kind], basis)
            ax.set_title(title)
        for ax, kind in zip(axes[2:], ("neumann", "proximal")):
            draw_norms(ax, kind, settings[kind], found, problems, rate)
        axes[2].set_title("(c) norms against $K$", pad=17)
        axes[3].set_title(r"(d) norms against $\epsilon$", pad=17)
    return picture


def main():
    parser = arguments(__doc__)
    parser.add_argument(
        "--basis",
        choices=tuple(INNER_RATES),
        default="exponential",
        help="the amplitudes of the features: exponential is Figure 3, reciprocal is "
        "Figure 7 (exponential)",
    )
    args = parser.parse_args()
    basis, rate = args.basis, INNER_RATES[args.basis]
    figure = Figure(NAMES[basis], args)
    problems, x0, y0 = all_problems(basis)
    settings = {**grids(basis, figure.quick), "limit": np.array([np.inf])}
    figure.say(
        "settings: " + ", ".join(f"{len(v)} {kind}" for kind, v in settings.items())
    )
    arrays = figure.part(
        "sweep",
        lambda: sweep(problems, x0, y0, jax.tree.map(jnp.asarray, settings), rate),
        settings={kind: values.tolist() for kind, values in settings.items()},
        seeds=NUM_SEEDS,
    )
    found = {
        kind: {k: arrays[f"{kind}_{k}"] for k in ("targets", "weights")}
        for kind in settings
    }
    errors = {
        kind: relative_error(found[kind], closed_form(problems, kind, values, rate))
        for kind, values in settings.items()
    }
    report(figure, settings, found, errors)
    plain = {}
    if basis == "reciprocal" and not figure.quick:
        plain = check_plain_descent(figure, problems, x0, y0, rate)
    figure.save(draw(problems, basis, settings, found, rate))
    figure.conclude(claims_of(problems, settings, found, errors, plain))


if __name__ == "__main__":
    main()
