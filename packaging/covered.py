"""Line coverage of the Python parts and of the core: ``make coverage``.

A copy of the tree is built in ``build/coverage`` (``KVSIG_COVERAGE=1``) and tests run there, other
interpreters that they start included. coverage.py follows the Python parts. The compiled parts
count for themselves, by the compiler's ``--coverage``: no trace function is called, so that their
speed, threads, forks and code without the GIL stay as they are, and no test needs other limits.
What gcov then says of lines of C becomes lines of Cython by the marks that Cython leaves in the C
text. Fails where a test fails or less than ``--least`` per cent of all lines ran.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from bisect import bisect
from collections import defaultdict
from pathlib import Path

from coverage import CoverageData
from sanitize import ROOT, copy_tree

BUILD = ROOT / "build/coverage"
FOLDERS = (
    "tests/cache", "tests/planning", "tests/call", "tests/core", "tests/emulated", "tests/kernel",
    "tests/registry", "tests/check", "tests/cli", "tests/tools", "tests/integrations",
)  # fmt: skip
#: What is left out, since it is long and what it runs is run by others.
LEFT_OUT = "soak or every_single_change or test_new_cuda"
START = "import coverage; coverage.process_startup()\n"
CYTHON = "Cython.Coverage.Plugin"
SOURCE = re.compile(r' */\* "(.*)":\d+$')
MARK = re.compile(r" *__Pyx_TraceLine\((\d+),")


def run(*command: str, **variables: str) -> int:
    """Run a command in the copy, and say how long it took."""
    begin = time.monotonic()
    env = {**os.environ, **variables, "PYTHONPATH": f"{BUILD}:{BUILD / 'start'}"}
    code = subprocess.run(command, cwd=BUILD, env=env).returncode
    shown = " ".join(command[1:5])
    print(f"coverage: {time.monotonic() - begin:.0f} s, status {code}: {shown} ...")
    return code


def counted(counts: Path) -> dict[int, int]:
    """How often each line of the C file ran, by the file of counts that its code wrote."""
    gcov = ["gcov", "--json-format", "--stdout", str(counts)]
    text = subprocess.run(gcov, cwd=BUILD, capture_output=True, text=True, check=True).stdout
    lines: dict[int, int] = defaultdict(int)
    for file in json.loads(text)["files"]:
        if Path(file["file"]).name == f"{counts.stem}.c":
            for line in file["lines"]:
                lines[line["line_number"]] += line["count"]
    return lines


def lines_run(c_file: Path, counts: dict[int, int]) -> dict[Path, set[int]]:
    """Lines of Cython that ran: those where the first line of C behind a mark did."""
    known = sorted(counts)
    ran: dict[Path, set[int]] = defaultdict(set)
    source = ""
    for number, text in enumerate(c_file.read_text().splitlines(), 1):
        if match := SOURCE.match(text):
            source = match[1]
        elif match := MARK.match(text):
            after = bisect(known, number)
            if after < len(known) and counts[known[after]] and (BUILD / source).is_file():
                ran[BUILD / source].add(int(match[1]))
    return ran


def add_compiled() -> None:
    """Add what the compiled parts counted to the data of coverage.py."""
    data = CoverageData(str(BUILD / ".coverage"))
    data.read()
    for counts in BUILD.glob("build/temp.*/**/kvsig/**/*.gcda"):
        name = counts.relative_to(next(p for p in counts.parents if p.name == "kvsig"))
        text = BUILD / "kvsig" / name.with_suffix(".c")
        for file, lines in lines_run(text, counted(counts)).items():
            data.add_lines({str(file): lines})
            data.add_file_tracers({str(file): CYTHON})
    data.write()


def main() -> int:
    """Build, run and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--least", type=float, default=93, help="least per cent of lines (93)")
    parser.add_argument("pytest", nargs="*", help="arguments of pytest, in place of the usual")
    args = parser.parse_args()
    if shutil.which("gcov") is None:
        sys.exit("gcov is not there, which counts lines of C: it comes with gcc")
    copy_tree(BUILD)
    python = sys.executable
    build = [python, "setup.py", "-q", "build_ext", "--inplace", f"-j{os.cpu_count()}"]
    if code := run(*build, KVSIG_COVERAGE="1"):
        return code
    # Interpreters that tests start measure as well.
    (BUILD / "start").mkdir(exist_ok=True)
    (BUILD / "start/sitecustomize.py").write_text(START)
    for old in [*BUILD.glob(".coverage*"), *BUILD.glob("build/temp.*/**/*.gcda")]:
        old.unlink()
    tests = args.pytest or ["-q", "-p", "no:cacheprovider", "-k", f"not ({LEFT_OUT})", *FOLDERS]
    config = str(BUILD / "pyproject.toml")
    code = run(python, "-m", "pytest", *tests, COVERAGE_PROCESS_START=config)
    run(python, "-m", "coverage", "combine", "-q")
    add_compiled()
    report = run(python, "-m", "coverage", "report", "--fail-under", str(args.least))
    return code or report


if __name__ == "__main__":
    sys.exit(main())
