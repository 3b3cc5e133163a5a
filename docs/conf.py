"""How the pages become a site: Sphinx with MyST; `packaging/site.py` builds it.

The source is the whole checkout. The tree of pages is what index.md lists, heading by heading, so
that the pages are plain Markdown, which reads the same where no site is built.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import kvsig  # noqa: E402

project = "kvsig"
author = "The kvsig developers"
version = release = kvsig.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md", "examples/*.md", "benchmarks/*.md"]
exclude_patterns = ["build", "dist", ".venv*", ".git", "kvsig", "tests", "csrc", "packaging"]
exclude_patterns += ["benchmarks/results"]
pygments_style, pygments_dark_style = "friendly", "github-dark"
html_theme = "furo"
html_title = f"kvsig {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = html_show_copyright = False
html_copy_source = html_show_sourcelink = False
myst_heading_anchors = 4
autodoc_typehints = "none"  # the docstrings say them
napoleon_google_docstring = False
napoleon_use_rtype = False


def add_trees(app, docname, source):
    """Give index.md a hidden tree of pages for each of its lists."""
    if docname != root_doc:
        return
    text = re.sub(r"^# .*", "", source[0], count=1)
    for part in text.split("\n## ")[1:]:
        pages = re.findall(r"^- \[[^\]]*\]\(([\w./-]+)\.md\)", part, re.MULTILINE)
        caption = part.partition("\n")[0]
        tree = ["```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```"]
        source[0] += "\n" + "\n".join(tree) + "\n"


def unlink_folders(app, docname, source):
    """Leave only the words of links to folders: a site has no lists of files."""
    here = (ROOT / docname).parent

    def plain(match):
        return match[1] if (here / match[2]).is_dir() else match[0]

    source[0] = re.sub(r"(?<!!)\[([^\]]*)\]\(([\w./-]+)\)", plain, source[0])


def setup(app):
    """Tell Sphinx what is done to the text of pages first."""
    app.connect("source-read", add_trees)
    app.connect("source-read", unlink_folders)
