"""Measuring, on the emulated runtime: every byte is compared, and no speed is told."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from tools.invented import gpu_result

from kvsig import Report
from kvsig.tools.cells import CHOICES, PATHS, Cell, describe
from kvsig.tools.jobs import Job
from kvsig.tools.measuring import Bench, Series, close, ratio, summary
from kvsig.tools.methods import METHODS, Unavailable


@pytest.fixture
def on_emulated(emulated_runtime):
    emulated_runtime("13.0")


def run(*cells: Cell, **options: Any) -> dict[str, Any]:
    return Bench(cells, runs=3, **options).run()


@pytest.mark.usefixtures("on_emulated")
class TestEmulated:
    @pytest.mark.parametrize("direction", CHOICES["direction"])
    @pytest.mark.parametrize("layout", CHOICES["layout"])
    @pytest.mark.parametrize("scope", CHOICES["scope"])
    @pytest.mark.parametrize("spacing", CHOICES["spacing"])
    def test_every_method_moves_the_bytes(self, direction, layout, scope, spacing):
        cell = Cell(
            512, 8, layers=3, direction=direction, layout=layout, scope=scope, spacing=spacing
        )
        result = run(cell)
        methods = result["cells"][0]["methods"]
        # Memory that the bench makes without a GPU is pageable.
        assert set(methods) == set(PATHS) - {"kernel"}
        assert "the host pool is pageable" in result["cells"][0]["notes"]["kernel"]
        assert all(row["verified"] for row in methods.values())
        assert all(row["bytes"] == cell.bytes for row in methods.values())
        assert methods["loop"]["calls"] == cell.copies
        assert result["summary"]["errors"] == []
        assert result["summary"]["verifications"] == len(PATHS) - 1

    def spoil(self, monkeypatch, spoil):
        real = Job.transfer

        def spoiled(job: Job, path: str, direction: str, stream: Any) -> Any:
            report = real(job, path, direction, stream)
            stream.synchronize()
            spoil(job, path)
            return report

        monkeypatch.setattr(Job, "transfer", spoiled)
        return run(Cell(512, 8, layers=2))["summary"]["errors"][0]

    def test_wrong_bytes_are_found(self, monkeypatch):
        def spoil(job, path):
            if path == "batch":
                job.near[0][0][int(job.pages["load"][0][0]), 0] += 1

        assert re.fullmatch(
            r"RuntimeError: batch: layer 0 K: device page \d+ does not hold host page \d+,"
            r" in 8 pages of 512 B, 2 layers of K and V, load, random pages, page_first_direct,"
            r" all layers in one call",
            self.spoil(monkeypatch, spoil),
        )

    def test_a_page_that_had_to_stay_is_compared_too(self, monkeypatch):
        def spoil(job, path):
            job.far_bytes[-1] += 1

        assert ": layer 1 V: host page 15 was written, in " in self.spoil(monkeypatch, spoil)

    def test_no_speed_is_reported(self):
        result = run(Cell(512, 8, layers=2))
        assert result["provenance"]["emulated"] is True
        assert "gb_s" not in json.dumps(result)
        assert '"ms"' not in json.dumps(result)
        for row in result["cells"][0]["methods"].values():
            assert row["host_ns_per_copy"] > 0
            assert row["host_ms"]["min"] <= row["host_ms"]["median"] <= row["host_ms"]["max"]

    def test_the_limit_needs_a_gpu(self):
        notes = run(Cell(512, 8, layers=2))["cells"][0]["notes"]
        assert notes["one-copy"] == "means nothing on the emulated runtime"

    def test_a_method_is_added_by_an_entry(self, monkeypatch):
        """Also one that fails in its own way, and one that cannot be had here."""

        def by_hand(job):
            def move(direction, stream):
                near, far = (torch.from_numpy(pages) for pages in job.pages[direction])
                for kind, tensors in enumerate(job.near):
                    for layer, tensor in enumerate(tensors):
                        tensor[near] = job.far_plane(kind, layer)[far]
                return Report("by hand", None, job.cell.copies, 0, job.cell.bytes)

            return move

        def missing(job):
            raise Unavailable("not installed")

        def broken(job):
            raise LookupError("of its own")

        added = {"by hand": by_hand, "missing": missing, "broken": broken}
        for name, method in added.items():
            monkeypatch.setitem(METHODS, name, method)
        (cell,) = run(Cell(512, 8, layers=2), methods=("auto", *added))["cells"]
        assert cell["methods"]["by hand"]["verified"]
        assert cell["notes"] == {"missing": "not installed", "broken": "LookupError: of its own"}

    def test_time_that_is_too_short_leaves_cells_out(self):
        result = run(*[Cell(512, 8, layers=2)] * 3, seconds=0.0)
        assert (result["cells"], len(result["skipped"])) == ([], 3)

    def test_saved_after_every_cell(self):
        seen = []
        cells = [Cell(512, 8, layers=2)] * 2
        Bench(cells, ["loop"], runs=1, save=lambda result: seen.append(len(result["cells"]))).run()
        assert seen == [1, 2, 2]

    def test_a_cell_that_fails_does_not_lose_the_others(self):
        result = run(Cell(512, 8, order="nonsense", layout="none"), Cell(512, 8, layers=2))
        assert "ValueError: layout must be" in result["summary"]["errors"][0]
        assert result["cells"][1]["methods"]

    def test_methods_are_timed_in_turn(self, monkeypatch):
        timed = []
        monkeypatch.setattr(Bench, "time_one", lambda self, one: timed.append(one.name))
        bench = Bench([], runs=8)
        bench.time_all([Series(name, Report) for name in "abc"], float("inf"))
        turns = [timed[i : i + 3] for i in range(0, 24, 3)]
        assert all(sorted(turn) == ["a", "b", "c"] for turn in turns)
        assert turns[1] == turns[0][::-1], "each comes as often before another as behind it"


def series(name: str, *times: float, size: int = 1000) -> Series:
    return Series(name, Report, Report(bytes=size), ms=list(times))


class TestRatios:
    def test_of_the_turns_of_both(self):
        """A machine that is twice as slow in some of the turns does not count for either."""
        mine = series("auto", 1.0, 2.0, 1.0, 2.0, 2.0)
        other = series("batch", 1.1, 2.2, 1.1)
        assert ratio(mine, other) == pytest.approx(1.1)
        assert ratio(other, mine) == pytest.approx(1 / 1.1)

    def test_of_methods_that_moved_less(self):
        half = series("torch", 1.1, 2.2, 1.1, size=500)
        assert ratio(series("auto", 1.0, 2.0, 1.0), half) == pytest.approx(2.2)

    def test_only_what_comes_close_goes_on(self):
        times = {"auto": 2.0, "batch": 1.0, "strided": 1.4, "loop": 1.6, "one-copy": 9.0}
        found = close([series(name, time) for name, time in times.items()])
        assert [one.name for one in found] == ["auto", "batch", "strided", "one-copy"]


class TestSummary:
    def test_auto_behind_the_best(self):
        found = summary(gpu_result())
        assert (found["compared"], found["worst"]) == (4, 0.75)
        assert len(found["behind"]) == 4
        place = describe(Cell(4096, 8, layers=3, direction="offload"))
        assert found["behind"][0] == {"cell": place, "best": "batch", "ratio": 0.75}
        assert found["verified"] is True

    def test_wrong_bytes(self):
        result = gpu_result()
        result["cells"][0]["methods"]["auto"]["verified"] = False
        assert summary(result)["verified"] is False
