"""The files of the tree, and what they import, read as text: nothing of kvsig is run."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CYTHON = (".pyx", ".pxd", ".pxi")


@cache
def tracked() -> tuple[Path, ...]:
    """Every file of the tree that git has; the test is skipped where there is no checkout."""
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout: which files belong to the tree is not known")
    done = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True
    )
    files = (ROOT / name for name in done.stdout.split("\0") if name)
    return tuple(file for file in files if file.is_file())


def modules() -> dict[str, Path]:
    """Module -> file, of all that the package is made of; the parts of a module are one."""
    package = ROOT / "kvsig"
    found = {}
    for file in sorted(package.rglob("*")):
        if file.suffix in (".py", *CYTHON):
            name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
            found[f"{name.removesuffix('.__init__')} {file.suffix}"] = file
    return found


def code(text: str) -> str:
    """Text without comments and docstrings, what stands in parentheses on one line."""
    text = re.sub(r'[rR]?"""(?:[^\\]|\\.)*?"""', '""', text, flags=re.DOTALL)
    text = re.sub(r"(?m)(^|\s)#.*$", "", text)
    return re.sub(
        r"(?m)^(\s*from\s+\S+\s+c?import\s*)\(([^)]*)\)",
        lambda found: found[1] + " ".join(found[2].split()),
        text,
    )


def imported(text: str, package: str, known: frozenset[str]) -> set[str]:
    """Names of all that a module imports, wherever in it, and by whichever word.

    Parameters
    ----------
    text : str
        Python or Cython.
    package : str
        That the module is in: what a leading point stands for.
    known : frozenset of str
        Modules that there are: ``from kvsig import cache`` is one of ``kvsig.cache``.
    """
    found = set()
    for line in code(text).splitlines():
        if match := re.match(r"\s*from\s+(\.*)([\w.]*)\s+c?import\s+(.+)", line):
            points, module, names = match.groups()
            home = package.split(".")[: len(package.split(".")) + 1 - len(points)] if points else []
            module = ".".join([*home, *filter(None, [module])])
            for part in names.split(","):
                name = f"{module}.{part.split()[0]}" if part.split() else module
                found.add(name if name in known else module)
        elif match := re.match(r"\s*c?import\s+(.+)", line):
            found.update(part.split()[0] for part in match[1].split(","))
        elif match := re.match(r'\s*include\s+"(\w+)\.pxi"', line):
            found.add(f"{package}.{match[1]}")
        for name in re.findall(r'import_module\(f?"(kvsig\.[\w.]+)"\)', line):
            found.add(name)
    return found
