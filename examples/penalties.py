"""Does a warm start leak when the outer variables are penalties, one for each weight?

    python examples/penalties.py --output outputs

In distillation what a warm start knows is in its weights, and not in the learned points.
Here the same three-way comparison is made of hyperparameters: a network with 17,226
weights is trained on 100 images of digits, each of its weights has an L2 penalty of its
own, and the penalties are learned so that it does well on 400 other images.

- Warm start: one step of the penalties by a single unrolled step, one of the weights.
- Cold start: from the initial weights at each outer step, through all inner steps.
- Re-trained: from scratch at the penalties that the warm start ended with; from the
  initial weights that it had, and from fresh ones.

With a positive penalty on each weight the inner minima are isolated, and so one may
expect less leakage than in distillation. But there are still many of them, and a penalty
of its own is for a weight of one network: which it is depends on the initial values.

The paper has no such experiment. Data, sizes and rates are choices, the same for all
seeds; a seed is another split of the data, and other initial and fresh weights.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
import optax
from _figure import arguments, Claim, Figure
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int

import bilevel_eqx as blx
from bilevel_eqx import plot


SIZES = (64, 128, 64, 10)
NUM_TRAIN, NUM_VALIDATION = 100, 400
# Penalties start at the former and are bounded by the latter: single steps of gradient
# descent are not stable with larger ones.
START, LARGEST = 1e-3, 10.0
NUM_FRESH = 2
# Of the outer optimiser, Adam, which moves the logarithms of the penalties by about as
# much in each step. The cold start takes fewer and larger steps.
WARM_RATE, COLD_RATE = 0.01, 0.2
# Inner training from scratch, by steps of gradient descent with momentum: in each outer
# step of the cold start, and, to be on the safe side, for the comparison.
COLD_STEPS, LONG = 200, 1500


class Penalties(blx.AbstractBilevelProblem):
    """Learns a penalty for each weight of a network. The outer variables are their
    logarithms, but for an offset and where they come near to the largest."""

    train: tuple[Float[Array, "t d"], Int[Array, " t"]]
    validation: tuple[Float[Array, "v d"], Int[Array, " v"]]
    test: tuple[Float[Array, "s d"], Int[Array, " s"]]

    def inner(self, x, y):
        squares = jax.tree.map(lambda x, y: jnp.sum(penalty(x) * y**2), x, y)
        return cross_entropy(y, *self.train) + 0.5 * sum(jax.tree.leaves(squares))

    def outer(self, x, y):
        return cross_entropy(y, *self.validation)


def penalty(x):
    return LARGEST * jax.nn.sigmoid(x)


def logits(y, images):
    *hidden, (last_weight, last_bias) = y
    for weight, bias in hidden:
        images = jax.nn.relu(images @ weight + bias)
    return images @ last_weight + last_bias


def cross_entropy(y, images, labels):
    losses = optax.softmax_cross_entropy_with_integer_labels(logits(y, images), labels)
    return jnp.mean(losses)


def accuracy(y, images, labels):
    return jnp.mean(jnp.argmax(logits(y, images), axis=-1) == labels)


def initial_weights(key):
    keys = jr.split(key, len(SIZES) - 1)
    return [
        (jnp.sqrt(2 / m) * jr.normal(k, (m, n)), jnp.zeros(n))
        for k, m, n in zip(keys, SIZES, SIZES[1:])
    ]


def digits(seed):
    """Scikit-learn's 8 x 8 digits, which come with it, split at random."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "The digits come with scikit-learn, which is in the extra `examples`: "
            "`pip install -e '.[examples]'`."
        ) from error
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    images, labels = (
        jnp.asarray(images[order] / 16, "float32"),
        jnp.asarray(labels[order]),
    )
    bounds = np.cumsum([0, NUM_TRAIN, NUM_VALIDATION, len(labels)])
    return Penalties(
        *((images[a:b], labels[a:b]) for a, b in zip(bounds[:-1], bounds[1:]))
    )


def training(num_steps):
    return blx.Unrolled(optax.sgd(0.05, momentum=0.9), num_steps)


@eqx.filter_jit
def warm_start(problem, x0, y0, num_steps):
    step = blx.Unrolled(optax.sgd(0.05), 1)
    pipeline = blx.GradientPipeline(step, optax.adam(WARM_RATE), inner_update=step)
    return solve(problem, blx.WarmStart(), x0, y0, pipeline, num_steps)


