"""What the scripts of the figures share: parts that survive an interruption, pictures,
and claims that are measured.

A script computes its figure in parts (a seed, a sweep), each of which is kept in
`<output>/parts` when it is done. A second run with the same settings reads what is there
and goes on, so that an interrupted one costs what it had not finished.
"""

import argparse
import hashlib
import json
import os
import pathlib
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from PIL import Image


matplotlib.use("agg")


class Claim(NamedTuple):
    """A sentence of the paper's, and what came out here."""

    sentence: str
    paper: str
    measured: str
    seeds: int
    holds: bool


class Figure:
    """One figure: its name, how thoroughly it is made, and where it goes."""

    def __init__(self, name: str, args: argparse.Namespace):
        self.name = name
        self.folder: pathlib.Path = args.output
        self.quick: bool = args.quick
        self.fresh: bool = args.fresh
        (self.folder / "parts").mkdir(parents=True, exist_ok=True)

    def part(
        self, name: str, compute: Callable[[], Mapping[str, Any]], **settings: Any
    ) -> dict[str, np.ndarray]:
        """The arrays that `compute` returns, by name; from the last run if there was
        one with the same settings. What they hang on belongs in the settings."""
        key = json.dumps(settings, sort_keys=True, default=str)
        digest = hashlib.sha256(key.encode()).hexdigest()[:8]
        file = self.folder / "parts" / f"{self.name}-{name}-{digest}.npz"
        if file.exists() and not self.fresh:
            self.say(f"{name}: kept from the last run")
            with np.load(file) as kept:
                return {k: kept[k] for k in kept.files}
        self.say(f"{name} ...")
        start = time.perf_counter()
        arrays: Any = {k: np.asarray(v) for k, v in compute().items()}
        self.say(f"{name}: {time.perf_counter() - start:.0f} s, compilation included")
        # Renamed when it is whole: a kill on the way leaves no half of a file.
        unfinished = file.with_suffix(".unfinished")
        with unfinished.open("wb") as stream:
            np.savez(stream, **arrays)
        os.replace(unfinished, file)
        return arrays

    def say(self, sentence: str) -> None:
        print(f"[{self.name}] {sentence}", flush=True)

    def save(self, picture: Any, name: str | None = None) -> None:
        """Saves a matplotlib figure as vectors and as pixels."""
        files = [self.folder / f"{name or self.name}.{kind}" for kind in ("pdf", "png")]
        for file in files:
            # Without a date, the same picture is the same file.
            dateless = {"CreationDate": None} if file.suffix == ".pdf" else None
            picture.savefig(file, metadata=dateless)
        lighten(files[1])
        self.say(f"drawn in {' and '.join(map(str, files))}")

    def conclude(self, claims: Sequence[Claim]) -> None:
        """Prints the claims, and leaves them for `reproduce.py`."""
        file = self.folder / f"{self.name}.json"
        claims = [claim._replace(holds=bool(claim.holds)) for claim in claims]
        file.write_text(json.dumps([c._asdict() for c in claims], indent=1) + "\n")
        print(f"\n{claims_table(claims)}", flush=True)


def lighten(picture: pathlib.Path) -> None:
    """Rewrites a picture with a palette: a third of the bytes, for the documentation."""
    with Image.open(picture) as image:
        image.convert("RGB").quantize(256).save(picture, optimize=True)


def options(doc: str | None) -> argparse.ArgumentParser:
    """The options that all scripts have, also those of the gallery."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path("outputs"),
        help="the folder for what is written (outputs)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="smaller, for a check: seconds, not minutes"
    )
    return parser


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """The options of a script that is computed in parts, to which each adds its own."""
    parser = options(doc)
    parser.add_argument(
        "--fresh", action="store_true", help="compute anew what the last run has kept"
    )
    return parser


def over(claim: Claim) -> str:
    """Where a measurement is from."""
    count = {0: "no randomness", 1: "1 seed"}.get(claim.seeds, f"{claim.seeds} seeds")
    return f"here, {count}"


def claims_table(claims: Sequence[Claim], width: int = 86) -> str:
    """Each claim with what the paper says, what was measured, and whether it holds."""
    lines = []
    for claim in claims:
        mark = "holds" if claim.holds else "DOES NOT HOLD"
        lines += textwrap.wrap(f"{mark}: {claim.sentence}", width)
        for label, text in (("paper", claim.paper), (over(claim), claim.measured)):
            indent = " " * 4
            lines += textwrap.wrap(
                f"{label}: {text}",
                width,
                initial_indent=indent,
                subsequent_indent=2 * indent,
            )
    return "\n".join(lines)
