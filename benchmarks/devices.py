"""A run of a million weights on four devices: the answer, and ten kills.

The devices are of one CPU, so that this says nothing about speed. With the data split
over four devices, the run is compared with the same on one device: in double precision,
and in single precision with two activations. Sums are in another order, and so are
rounded otherwise. With ReLU that can take an activation to the other side of its kink,
where the gradient of a sample jumps; tanh has no kink. Then the run is begun in single
precision with a checkpoint, killed at ten random moments, and resumed each time; the end
is compared with that of the run that nobody has killed.

It starts itself again in other processes (`--as`), because the number of devices is fixed
when JAX starts.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


DIMS = (784, 1_024, 190, 10)
QUICK_DIMS = (20, 16, 4)


def one_run(args: argparse.Namespace) -> None:
    """A run on the devices that there are."""
    import jax
    import jax.numpy as jnp
    import jax.tree_util as jtu
    import optax
    from jax.sharding import NamedSharding, PartitionSpec as P

    import bilevel_eqx as blx
    from bilevel_eqx.pipelines import SingleLoop

    dims = QUICK_DIMS if args.quick else DIMS
    dtype = jnp.zeros(()).dtype
    activation = {"relu": jax.nn.relu, "tanh": jnp.tanh}[args.activation]
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(dims[0], dims[-1]))

    def draw(size):
        inputs = np.asarray(rng.normal(size=(size, dims[0])), dtype)
        return inputs, np.argmax(inputs @ truth, axis=1)

    def losses(x, y, batch, key):
        inputs, labels = batch
        for matrix, bias in y[:-1]:
            inputs = activation(inputs @ matrix + bias)
        matrix, bias = y[-1]
        return optax.softmax_cross_entropy_with_integer_labels(
            inputs @ matrix + bias, labels
        )

    def penalty(x, y):
        # A penalty for each layer.
        return sum(
            jnp.exp(u) * jnp.sum(matrix**2) for u, (matrix, _) in zip(x, y, strict=True)
        )

    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    split, copied = (NamedSharding(mesh, spec) for spec in (P("data"), P()))
    validation, train = jax.device_put((draw(1_024), draw(4_096)), split)
    problem = blx.FiniteSumProblem(
        losses, losses, validation, train, inner_penalty=penalty
    )
    y = [
        (
            jnp.asarray(rng.normal(size=shape) * (2 / shape[0]) ** 0.5, dtype),
            jnp.zeros(shape[1]),
        )
        for shape in zip(dims, dims[1:])
    ]
    x, y = jax.device_put((jnp.full(len(y), -7.0), y), copied)
    solution = blx.solve(
        problem,
        blx.WarmStart(),
        x,
        y,
        pipeline=SingleLoop(
            optax.sgd(0.05),
            optax.sgd(0.05),
            optax.sgd(0.1),
            inner_batch=64,
            outer_batch=64,
            damping=0.1,
        ),
        num_steps=args.num_steps,
        save_every=10,
        checkpoint=args.checkpoint,
        checkpoint_every=None if args.checkpoint is None else 10,
        certify=False,
    )
    leaves = jtu.tree_leaves((solution.x, solution.y, solution.history))
    np.savez(args.output, *map(np.asarray, leaves))


def started(
    args: argparse.Namespace, num_devices: int, x64: bool, output: Path, *more: str
):
    flags = f"--xla_force_host_platform_device_count={num_devices}"
    command = [sys.executable, __file__, "--as", str(num_devices)]
    command += ["--num-steps", str(args.num_steps), "--output", str(output), *more]
    if args.quick:
        command.append("--quick")
    settings = {"XLA_FLAGS": flags, "JAX_ENABLE_X64": str(int(x64))}
    return subprocess.Popen(command, env=os.environ | settings)


def arrays(path: Path) -> list[np.ndarray]:
    with np.load(path) as file:
        return [file[name] for name in sorted(file)]


def _distances(one: Path, other: Path) -> str:
    """Those of x, y and the history as one vector, and of the array that is worst."""
    pairs = list(zip(arrays(one), arrays(other), strict=True))

    def norm(arrays):
        return np.sqrt(sum(np.sum(np.asarray(u, float) ** 2) for u in arrays))

    whole = norm(u - v for u, v in pairs) / norm(u for u, _ in pairs)
    worst = max(norm([u - v]) / norm([u]) for u, v in pairs)
    size = sum(u.size for u, _ in pairs)
    return f"{size:,} numbers, {whole:.1e}; the worst array {worst:.1e}"


def main(args: argparse.Namespace) -> None:
    folder = Path(tempfile.mkdtemp())
    one, killed = folder / "one.npz", folder / "killed.npz"
    seconds, single = 0.0, folder / "64 bits, relu.npz"
    cases = ((True, "tanh"), (True, "relu"), (False, "tanh"), (False, "relu"))
    for x64, activation in cases:
        name = f"{64 if x64 else 32} bits, {activation}"
        single = folder / f"{name}.npz"
        for num_devices, output in ((1, one), (4, single)):
            began, option = time.perf_counter(), f"--activation={activation}"
            assert started(args, num_devices, x64, output, option).wait() == 0
            seconds = time.perf_counter() - began
        print(f"one and four devices, {name}: {_distances(one, single)}", flush=True)
    if args.kills == 0:
        return

    rng, checkpoint = random.Random(0), folder / "run.blx"
    kills, same = 0, True
    while True:
        process = started(args, 4, False, killed, "--checkpoint", str(checkpoint))
        # Some of it is for the start of the process and for compiling.
        patience = rng.uniform(0.3, 1) * seconds if kills < args.kills else None
        try:
            assert process.wait(timeout=patience) == 0
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            found = f"{checkpoint.stat().st_size:,} bytes" if checkpoint.exists() else ""
            print(f"killed after {patience:.0f} s; checkpoint: {found}", flush=True)
            continue
        same = same and all(map(np.array_equal, arrays(single), arrays(killed)))
        if kills >= args.kills:
            break
        # It was faster than the one that was timed. The next one begins anew.
        checkpoint.unlink()
        seconds *= 0.8
    print(f"after {kills} kills: {'the same to the last bit' if same else 'ANOTHER END'}")
    if not same:
        raise SystemExit(1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small network")
    parser.add_argument("--num-steps", type=int, default=200)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--activation", default="relu", help=argparse.SUPPRESS)
    parser.add_argument("--as", dest="as_one", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    one_run(parsed) if parsed.as_one else main(parsed)
