"""Line coverage of the Python parts and of the core: ``make coverage``.

A copy of the tree is built with Cython's line tracing in ``build/coverage`` (``KVSIG_COVERAGE=1``),
and tests run there under coverage.py, other interpreters that they start included. Traced code is
several times slower, so what is repeated hundreds of times is left out by `LEFT_OUT`; what it runs
is run by others. Fails below ``--least`` per cent.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from sanitize import ROOT, copy_tree

BUILD = ROOT / "build/coverage"
FOLDERS = (
    "tests/cache", "tests/planning", "tests/call", "tests/core", "tests/emulated", "tests/registry",
    "tests/check", "tests/cli", "tests/tools", "tests/integrations",
)  # fmt: skip
#: Time limits, soaks, and what builds or loads other copies of the package.
LEFT_OUT = (
    "thirty_nanoseconds or many_copies_are_cheap or host_cost or soak or every_single_change"
    " or test_new_cuda or test_fuzz or overhead or test_against or cheap_enough"
)
START = "import coverage; coverage.process_startup()\n"


def run(*command: str, **variables: str) -> int:
    """Run a command in the copy."""
    env = {**os.environ, **variables, "PYTHONPATH": f"{BUILD}:{BUILD / 'start'}"}
    return subprocess.run(command, cwd=BUILD, env=env).returncode


def main() -> int:
    """Build, run and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--least", type=float, default=93, help="least per cent of lines (93)")
    parser.add_argument("pytest", nargs="*", help="arguments of pytest, in place of the usual")
    args = parser.parse_args()
    copy_tree(BUILD)
    python = sys.executable
    build = [python, "setup.py", "-q", "build_ext", "--inplace"]
    if code := run(*build, KVSIG_COVERAGE="1", CFLAGS="-O1"):
        return code
    # Interpreters that tests start measure as well.
    (BUILD / "start").mkdir(exist_ok=True)
    (BUILD / "start/sitecustomize.py").write_text(START)
    config = str(BUILD / "pyproject.toml")
    run(python, "-m", "coverage", "erase")
    tests = args.pytest or ["-q", "-p", "no:cacheprovider", "-k", f"not ({LEFT_OUT})", *FOLDERS]
    code = run(python, "-m", "pytest", *tests, COVERAGE_PROCESS_START=config)
    run(python, "-m", "coverage", "combine", "-q")
    report = run(python, "-m", "coverage", "report", "--fail-under", str(args.least))
    return code or report


if __name__ == "__main__":
    sys.exit(main())
