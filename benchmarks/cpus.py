"""How fast each CPU is at the moment, one after the other, some times over.

Submitting copies is the host's work, and the virtual CPUs of rented machines change their speed.
Prints nanoseconds of a loop of Python on each CPU, and what the kernel says was stolen meanwhile.
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

from kvsig import _threads


def loop_ns() -> float:
    taken = []
    end = time.perf_counter() + 0.01
    while time.perf_counter() < end:
        taken.append(_threads.loop_ns(1))
    return statistics.median(taken)


def stolen() -> int:
    return int(Path("/proc/stat").read_text(encoding="ascii").split()[8])


def main() -> None:
    cpus = sorted(os.sched_getaffinity(0))
    for cpu in cpus[:2]:
        place = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        if place.exists():
            print(f"cpu {cpu}: shares a core with {place.read_text(encoding='ascii').strip()}")
    print("ns per loop on each CPU; ticks stolen")
    for _ in range(8):
        before = stolen()
        row = []
        for cpu in cpus:
            os.sched_setaffinity(0, {cpu})
            row.append(loop_ns())
        os.sched_setaffinity(0, cpus)
        print(" ".join(f"{ns:>5.0f}" for ns in row), f"  {stolen() - before}")
        time.sleep(0.5)


if __name__ == "__main__":
    main()
