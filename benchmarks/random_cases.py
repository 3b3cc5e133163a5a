"""Random transfers by the kernel's double, in as many processes as there are CPUs.

    python benchmarks/random_cases.py 50000

Needs no GPU: these are the cases of tests/kernel/test_random.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = 20
COMMAND = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernel/test_random.py")


def run(cases: str, part: int) -> tuple[int, str]:
    """Run one part of the cases; the exit code, and what pytest said."""
    done = subprocess.run(
        [sys.executable, *COMMAND, "-k", f"[{part}]"],
        cwd=ROOT,
        env=os.environ | {"KVSIG_KERNEL_CASES": cases},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout


def main() -> int:
    cases = sys.argv[1] if len(sys.argv) > 1 else "50000"
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(lambda part: run(cases, part), range(PARTS)))
    bad = [(part, text) for part, (code, text) in enumerate(found) if code]
    for part, text in bad:
        print(f"part {part}:\n{text[-4000:]}")
    print(f"{cases} random transfers, and a 20th as many within a GPU: {len(bad)} parts failed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
