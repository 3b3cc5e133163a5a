"""Builds the pages as a site, and checks it: warnings are errors, and every link leads somewhere.

The source is the whole checkout, so that pages may link to README.md, examples and the registry as
they do in the checkout itself. Nothing that a page loads may come from the network.

    python packaging/site.py [FOLDER]     default: build/site
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
#: Attributes by which a page loads something, for each tag; an <a href> only leads there.
LOADS = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}


class Page(HTMLParser):
    """What a page links to, what it loads, and the places in it that can be linked to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.places: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Take note of one tag."""
        found = dict(attributes)
        self.places.add(found.get("id") or "")
        if tag == "a" and found.get("href"):
            self.links.append(str(found["href"]))
        elif tag in LOADS and found.get(LOADS[tag]):
            self.loads.append(str(found[LOADS[tag]]))


def problems(site: Path) -> list[str]:
    """Return what is wrong with the links of a site, a line for each."""
    pages = {path: Page(path) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        name = path.relative_to(site)
        for target in page.loads:
            if urlsplit(target).netloc:
                found.append(f"{name} loads {target}")
        for target in [*page.links, *page.loads]:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue  # the web is not asked
            file = path if not parts.path else (path.parent / unquote(parts.path)).resolve()
            if not file.exists():
                found.append(f"{name} links to {target}: no such file")
            elif parts.fragment and file in pages and parts.fragment not in pages[file].places:
                found.append(f"{name} links to {target}: no such place")
    return found


def main() -> int:
    """Build and check."""
    site = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build" / "site").resolve()
    shutil.rmtree(site, ignore_errors=True)
    options = ["-q", "-E", "-W", "--keep-going", "-b", "html", "-j", "2", "-c", str(ROOT / "docs")]
    trees = ["-d", str(ROOT / "build" / "site-trees")]
    command = [sys.executable, "-m", "sphinx", *options, *trees, str(ROOT), str(site)]
    if code := subprocess.run(command, check=False).returncode:
        return code
    first = "docs/index.html"
    (site / "index.html").write_text(
        f'<!doctype html><meta charset="utf-8"><title>kvsig</title>'
        f'<meta http-equiv="refresh" content="0; url={first}"><a href="{first}">kvsig</a>\n'
    )
    wrong = problems(site)
    print(*wrong, sep="\n", end="\n" if wrong else "")
    pages = len(list(site.rglob("*.html")))
    print(f"{pages} pages in {site}" + (f", {len(wrong)} problems" if wrong else ""))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
