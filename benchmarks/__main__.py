"""All benchmarks in turn, and for each bound that is aimed at whether it is met.

    python -m benchmarks --quick
    python -m benchmarks --shared --only hypergradient peers --output results

Each script runs in a process of its own and writes its figures into the folder, where the
verdicts are written too. A script that fails is a row that says so.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from bilevel_eqx._text import aligned


HERE = Path(__file__).parent

SCRIPTS = (
    "hypergradient",
    "unroll",
    "warm_start",
    "minimum_norm",
    "adjoints",
    "plan",
    "growth",
    "compile_cost",
    "peers",
    "stochastic",
)


class Bound(NamedTuple):
    """What a figure should be at most, or at least."""

    script: str
    table: str
    """A pattern for the titles of the tables."""
    row: str
    """A pattern for the rows."""
    figure: str
    limit: float
    at_least: bool = False

    def verdicts(self, figures: dict[str, Any]) -> list[tuple[str, str, str]]:
        """What was measured, the number beside its limit, and the verdict."""
        found = []
        # A script with one table writes it without a title.
        tables = figures if _are_tables(figures) else {"": figures}
        for title, rows in tables.items():
            if not re.search(self.table, title):
                continue
            for name, row in rows.items():
                if re.search(self.row, name):
                    found.append(self._verdict(title, name, row))
        return found

    def _verdict(self, title, name, row):
        what = ", ".join(part for part in (title, name, self.figure) if part)
        value = row.get(self.figure)
        if value is None:
            return what, "", row.get("failed", "not measured")
        met = value >= self.limit if self.at_least else value <= self.limit
        sign = ">=" if self.at_least else "<="
        return what, f"{value:.3g} {sign} {self.limit:g}", "met" if met else "NOT MET"


def _are_tables(figures: dict[str, Any]) -> bool:
    return all(
        isinstance(rows, dict) and all(isinstance(row, dict) for row in rows.values())
        for rows in figures.values()
    )


BOUNDS = (
    Bound("hypergradient", "^A", "^ours", "ratio", 1.05),
    Bound("hypergradient", "^A", "^in blocks", "ratio", 0.6),
    Bound("hypergradient", "^B, network", "^ours", "ratio", 1.04),
    Bound("hypergradient", "^B, narrow", "^ours", "ratio", 1.15),
    # With at most a quarter of the memory of the plain scan.
    Bound("unroll", "1000", "^Unrolled, increments", "ratio", 1.1),
    Bound("warm_start", "^D", "^ours, certify=False", "ratio", 0.97, at_least=True),
    Bound("minimum_norm", "", "^response_jacobian, dense", "ratio", 8.0),
    Bound("adjoints", "", "^(from the last|and)", "fewer", 3.0, at_least=True),
    Bound("plan", "", "^plan", "ratio", 1.5),
    Bound("peers", "^[AB]", "^ours", "ratio", 1.05),
    Bound("peers", "^D", "certify=False", "ratio", 1.05),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="smaller problems")
    parser.add_argument("--shared", action="store_true", help="processor time, one core")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, default=SCRIPTS)
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks"))
    args = parser.parse_args()

    args.output.mkdir(parents=True, exist_ok=True)
    verdicts, failed = [], []
    for script in args.only:
        figures = args.output / f"{script}.json"
        figures.unlink(missing_ok=True)
        command = [sys.executable, str(HERE / f"{script}.py"), "--output", str(figures)]
        command += ["--quick"] * args.quick
        # The stochastic benchmark keeps to one core by itself.
        command += ["--shared"] * args.shared
        command += ["--rounds", str(args.rounds)] if args.rounds else []
        print(f"\n== {script}", flush=True)
        code = subprocess.run(command).returncode
        if code != 0 or not figures.exists():
            failed.append(script)
            verdicts.append((script, "", f"failed with exit code {code}"))
            continue
        measured = json.loads(figures.read_text())["figures"]
        for bound in BOUNDS:
            if bound.script == script:
                verdicts += bound.verdicts(measured)
    if args.quick:
        # Problems this small have other bounds, and some programs run for milliseconds.
        verdicts = [
            (what, number, verdict if number == "" else "quick: not judged")
            for what, number, verdict in verdicts
        ]
    rows = [("measured", "against its bound", "verdict"), *verdicts]
    lines = aligned([list(row) for row in rows], "<<<")
    print("\nVerdicts", *lines, sep="\n")
    (args.output / "verdicts.txt").write_text("\n".join(lines) + "\n")
    if failed:
        sys.exit(f"These scripts failed: {', '.join(failed)}.")


if __name__ == "__main__":
    main()
