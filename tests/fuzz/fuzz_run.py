"""Fuzzing for a while: ``python tests/fuzz/fuzz_run.py --seconds 60``, or ``make fuzz``.

Two drivers run the same targets (``fuzz_targets.py``). The fast one draws from `random.Random`: a
failure names its seed, which ``--target NAME --seed N`` runs again. Hypothesis then makes the
failing case smaller. The last line is JSON: executions of each target, failures, seconds.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import sys
import time
import traceback
from pathlib import Path

from fuzz_targets import TARGETS, Target

#: Cases run by one set-up of a target: then everything is made anew, from another seed.
CHUNK = 2000


def smaller(name: str, seed: int) -> None:
    """Let hypothesis look for a small failing case of a target's set-up, and print it."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import seed as seeded
    from hypothesis import strategies as st

    target = TARGETS[name](seed)

    @seeded(seed)
    @settings(
        max_examples=500, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.randoms(use_true_random=False))
    def case(rng: random.Random) -> None:
        target(rng)

    try:
        case()
        print("hypothesis found no failing case of its own; the seed stands", file=sys.stderr)
    except Exception:
        traceback.print_exc()


def one_case(target: Target, seed: int, number: int) -> None:
    """Run the case of a number."""
    target(random.Random(seed * 1_000_003 + number))


def chunk(name: str, seed: int, end: float, limit: int) -> tuple[int, str | None]:
    """Run cases of one set-up; the number that were run, and the failure."""
    target = TARGETS[name](seed)
    number = 0
    try:
        for number in range(min(CHUNK, limit)):
            if number % 64 == 0 and time.monotonic() > end:
                return number, None
            one_case(target, seed, number)
    except Exception:
        where = f"--target {name} --seed {seed}, case {number}"
        return number + 1, f"{where}:\n{traceback.format_exc()}"
    finally:
        target.close()
    return min(CHUNK, limit), None


def run(args: argparse.Namespace) -> dict[str, object]:
    """Run targets in turn until time or number is up."""
    begin = time.monotonic()
    names = [args.target] if args.target else list(TARGETS)
    counts = dict.fromkeys(names, 0)
    spent = dict.fromkeys(names, 0.0)
    failures: list[str] = []
    seed = args.seed
    while True:
        passed = time.monotonic() - begin
        left = args.executions - sum(counts.values())
        if passed >= args.seconds or left <= 0 or failures:
            break
        # Whichever is furthest behind its share of the time.
        name = min(names, key=lambda n: spent[n] / TARGETS[n].weight)
        start = time.monotonic()
        done, failed = chunk(name, seed, begin + args.seconds, left)
        spent[name] += time.monotonic() - start
        counts[name] += done
        if failed:
            failures.append(failed)
            print(failed, file=sys.stderr)
            smaller(name, seed)
        seed += 1
    return {
        "executions": sum(counts.values()),
        "by_target": counts,
        "failures": len(failures),
        "seconds": round(time.monotonic() - begin, 1),
        "first_seed": args.seed,
        "next_seed": seed,
    }


def main(argv: list[str] | None = None) -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="time budget (60)")
    parser.add_argument("--executions", type=int, default=1 << 62, help="stop after so many")
    parser.add_argument("--seed", type=int, help="of the first set-up (by default the clock's)")
    parser.add_argument("--target", choices=list(TARGETS), help="only this one")
    parser.add_argument("--output", type=Path, help="append the last line to this file too")
    args = parser.parse_args(argv)
    if args.seed is None:
        args.seed = time.time_ns() // 1_000_000 % 1_000_000_000
    os.environ.pop("KVSIG_CUDART", None)
    result = run(args)
    line = json.dumps(result)
    if args.output:
        with args.output.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    print(line)
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    faulthandler.enable()
    sys.exit(main())
