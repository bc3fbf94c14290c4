"""The whole paper: every figure and table, and each of its claims measured.

    python examples/reproduce.py                   # all, in full
    python examples/reproduce.py --quick           # all, smaller: a check
    python examples/reproduce.py 3 7 table1        # some

Each is a script of its own in this folder, of which this is the table of contents. It
runs them, two at a time, and ends with the table of claims: what the paper says, and what
was measured here. The exit status is 0 only if every claim holds.

What has been computed is kept in the output folder, so that an interrupted run goes on
from where it was; `--fresh` begins anew.
"""

import argparse
import concurrent.futures
import json
import pathlib
import subprocess
import sys
import time

from _figure import arguments, Claim, claims_table, over


# From the name in the paper to the script, its options, and the name of its claims.
CONTENTS = {
    "1": ("solution_concepts", []),
    "2": ("dataset_distillation", []),
    "3": ("anti_distillation", []),
    "4": ("moving_datapoint", []),
    "5": ("three_rings", []),
    "6": ("soft_labels", []),
    "7": ("anti_distillation", ["--basis", "reciprocal"]),
    "8": ("anti_distillation_network", []),
    "table1": ("table_1", []),
    "table3": ("digits", []),
    "penalties": ("penalties", []),
}


def title(name: str) -> str:
    if name.startswith("table"):
        return f"Table {name.removeprefix('table')}"
    return f"Figure {name}" if name.isdigit() else "Beyond the paper: penalties"


def run(name: str, args: argparse.Namespace) -> list[Claim] | None:
    """The claims of one script; nothing if it did not get to its end."""
    script, options = CONTENTS[name]
    path = pathlib.Path(__file__).parent / f"{script}.py"
    command = [sys.executable, str(path), "--output", str(args.output), *options]
    command += ["--quick"] * args.quick + ["--fresh"] * args.fresh
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        print(f"{name:<9} | {line}", end="", flush=True)
    status = process.wait()
    took = f"{time.perf_counter() - start:.0f} s"
    print(f"{name:<9} | ended after {took}, with status {status}", flush=True)
    if status != 0:
        return None
    file = args.output / f"{'_'.join([script, *options[1:]])}.json"
    return [Claim(**claim) for claim in json.loads(file.read_text())]


def markdown(results: dict[str, list[Claim] | None]) -> str:
    """The claims as a table for each figure, for a web page."""
    lines = []
    for name, claims in results.items():
        lines += ["", f"### {title(name)}", ""]
        lines += ["| Claim | The paper | Measured |", "|---|---|---|"]
        for claim in claims or []:
            mark = "Holds" if claim.holds else "**Does not hold**"
            measured = f"{mark} ({over(claim).removeprefix('here, ')}): {claim.measured}"
            # A bar would end the cell.
            cells = (c.replace("|", "\\|") for c in (*claim[:2], measured))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="name",
        help=f"which to run: {', '.join(CONTENTS)} (all)",
    )
    parser.add_argument(
        "--jobs", type=int, default=2, help="how many scripts run at the same time (2)"
    )
    args = parser.parse_args()
    unknown = set(args.names) - set(CONTENTS)
    if unknown:
        parser.error(f"no such figure or table: {', '.join(sorted(unknown))}")

    start = time.perf_counter()
    names = args.names or list(CONTENTS)
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        results = dict(zip(names, pool.map(lambda name: run(name, args), names)))
    print(f"\n=== The claims, after {(time.perf_counter() - start) / 60:.1f} minutes")
    for name, claims in results.items():
        print(f"\n{title(name)}")
        print("DID NOT FINISH" if claims is None else claims_table(claims))
    (args.output / "claims.md").write_text(markdown(results))
    every = [claim for claims in results.values() for claim in claims or []]
    holding = sum(claim.holds for claim in every)
    unfinished = sum(claims is None for claims in results.values())
    print(
        f"\n{holding} of {len(every)} claims hold; {unfinished} scripts did not finish."
    )
    return 0 if holding == len(every) and unfinished == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
