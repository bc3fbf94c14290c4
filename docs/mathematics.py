"""The formulas of the site, set by KaTeX while the site is built.

A reader's browser runs no script for them and fetches nothing from elsewhere: a page has
the finished formulas, and the site has KaTeX's style sheet and fonts. A formula that
KaTeX cannot read fails the build.

This takes Node.js with npm. The first build downloads KaTeX, of one version and with one
checksum, and keeps it in `.cache/`. Later builds need no network.
"""

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File


VERSION = "0.16.47"
SHA512 = (
    "Eeo8Ys1doU1z+x8AZsPpQu+p/QcZBI5PeOo7QGQdy2x2"
    "m0MU/hYagBbGOmXwr5KVbEfVuWv9LpnQWeehogurjg=="
)
CACHE = Path(__file__).parent.parent / ".cache" / f"katex-{VERSION}"

_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\s*\\(?P<kind>[(\[])(?P<tex>.*?)\\[)\]]\s*'
    r"</(?P=tag)>(?P<mark>[.,:;!?)]*)",
    re.DOTALL,
)
# What closes the last part of a formula in a line.
_END = "</span></span></span>"
# One process sets all formulas of the site. `strict` is for LaTeX that only KaTeX allows.
_SET_ALL = """
const katex = require(process.argv[1]);
const formulas = JSON.parse(require("fs").readFileSync(0, "utf8"));
const failures = [];
const set = formulas.map(({ tex, displayMode }) => {
  try {
    // A wide formula may break after a space, as after a relation.
    const breakable = tex.replace(/\\\\q?quad(?![a-z])/g, "$&\\\\allowbreak ");
    return katex.renderToString(breakable, { displayMode, strict: "error" });
  } catch (error) {
    failures.push(`${tex}\\n  ${error.message}`);
    return "";
  }
});
if (failures.length > 0) {
  console.error(failures.join("\\n"));
  process.exit(1);
}
console.log(JSON.stringify(set));
"""


def _run(command: list[str], needed_for: str, **options) -> str:
    if shutil.which(command[0]) is None:
        raise PluginError(
            f"Building the documentation takes `{command[0]}` of Node.js, {needed_for}, "
            "and there is none on the path. Install Node.js 18 or later, with npm."
        )
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode != 0:
        raise PluginError(f"{needed_for} has failed.\n{done.stderr.strip()}")
    return done.stdout


def katex() -> Path:
    """The folder of KaTeX's script, style sheet and fonts."""
    if CACHE.exists():
        return CACHE
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", f"katex@{VERSION}", "--silent"]
        downloading = f"Downloading KaTeX {VERSION}, which sets the formulas, from npm"
        archive = Path(folder) / _run(command, downloading, cwd=folder).strip()
        digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
        if digest != SHA512:
            raise PluginError(
                f"What npm has for KaTeX {VERSION} has the checksum {digest}, and not "
                f"the one in {Path(__file__).name}, {SHA512}. Do not use it."
            )
        with tarfile.open(archive) as files:
            files.extractall(folder, filter="data")
        CACHE.parent.mkdir(exist_ok=True)
        shutil.move(Path(folder) / "package" / "dist", CACHE)
    return CACHE


def formulas_set(pages: dict[Path, str]) -> dict[Path, str]:
    """The same pages of HTML, with their formulas set."""
    found = {
        (html.unescape(match["tex"]), match["kind"] == "[")
        for page in pages.values()
        for match in _FORMULA.finditer(page)
    }
    order = sorted(found)
    request = [{"tex": tex, "displayMode": display} for tex, display in order]
    command = ["node", "-e", _SET_ALL, str(katex() / "katex.js")]
    answer = _run(command, "Setting the formulas", input=json.dumps(request))
    finished = dict(zip(order, json.loads(answer), strict=True))

    def replace(match: re.Match[str]) -> str:
        tag, key = match["tag"], (html.unescape(match["tex"]), match["kind"] == "[")
        formula, mark = finished[key], match["mark"]
        if mark:
            # A browser may break the line after a formula, but not within a part of it.
            # So the mark after it goes in there, and no line begins with a comma.
            formula = (
                f'{formula.removesuffix(_END)}<span class="mark">{mark}</span>{_END}'
            )
        return f'<{tag} class="arithmatex">{formula}</{tag}>'

    return {path: _FORMULA.sub(replace, page) for path, page in pages.items()}


#
# Called by mkdocs
#


def on_files(files, *, config):
    """The style sheet and the fonts become files of the site."""
    root = katex()
    # The older formats of the fonts are for browsers of before 2018.
    style = (root / "katex.min.css").read_text()
    style = re.sub(r",url\([^)]+\.(woff|ttf)\) format\([^)]+\)", "", style)
    files.append(File.generated(config, "katex/katex.min.css", content=style))
    for path in sorted(root.glob("fonts/*.woff2")):
        name = f"katex/fonts/{path.name}"
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_post_build(*, config):
    """The pages are complete, and so are the formulas of their docstrings."""
    pages = {path: path.read_text() for path in Path(config.site_dir).rglob("*.html")}
    for path, page in formulas_set(pages).items():
        path.write_text(page)
