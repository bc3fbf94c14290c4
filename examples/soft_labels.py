"""Figure 6 of the paper: two learned points teach a network three rings.

    python examples/soft_labels.py --output outputs

There are fewer points than classes, and so their labels are learned as well: a logit for
each class, of which the softmax is the label. Along the way the points change classes,
and between them they visit all three. The path of each is drawn in the mean colour of its
label, which is the greyer the more classes it has. Everything else is as in Figures 2 and
5 (`dataset_distillation.py`, `three_rings.py`).

The paper does not say how the labels start. Here point i starts with a logit of 1 for
class i. With logits near zero it takes luck: both points soon get the label of the outer
ring, which is what the most of the data around them has, and are never rid of it; two
seeds of three ended so.

Nor does the warm start come to rest: its accuracy keeps swinging, between .7 and .99. Of
a hundred networks on its way the one that is most accurate is drawn, and it is its points
that another is trained on from scratch. At its best it is within ten points of a network
that is trained on the rings; within two, as in Figures 2 and 5, it is on some seeds only.
"""

import jax.numpy as jnp
from _figure import Claim, Figure
from _rings import (
    accuracy_claim,
    angle_claim,
    cold_claim,
    column,
    draw,
    each_seed,
    loss_claim,
    options,
)
from dataset_distillation import experiment

from bilevel_eqx import tasks


def soft_labels(key, args):
    problem, x0, y0 = tasks.rings(
        key,
        num_classes=3,
        num_distilled=2,
        learn_labels=True,
        width=args.width,
        points_per_class=args.points,
    )
    return problem, x0 | {"logits": x0["logits"] + jnp.eye(2, 3)}, y0


def classes_claim(records):
    """Of the saved steps, how large a share has each class for a label of a point."""
    targets = column(records, "targets")
    labels = targets.argmax(axis=-1)
    shares = [[(seed == c).any(axis=-1).mean() for c in range(3)] for seed in labels]
    rows = ["/".join(f"{share:.1%}" for share in row) for row in shares]
    return Claim(
        "Every class is the arg-max label of some point at some time.",
        "the class labels change so that all three classes are covered",
        f"shares of the steps at which a point has class 0/1/2: {', '.join(rows)}",
        len(records),
        all(share > 0 for row in shares for share in row),
    )


def main():
    args = options(__doc__, steps=20_000, quick_steps=10_000)
    figure = Figure("soft_labels", args)
    records = each_seed(figure, args, soft_labels, experiment, keep="best")
    draw(figure, records[0], soft_labels, args)
    figure.conclude(
        [
            accuracy_claim(records, at_best=True, within=10),
            loss_claim(records, 1),
            cold_claim(records),
            angle_claim(records),
            classes_claim(records),
        ]
    )


if __name__ == "__main__":
    main()
