"""Line coverage of the Python parts and of the core: ``make coverage``.

A copy of the tree is built in ``build/coverage`` (``KVSIG_COVERAGE=1``) and tests run there, other
interpreters that they start included. coverage.py follows the Python parts. The compiled parts
count for themselves, by the compiler's ``--coverage``: nothing traces them, so that their threads,
forks and code without the GIL, whose lines count like all others, run as they always do, and no
test needs other limits. What gcov says of lines of C becomes lines of Cython by the marks that
Cython leaves in the C text.

The figure is that of all lines of ``kvsig`` but three files, which are made from others:
``_generated.pxi`` and ``_page_copy.pxi`` by the build, ``_calls.pyi`` for type checkers. The
emulated runtime and the page-copy kernel are C and not in it. Fails where a test fails, where a
compiled part says nothing of its lines, or where less than ``--least`` per cent of the lines ran.
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
from typing import IO

from coverage import CoverageData
from sanitize import ROOT, copy_tree

BUILD = ROOT / "build/coverage"
#: Rooms whose tests run beside each other, about as long as each other.
ROOMS = (
    ("tests/core", "tests/registry", "tests/kernel", "tests/emulated", "tests/check", "tests/call",
     "tests/planning", "tests/tools", "tests/docs/test_stubs.py"),
    ("tests/cache", "tests/cli", "tests/integrations"),
)  # fmt: skip
LEFT_OUT = (
    # Long, and run no line that others do not: soaks, and kvsig built again as another.
    "soak or every_single_change or test_new_cuda"
    # Limits of time, which are those of code that is optimized and does not count.
    " or thirty_nanoseconds or cheap_enough or test_against_itself"
)
#: Interpreters that tests start measure as well, and children that leave in a hurry too.
START = """\
import ctypes, os
import coverage

coverage.process_startup()


def leave(status):
    if measuring := coverage.Coverage.current():
        measuring.stop()
        measuring.save()
    ctypes.CDLL(None).exit(status)  # not _exit: compiled parts write their counts


os._exit = leave
"""
SOURCE = re.compile(r' */\* "(.*)":\d+$')
MARK = re.compile(r" *__Pyx_TraceLine\((\d+),")
COUNTS = "build/temp.*/kvsig/**/*.gcda"


def start(
    *command: str, stdout: IO[bytes] | None = None, **variables: str
) -> subprocess.Popen[bytes]:
    """Start a command in the copy."""
    env = {**os.environ, **variables, "PYTHONPATH": str(BUILD)}
    return subprocess.Popen([sys.executable, *command], cwd=BUILD, env=env, stdout=stdout)


def run_tests(runs: list[list[str]]) -> int:
    """Run pytest beside itself, once for each list of arguments; what it says comes in turn."""
    begin = time.monotonic()
    measuring = {"COVERAGE_PROCESS_START": str(BUILD / "pyproject.toml")}
    logs = [BUILD / f"tests-{i}.log" for i in range(len(runs))]
    started = []
    for args, log in zip(runs, logs, strict=True):
        with log.open("wb") as file:
            started.append(start("-m", "pytest", *args, stdout=file, **measuring))
    codes = [process.wait() for process in started]
    for log in logs:
        print(log.read_text(), end="")
    print(f"coverage: tests took {time.monotonic() - begin:.0f} s, status {codes}", flush=True)
    return max(codes)


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


def lines_run(c_text: str, counts: dict[int, int]) -> dict[str, set[int]]:
    """Lines of Cython that ran, by file: those where the first line of C behind a mark did."""
    known = sorted(counts)
    ran: dict[str, set[int]] = defaultdict(set)
    source = ""
    for number, text in enumerate(c_text.splitlines(), 1):
        if match := SOURCE.match(text):
            source = match[1]
        elif match := MARK.match(text):
            after = bisect(known, number)
            if after < len(known) and counts[known[after]]:
                ran[source].add(int(match[1]))
    return ran


def add_compiled() -> None:
    """Add what the compiled parts counted to the data of coverage.py, which reports both."""
    data = CoverageData(str(BUILD / ".coverage"))
    data.read()
    for counts in BUILD.glob(COUNTS):
        c_file = BUILD / counts.relative_to(next(BUILD.glob("build/temp.*"))).with_suffix(".c")
        for source, lines in lines_run(c_file.read_text(), counted(counts)).items():
            file = str(BUILD / source)
            if os.path.isfile(file):  # the rest is Cython's own
                data.add_lines({file: lines})
                data.add_file_tracers({file: "Cython.Coverage.Plugin"})
    missing = {str(path) for path in BUILD.glob("kvsig/**/*.pyx")} - data.measured_files()
    if missing:
        sys.exit(f"coverage: nothing is known of {', '.join(sorted(missing))}")
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
    build = start(
        "setup.py", "-q", "build_ext", "--inplace", f"-j{os.cpu_count()}", KVSIG_COVERAGE="1"
    )
    if code := build.wait():
        return code
    # Beside the package, since tests that choose PYTHONPATH keep that folder.
    (BUILD / "sitecustomize.py").write_text(START)
    for old in [*BUILD.glob(".coverage*"), *BUILD.glob(COUNTS)]:
        old.unlink()
    usual = ["-q", "-p", "no:cacheprovider", "-k", f"not ({LEFT_OUT})"]
    code = run_tests([args.pytest] if args.pytest else [[*usual, *rooms] for rooms in ROOMS])
    if combined := start("-m", "coverage", "combine", "-q").wait():
        return combined
    add_compiled()
    report = start("-m", "coverage", "report", "--fail-under", str(args.least)).wait()
    return code or report


if __name__ == "__main__":
    sys.exit(main())
