"""Figure 5 of the paper: three learned points teach a network three rings.

    python examples/three_rings.py --output outputs

As Figure 2 (`dataset_distillation.py`), with a ring and a point more. The radii are .25,
.5 and .75, and there are 12,000 steps: both are choices, and the latter matters. The
accuracy of the warm-started network comes to 1.00, and swings between .91 and 1.00 from
then on. Its loss is least at about .4, and does not come down to that of a network that
is trained on the rings. Beyond some 13,000 steps two of the points often come together
and stay so: they cannot be told apart, and the network learns their shares of the labels.

Of a hundred networks on the way the one that is most accurate is drawn, and it is its
points that another is trained on from scratch.
"""

from _figure import Figure
from _rings import (
    accuracy_claim,
    angle_claim,
    cold_claim,
    draw,
    each_seed,
    loss_claim,
    options,
)
from dataset_distillation import experiment

from bilevel_eqx import tasks


def three_rings(key, args):
    sizes = {"width": args.width, "points_per_class": args.points}
    return tasks.rings(key, num_classes=3, **sizes)


def main():
    args = options(__doc__, steps=12_000, quick_steps=10_000)
    figure = Figure("three_rings", args)
    records = each_seed(figure, args, three_rings, experiment, keep="best")
    draw(figure, records[0], three_rings, args)
    figure.conclude(
        [
            accuracy_claim(records, at_best=True),
            loss_claim(records, 1),
            cold_claim(records),
            angle_claim(records),
        ]
    )


if __name__ == "__main__":
    main()