@eqx.filter_jit
def cold_start(problem, x0, y0, num_steps):
    pipeline = blx.GradientPipeline(training(COLD_STEPS), optax.adam(COLD_RATE))
    return solve(problem, blx.ColdStart(), x0, y0, pipeline, num_steps)


def solve(problem, equilibrium, x0, y0, pipeline, num_steps):
    solution = blx.solve(
        problem,
        equilibrium,
        x0,
        y0,
        pipeline=pipeline,
        num_steps=num_steps,
        record=record,
    )
    # Neither algorithm claims to have arrived; what is not returned is not computed.
    return eqx.tree_at(lambda s: s.certificate, solution, None)


def record(x, y, metrics):
    return metrics["value"]


@eqx.filter_jit
def scores(problem, ys):
    """Of each of several networks: loss and accuracy on the three sets."""

    def score(y):
        sets = (problem.train, problem.validation, problem.test)
        return jnp.array([[cross_entropy(y, *s), accuracy(y, *s)] for s in sets])

    return jax.vmap(score)(ys)


@eqx.filter_jit
def untuned(problem, x0, starts):
    response = training(LONG)
    return jax.lax.map(lambda y: blx.best_response(problem, x0, y, response), starts)


def compared(seed, warm_steps, cold_steps):
    """The three ways, on one split of the data."""
    problem = digits(seed)
    y_key, fresh_key = jr.split(jr.key(seed))
    y0 = initial_weights(y_key)
    fresh = jax.vmap(initial_weights)(jr.split(fresh_key, NUM_FRESH))
    start = np.log(START / (LARGEST - START))
    x0 = jax.tree.map(lambda leaf: jnp.full_like(leaf, start), y0)

    found = {"initial, scores": scores(problem, untuned(problem, x0, stack(y0, fresh)))}
    for name, solution in (
        ("warm", warm_start(problem, x0, y0, warm_steps)),
        ("cold", cold_start(problem, x0, y0, cold_steps)),
    ):
        # From where it ended, from where it started, and from elsewhere.
        starts = stack(solution.y, stack(y0, fresh))
        gap = blx.retrain_gap(problem, solution, starts, response=training(LONG))
        print(f"    {name} start: {gap}", flush=True)
        found |= {
            f"{name}, scores": scores(problem, stack(solution.y, gap.y)),
            f"{name}, path": solution.history,
            f"{name}, inner": jnp.append(gap.inner_value, gap.inner_values),
            f"{name}, residuals": gap.inner_residuals,
            f"{name}, penalties": penalty(ravel_pytree(solution.x)[0]),
        }
    return found


