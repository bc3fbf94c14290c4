"""Every link and every picture of the finished site leads somewhere, or the build fails.

`mkdocs` checks the links that it finds in Markdown. This checks those in HTML too, and
those that plugins and the theme have made, with their anchors.

It also makes each picture a link to itself, by which a browser shows it in its full size.
"""

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

from mkdocs.exceptions import PluginError


_ROOT = "http://site.invalid/"
_IMAGE = re.compile(r'<img\b[^>]*?\bsrc="([^"]+)"[^>]*>')


class _Page(HTMLParser):
    """The anchors of a page, and what it links to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = {""}
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.anchors.add(value)
            elif name in ("href", "src") and value and tag != "base":
                self.links.append(value)


def dead_links(site: Path, prefix: str = "") -> list[str]:
    """The links within the site that lead nowhere, as sentences.

    `prefix` is the path that the site has on its host.
    """
    pages = {path: _Page(path.read_text()) for path in sorted(site.rglob("*.html"))}
    dead = []
    for path, page in pages.items():
        # The page for what is not found is served at any address.
        base = "" if path.name == "404.html" else path.relative_to(site).as_posix()
        for link in page.links:
            absolute = urljoin(f"{_ROOT}{prefix}{base}", link)
            address = urlsplit(absolute)
            if not absolute.startswith(_ROOT + prefix):
                continue
            target = site / unquote(address.path).removeprefix(f"/{prefix}")
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                dead.append(f"{path.relative_to(site)} links to {link}: no such file")
            elif target in pages:
                # `#__comments` and the like are made by scripts of the theme.
                anchor = unquote(address.fragment)
                if anchor not in pages[target].anchors and anchor[:2] != "__":
                    dead.append(f"{path.relative_to(site)} links to {link}: no anchor")
    return dead


#
# Called by mkdocs
#


def on_page_content(html, *, page, config, files):
    """The text of a page is set, and its pictures become links."""
    del page, config, files
    return _IMAGE.sub(r'<a class="picture" href="\1">\g<0></a>', html)


def on_post_build(*, config):
    """All pages are written, and their links are followed."""
    prefix = urlsplit(config.site_url or "").path.lstrip("/")
    dead = dead_links(Path(config.site_dir), prefix)
    if dead:
        raise PluginError("Dead links:\n" + "\n".join(dead))
