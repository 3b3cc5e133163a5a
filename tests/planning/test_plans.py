"""A plan is a pure function, and a table that a person reads."""

import hashlib
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from geometries import (
    H100,
    KIB,
    choose,
    page_first,
    plan,
    random_geometry,
    random_model,
    random_pages,
    random_seams,
)

import kvsig.planning
from kvsig.planning import Geometry, pieces


def digest(seed, between=lambda: None):
    """Digest of what 40 random requests are planned to be, twice each."""
    rng, found = np.random.default_rng(seed), hashlib.sha256()
    for _ in range(40):
        planes = random_geometry(rng)
        direction = str(rng.choice(["offload", "load"]))
        near, far = random_pages(rng, planes.device_pages, direction)
        seams = [random_seams(rng, planes, device) for device in (False, True)]
        ready = Geometry(planes, random_model(rng), *seams)
        for path in ("auto", "batch", "strided", "loop"):
            one = repr(pieces(choose(ready, near, far, direction, path)))
            between()
            again = choose(ready, near, far, direction, path)
            assert repr(pieces(again)) == one
            found.update(f"{path} {again.method} {again.predicted_us!r} {one}".encode())
    return found.hexdigest()


class TestPure:
    def test_whatever_was_planned_between(self):
        rng = np.random.default_rng(5)
        other = Geometry(page_first(5, 4096, 3000), H100)

        def between():
            order = rng.permutation(3000)
            pieces(choose(other, order, order[::-1], "offload"))

        assert digest(3) == digest(3, between)

    def test_in_another_process(self):
        code = "import sys; from test_plans import digest; print(digest(int(sys.argv[1])))"
        here = Path(__file__).resolve()
        path = [str(here.parent), str(Path(kvsig.__file__).resolve().parents[1])]
        other = subprocess.run(
            [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}; {code}", "11"],
            capture_output=True, text=True, check=True,
        )
        assert other.stdout.strip() == digest(11)

    def test_no_clock_and_no_memory(self):
        """Nothing in the room reads a clock, or keeps what an earlier request was."""
        room = Path(kvsig.planning.__file__).parent
        # What is kept between requests: memory that is all zero again after each use, and memory
        # that is written before it is read.
        kept = {"spare_marks, spare_room", "spare_numbers, spare_count"}
        for file in sorted(room.glob("*.py*")):
            text = file.read_text(encoding="utf-8")
            for word in ("clock", "time.", "perf_counter", "monotonic", "getrusage", "rdtsc"):
                code = [line.split("#")[0] for line in text.splitlines() if '"""' not in line]
                assert not any(f" {word}" in line and "import" in line for line in code), (
                    file.name, word,
                )
            for line in text.splitlines():
                if line.strip().startswith("global "):
                    assert line.strip().removeprefix("global ") in kept, (file.name, line)

    @pytest.mark.known_failure("shared-planner")
    def test_many_threads(self):
        rng = np.random.default_rng(0)
        ready = Geometry(page_first(4, 64, 3000), H100)
        work, failures = [], []
        for _ in range(8):
            device, host = rng.permutation(3000)[:2000], rng.permutation(3000)[:2000]
            work.append((device, host, plan(ready, device, host, "load", "batch").dsts))

        def move(device, host, want):
            for _ in range(20):
                found = pieces(choose(ready, device, host, "load", "batch"))
                if not np.array_equal(np.concatenate([arrays[0] for _, arrays in found]), want):
                    failures.append("wrong addresses")

        threads = [threading.Thread(target=move, args=item) for item in work]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []


class TestTable:
    def test_table(self):
        pages = 4096
        rng = np.random.default_rng(0)
        device, host = rng.permutation(pages)[:16], rng.permutation(pages)[:16]
        text = str(plan(page_first(32, 32 * KIB, pages), device, host, "load", model=H100))
        assert text.splitlines()[0].startswith("load by strided: 32.0 MiB in 16 CUDA calls, ")
        assert "asked for          1,024                          32.0 MiB" in text
        assert "strided               16       1,024        16    32.0 MiB" in text
        assert "  chosen" in text and "costs: NVIDIA H100 80GB HBM3, built in" in text
        for method in ("batch", "loop"):
            assert f"\n{method} " in text

    def test_counts(self):
        rng = np.random.default_rng(0)
        planes = page_first(3, 64 * KIB, 500)
        result = plan(planes, rng.permutation(500), rng.permutation(500), "load", "batch", H100)
        assert result.copies_in == result.copies_out == len(result.dsts) == 3000
        assert (result.batch_size, result.calls) == (256, 12)
        assert result.bytes == int(result.sizes.sum()) == 3000 * 64 * KIB