def stack(first, others):
    """One tree before others that are stacked along a leading axis."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, others)


#
# What came out
#

# Rows of the scores, by what is trained from where.
ROWS = {
    "warm start": ("warm", 0),
    "warm start,\ntrained on": ("warm", 1),
    "warm start,\nre-trained": ("warm", 2),
    "warm start,\nre-trained afresh": ("warm", slice(3, None)),
    "cold start": ("cold", 0),
    "cold start,\nre-trained afresh": ("cold", slice(3, None)),
    "not tuned": ("initial", slice(None)),
}
LOSS, ACCURACY = 0, 1
TRAIN, VALIDATION, TEST = 0, 1, 2


def mean_scores(record, row):
    """Of the networks of a row: losses and accuracies on the three sets."""
    kind, which = ROWS[row]
    found = record[f"{kind}, scores"][which]
    return found if found.ndim == 2 else found.mean(axis=0)


def figures(records, row, which, what):
    return np.array([mean_scores(record, row)[which, what] for record in records])


def listed(numbers):
    return ", ".join(f"{number:.3f}" for number in numbers)


def claims(records):
    F = {row: figures(records, row, VALIDATION, LOSS) for row in ROWS}
    test = {row: figures(records, row, TEST, ACCURACY) for row in ROWS}
    warm, trained_on, again, afresh, cold, cold_afresh, plain = F
    seeds, silent = len(records), "not in the paper"
    return [
        Claim(
            "Warm start leaks with penalties too: re-trained from its own initial "
            "weights at the penalties that it ended with, the network loses part of "
            "what tuning had gained in outer loss; but not all of it, as it does in "
            "distillation.",
            silent,
            f"share lost {listed((F[again] - F[warm]) / (F[plain] - F[warm]))}; outer "
            f"loss {listed(F[warm])} at the end, {listed(F[trained_on])} when trained on "
            f"from there at the final penalties, {listed(F[again])} re-trained, "
            f"{listed(F[plain])} not tuned; test accuracy {listed(test[warm])}; "
            f"{listed(test[trained_on])}; {listed(test[again])}; {listed(test[plain])}",
            seeds,
            bool(
                np.all(F[again] > np.maximum(F[warm], F[trained_on]))
                and np.all(F[again] < F[plain])
            ),
        ),
        Claim(
            "Cold start does not leak: re-trained from its own initial weights, the "
            "network has the same outer loss to within a tenth of what tuning gained.",
            "a cold start has no memory (by definition)",
            f"outer loss {listed(F[cold])}, re-trained for longer "
            f"{listed(r['cold, scores'][2, VALIDATION, LOSS] for r in records)}; test "
            f"accuracy {listed(test[cold])}",
            seeds,
            bool(
                all(
                    abs(r["cold, scores"][2, VALIDATION, LOSS] - f) < 0.1 * (p - f)
                    for r, f, p in zip(records, F[cold], F[plain])
                )
            ),
        ),
        Claim(
            "Penalties for each weight are tuned to one initialisation: for a network "
            "from fresh initial weights they are no better than untuned ones, whether "
            "they come from a warm or a cold start.",
            silent,
            f"outer loss with fresh weights {listed(F[afresh])} after warm start, "
            f"{listed(F[cold_afresh])} after cold start, {listed(F[plain])} not tuned; "
            f"test accuracy {listed(test[afresh])}; {listed(test[cold_afresh])}; "
            f"{listed(test[plain])}",
            seeds,
            bool(
                np.all(F[afresh] > 0.9 * F[plain])
                and np.all(F[cold_afresh] > 0.9 * F[plain])
            ),
        ),
    ]


def draw(records):
    picture, axes = plt.subplots(
        1, 3, figsize=(10.0, 3.0), width_ratios=[3, 4, 3], layout="constrained"
    )
    colours = {"warm": plot.CLASS_COLOURS[0], "cold": plot.CLASS_COLOURS[2]}
    names = {"warm": "warm start", "cold": "cold start"}
    for kind, style in (("warm", "-"), ("cold", "--")):
        for i, record in enumerate(records):
            way = record[f"{kind}, path"]
            axes[0].plot(
                np.linspace(0, 1, len(way)),
                way,
                style,
                color=colours[kind],
                lw=1,
                label=names[kind] if i == 0 else None,
            )
        axes[2].hist(
            np.log10(np.concatenate([r[f"{kind}, penalties"] for r in records])),
            bins=60,
            histtype="step",
            ls=style,
            color=colours[kind],
            label=names[kind],
        )
    axes[0].set(yscale="log", xlabel="share of the outer steps", ylabel="outer loss")
    axes[0].set_title("(a) along the way")
    axes[0].legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
    axes[2].axvline(np.log10(START), color="0.4", lw=0.8, label="at the start")
    axes[2].set(yscale="log", xlabel="$\\log_{10}$ of the penalty", ylabel="weights")
    axes[2].set_title("(c) the penalties")
    axes[2].legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)

    places = np.arange(len(ROWS))[::-1]
    for which, name, marker, colour in (
        (VALIDATION, "validation", "o", plot.CLASS_COLOURS[0]),
        (TEST, "test", "s", plot.CLASS_COLOURS[2]),
    ):
        for i, record in enumerate(records):
            errors = [1 - mean_scores(record, row)[which, ACCURACY] for row in ROWS]
            shift = 0.14 * (1 if which == VALIDATION else -1)
            axes[1].plot(
                100 * np.array(errors),
                places + shift,
                marker,
                color=colour,
                mfc="none" if which == TEST else colour,
                ms=4,
                label=name if i == 0 else None,
            )
    axes[1].set_yticks(places, [row.replace("\n", " ") for row in ROWS])
    axes[1].set(xlabel="errors, %", title="(b) what is trained from where")
    axes[1].grid(axis="y", color="0.9")
    axes[1].legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
    return picture


def main():
    args = arguments(__doc__).parse_args()
    figure = Figure("penalties", args)
    settings = (1500, 20) if figure.quick else (2500, 60)
    names = dict(zip(("warm_steps", "cold_steps"), settings))
    names |= {"start": START, "largest": LARGEST}
    records = [
        figure.part(f"seed {seed}", lambda seed=seed: compared(seed, *settings), **names)
        for seed in range(1 if figure.quick else 3)
    ]
    with plot.house_style():
        picture = draw(records)
        figure.save(picture)
        plt.close(picture)
    figure.conclude(claims(records))


if __name__ == "__main__":
    main()
