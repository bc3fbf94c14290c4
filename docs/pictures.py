"""Makes the pictures of docs/api/plot.md, by running what the page shows:

python docs/pictures.py
"""

import os
import re
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl


DOCS = Path(__file__).parent
# Twice as many as those of the figure, for dense screens.
DOTS_PER_INCH = 240


def run_page(folder: Path) -> dict[str, Any]:
    """Runs the code of the page, whose pictures are saved in `folder`."""
    page = DOCS / "api" / "plot.md"
    text = page.read_text()
    namespace: dict[str, Any] = {"__name__": "plot"}
    before = os.getcwd()
    os.chdir(folder)
    try:
        with mpl.rc_context({"savefig.dpi": DOTS_PER_INCH}):
            for block in re.finditer(r"^```python\n(.*?)^```", text, re.M | re.DOTALL):
                # Empty lines before it, so that a traceback has the line of the page.
                line = text.count("\n", 0, block.start(1))
                exec(compile("\n" * line + block[1], str(page), "exec"), namespace)
    finally:
        os.chdir(before)
    return namespace


if __name__ == "__main__":
    mpl.use("agg")
    run_page(Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS / "figures")
