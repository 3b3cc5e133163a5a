"""The benchmark and the calibration, on the emulated runtime: no speeds, and exact refusals."""

from __future__ import annotations

import builtins
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kvsig
from kvsig import _commit, _core, _threads, bench, cli, costs
from kvsig.cli import bench as command

KIB = 1 << 10
BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SMALL = ["--page-bytes", "512,2K", "--pages", "8", "--layers", "3", "--runs", "3"]


@pytest.fixture
def on_emulated(emulated_runtime):
    emulated_runtime("13.0")


@pytest.fixture
def no_matplotlib(monkeypatch):
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError("no matplotlib")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)


def gpu_result(directions: tuple[str, ...] = ("offload", "load")) -> dict[str, Any]:
    """A result as a GPU gives it, with invented numbers."""
    cells = []
    for direction in directions:
        for size in (4 * KIB, 16 * KIB):
            cell = bench.Cell(size, 8, layers=3, direction=direction)
            methods = {}
            for name, speed in (("auto", 30.0), ("batch", 40.0), ("one-copy", 50.0)):
                numbers = {"median": 1.0, "min": 1.0, "max": 1.0, "p10": 1.0, "p90": 1.0}
                methods[name] = {
                    "runs": 3,
                    "path": "batch",
                    "reason": None,
                    "planned": None,
                    "copies": cell.copies,
                    "calls": 1,
                    "operations": cell.copies,
                    "bytes": cell.bytes,
                    "verified": None if name == "one-copy" else True,
                    "host_ms": numbers,
                    "host_ns_per_copy": 1234.4,
                    "ms": numbers,
                    "gb_s": speed,
                    "share": speed / 50,
                }
            cells.append(
                bench.asdict(cell)
                | {"copies": cell.copies, "bytes": cell.bytes, "methods": methods, "notes": {}}
                | {"limit_gb_s": 50.0}
            )
    source = {
        "date": "2026-01-01T00:00:00+00:00",
        "commit": "0123456789abcdef",
        "emulated": False,
        "device": "Some GPU",
        "library": "libcudart.so.13",
        "runtime_version": 13000,
        "driver_version": 13010,
        "torch": "2.11.0",
    }
    result = {"schema": bench.SCHEMA, "kind": "bench", "provenance": source}
    return result | {"options": {}, "cells": cells, "skipped": []}


class TestCells:
    def test_copies_and_bytes(self):
        cell = bench.Cell(4096, 16, layers=32, kinds=2, direction="load")
        assert (cell.copies, cell.bytes) == (1024, 4 << 20)
        both = bench.Cell(4096, 16, layers=32, kinds=2, direction="both")
        assert (both.copies, both.bytes) == (2048, 8 << 20)

    def test_the_preset_has_what_is_asked_for(self):
        cells = bench.preset(emulated=False)
        assert {cell.section for cell in cells} == set(bench.SECTIONS)
        assert {cell.page_bytes for cell in cells} >= {256 << i for i in range(13)}
        assert {cell.order for cell in cells} == set(bench.ORDERS)
        assert {cell.layout for cell in cells} == set(bench.LAYOUTS)
        assert {cell.direction for cell in cells} == set(bench.DIRECTIONS)
        assert {cell.scope for cell in cells} == set(bench.SCOPES)
        assert {cell.spacing for cell in cells} == set(bench.SPACINGS)
        assert {cell.model for cell in cells} == {"", *bench.MODELS}
        assert max(cell.copies for cell in cells) == 1_000_000
        assert max(cell.pool_bytes for cell in cells) <= bench.MOST_BYTES
        assert max(cell.copies for cell in cells if cell.scope == "layer") == bench.LAYER_COPIES

    def test_quick_is_small(self):
        cells = bench.preset(emulated=False, quick=True)
        assert 0 < len(cells) <= 16
        assert {cell.scope for cell in cells} == {"all", "layer"}

    def test_the_emulated_preset_is_small(self):
        assert sum(cell.bytes for cell in bench.preset(emulated=True)) < 1 << 30

    def test_product_is_every_combination(self):
        cells = bench.product(
            True, page_bytes=(512, 1024), pages=(4, 8), orders=("random", "sorted")
        )
        assert len(cells) == 2 * 2 * 2 * 2
        assert {cell.direction for cell in cells} == {"offload", "load"}

    def test_product_of_models(self):
        (cell, _) = bench.product(True, models=("deepseek-v3",), page_sizes=(16,), pages=(4,))
        assert (cell.page_bytes, cell.layers, cell.kinds) == (16 * 1152, 61, 1)

    def test_too_large(self):
        with pytest.raises(ValueError) as caught:
            bench.product(False, page_bytes=(1 << 20,), pages=(64,), directions=("load",))
        assert str(caught.value) == (
            "64 pages of 1 MiB in 32 layers need 8 GiB on each side, twice what moves; a cell may"
            " have 2 GiB: ask for fewer --pages or --layers"
        )

    @pytest.mark.parametrize("order", bench.ORDERS)
    @pytest.mark.parametrize("pages", [1, 4, 24])
    def test_page_numbers(self, order, pages):
        cell = bench.Cell(512, pages, order=order)
        mine, other = bench.page_numbers(cell, np.random.default_rng(1))
        assert sorted([*mine, *other]) == list(range(2 * pages))
        steps = np.diff(mine)
        if order == "sorted":
            assert (steps == 1).all()
        elif order == "reversed":
            assert (steps == -1).all()
        elif order == "runs8" and pages == 24:
            assert (steps.reshape(-1)[np.arange(23) % 8 != 7] == 1).all()


@pytest.mark.usefixtures("on_emulated")
class TestEmulated:
    def run(self, *cells: bench.Cell, **options: Any) -> dict[str, Any]:
        return bench.Bench(cells, bench.Options(runs=3, **options)).run()

    @pytest.mark.parametrize("direction", bench.DIRECTIONS)
    @pytest.mark.parametrize("layout", bench.LAYOUTS)
    @pytest.mark.parametrize("scope", bench.SCOPES)
    @pytest.mark.parametrize("spacing", bench.SPACINGS)
    def test_every_method_moves_the_bytes(self, direction, layout, scope, spacing):
        cell = bench.Cell(
            512, 8, layers=3, direction=direction, layout=layout, scope=scope, spacing=spacing
        )
        result = self.run(cell)
        methods = result["cells"][0]["methods"]
        assert set(methods) == {"auto", "batch", "strided", "loop", "one-call"}
        assert all(row["verified"] for row in methods.values())
        assert all(row["bytes"] == cell.bytes for row in methods.values())
        assert methods["loop"]["operations"] == methods["one-call"]["operations"] == cell.copies
        assert result["summary"]["errors"] == []
        assert result["summary"]["verifications"] == 5

    def test_wrong_bytes_are_found(self, monkeypatch):
        real = bench.Job.kvsig

        def spoil(job: bench.Job, direction: str, path: str, stream: Any) -> Any:
            reports = real(job, direction, path, stream)
            stream.synchronize()
            if path == "batch":
                job.near[0][0][int(job.pages["load"][0][0]), 0] += 1
            return reports

        monkeypatch.setattr(bench.Job, "kvsig", spoil)
        result = self.run(bench.Cell(512, 8, layers=2))
        (error,) = result["summary"]["errors"]
        assert error == (
            "RuntimeError: batch: 1 bytes on the device are wrong, in 8 pages of 512 B, "
            "2 layers, load, random"
        )

    def test_a_page_that_had_to_stay_is_compared_too(self, monkeypatch):
        real = bench.Job.kvsig

        def spoil(job: bench.Job, direction: str, path: str, stream: Any) -> Any:
            reports = real(job, direction, path, stream)
            stream.synchronize()
            job.far_bytes[-1] += 1
            return reports

        monkeypatch.setattr(bench.Job, "kvsig", spoil)
        result = self.run(bench.Cell(512, 8, layers=2))
        assert "bytes on the host are wrong" in result["summary"]["errors"][0]

    def test_no_speed_is_reported(self):
        result = self.run(bench.Cell(512, 8, layers=2))
        assert result["provenance"]["emulated"] is True
        assert "gb_s" not in json.dumps(result)
        assert '"ms"' not in json.dumps(result)
        for row in result["cells"][0]["methods"].values():
            assert row["host_ns_per_copy"] > 0
            assert row["host_ms"]["min"] <= row["host_ms"]["median"] <= row["host_ms"]["max"]
        text = command.text_of(result)
        assert "GB/s" not in text
        assert "emulated: no speeds, only host time and operations" in text
        assert "host time per copy, ns" in text
        assert "operations (in calls)" in text

    def test_rivals_that_need_a_gpu_are_named(self):
        notes = self.run(bench.Cell(512, 8, layers=2))["cells"][0]["notes"]
        assert set(notes) == {"torch", "select", "bindings", "cuda.core", "one-copy"}
        assert set(notes.values()) == {"means nothing on the emulated runtime"}

    def test_default_stream(self):
        cell = bench.Cell(512, 8, layers=2, stream="default")
        methods = self.run(cell, methods=("auto",))["cells"][0]["methods"]
        assert set(methods) == {"auto", "auto, default stream"}
        assert methods["auto, default stream"]["verified"]

    def test_threads_that_may_submit(self, on_emulated, monkeypatch, tmp_path):
        made = []
        real = kvsig.PagedKVCache

        def cache(*args, **options):
            made.append(options["threads"])
            return real(*args, **options)

        monkeypatch.setattr(bench.kvsig, "PagedKVCache", cache)
        path = tmp_path / "x.json"
        assert cli.main(["bench", *SMALL, "--method", "auto", "--json", str(path)]) == 0
        assert set(made) == {None}
        threads = json.loads(path.read_text(encoding="utf-8"))["options"]["threads"]
        assert threads == list(_threads.most(None))
        del made[:]
        assert cli.main(["bench", *SMALL, "--method", "auto", "--threads", "3"]) == 0
        assert set(made) == {3}

    @pytest.mark.parametrize("threads", ["0", "9", "two"])
    def test_threads_that_cannot_be(self, threads, capsys):
        with pytest.raises(SystemExit):
            cli.main(["bench", "--threads", threads])
        assert "--threads" in capsys.readouterr().err

    def test_time_that_is_too_short_leaves_cells_out(self):
        result = self.run(*[bench.Cell(512, 8, layers=2)] * 3, seconds=0.0)
        assert result["cells"] == []
        assert len(result["skipped"]) == 3
        assert "3 cells were left out: --seconds was too short for them" in command.text_of(result)

    def test_saved_after_every_cell(self):
        seen = []
        cells = [bench.Cell(512, 8, layers=2)] * 2
        options = bench.Options(methods=("loop",), runs=1)
        bench.Bench(cells, options, lambda result: seen.append(len(result["cells"]))).run()
        assert seen == [1, 2, 2]

    def test_a_cell_that_fails_does_not_lose_the_others(self):
        cells = [bench.Cell(512, 8, order="nonsense", layout="none"), bench.Cell(512, 8, layers=2)]
        result = self.run(*cells)
        assert "ValueError: layout must be" in result["summary"]["errors"][0]
        assert result["cells"][1]["methods"]
        assert "FAILED: ValueError" in command.text_of(result)

    def test_host_costs(self, monkeypatch):
        monkeypatch.setattr(bench, "HOST_SHAPES", bench.HOST_SHAPES[:1])
        monkeypatch.setattr(bench, "HOST_COPIES", bench.HOST_COPIES[:1])
        rows = bench.host_costs(seconds=60)["plan"]
        assert rows[0]["copies"] == 99_968
        assert rows[0]["ns_per_copy"] > 0
        assert [(row["direction"], row["method"]) for row in rows] == [
            (way, method)
            for way in ("load", "offload")
            for method in ("auto", "batch", "strided", "loop")
        ]
        assert {row["runs"] for row in rows} == {bench.HOST_RUNS}

    def test_host_costs_keep_to_their_time(self, monkeypatch):
        """Three runs of each method at least; what there is no time for then is left out."""
        made = []

        def plan_and_pack(prepared, near, far, direction, method):
            made.append(method)
            return method, 1.0

        monkeypatch.setattr(bench, "plan_and_pack", plan_and_pack)
        monkeypatch.setattr(bench.time, "monotonic", lambda: float(len(made)))
        monkeypatch.setattr(bench, "HOST_COPIES", bench.HOST_COPIES[:1])
        rows = bench.host_costs(seconds=2, full_speed=False)["plan"]
        assert [row["runs"] for row in rows] == [3] * 8
        assert len(made) == 8 * (1 + 3)

    def test_host_costs_are_measured_in_turn(self, monkeypatch):
        """A moment in which the CPU belongs to others is in a run of each, and in no median."""
        made = []

        def plan_and_pack(prepared, near, far, direction, method):
            made.append((direction, method))
            # One run each for memory, then these: 30 of them take a hundred times as long.
            slow = 8 + 40 <= len(made) < 8 + 70
            return method, 1.0 if slow else 0.01

        monkeypatch.setattr(bench, "plan_and_pack", plan_and_pack)
        monkeypatch.setattr(bench, "HOST_SHAPES", bench.HOST_SHAPES[:1])
        monkeypatch.setattr(bench, "HOST_COPIES", bench.HOST_COPIES[:1])
        rows = bench.host_costs(seconds=60)["plan"]
        assert len(made) == 8 * (1 + bench.HOST_RUNS)
        assert {row["ns_per_copy"] for row in rows} == {round(0.01 / 99_968 * 1e9, 2)}
        assert {row["ns_per_copy_max"] for row in rows} == {round(1.0 / 99_968 * 1e9, 2)}


class TestTurns:
    def series(self, name, *times, size=1000):
        one = bench.Series(name, lambda: None, None, outcome=bench.Outcome(bytes=size))
        one.ms, one.turns = list(times), list(range(len(times)))
        return one

    def test_methods_are_compared_in_the_turns_of_both(self):
        """A machine that is twice as slow in some of the turns does not count for either."""
        mine = self.series("auto", 1.0, 2.0, 1.0, 2.0, 2.0)
        other = self.series("batch", 1.1, 2.2, 1.1)
        assert bench.ratio_of(mine, other) == pytest.approx((1.1, 0))
        assert bench.ratio_of(other, mine)[0] == pytest.approx(1 / 1.1)
        half = self.series("torch", 1.1, 2.2, 1.1, size=500)
        assert bench.ratio_of(mine, half)[0] == pytest.approx(2.2)
        assert bench.ratio_of(mine, self.series("loop")) is None

    def test_slow_methods_are_timed_three_times(self, on_emulated):
        found = bench.Bench([], bench.Options())
        found.real = True
        names = {"auto": 2.0, "batch": 1.0, "strided": 1.4, "loop": 1.6, "one-copy": 9.0}
        series = [self.series(name, time) for name, time in names.items()]

        racing = [one.name for one in found.racing(series)]
        assert racing == ["auto", "batch", "strided", "one-copy"]

    def test_the_limit_goes_on_in_every_second_turn(self, on_emulated, monkeypatch):
        """What is a share of the limit is one of its time, however long a cell goes on."""
        found = bench.Bench([], bench.Options(runs=5))
        found.real = True
        auto, limit = self.series("auto"), self.series("one-copy")

        def time_one(one, again):
            # The link gets slower and slower, and auto with it.
            one.ms.append((2.0 if one is auto else 1.0) * (1 + one.turns[-1]))

        monkeypatch.setattr(found, "time_one", time_one)
        deadline = bench.time.monotonic() + 60
        found.time_all([auto, limit], deadline, bench.LIMIT_RUNS)
        assert auto.turns == limit.turns == [0, 1, 2, 3, 4], "both are known"
        monkeypatch.setattr(bench, "need", lambda series: 2.0)
        found.time_all([auto, limit], deadline, bench.LIMIT_RUNS + 11)
        assert auto.turns == list(range(20))
        assert limit.turns == [*range(9), *range(10, 20, 2)]
        for one in (auto, limit):
            one.host_ms, one.outcome = one.ms, bench.Outcome(bytes=10**9)
        row = found.entry(bench.Cell(500, 1, layers=1), [auto, limit], {})["methods"]["auto"]
        assert (row["runs"], row["share"], row["share_error"]) == (20, 0.5, 0.0)

    def test_a_share_that_is_not_known_goes_on(self):
        """Neighbours in time may agree on a ratio where the times of both are anything."""
        loud = [1.0, 2.0, 1.0, 2.0, 1.0]
        auto, batch = self.series("auto", *loud), self.series("batch", *loud)
        limit = self.series("one-copy", *[0.5] * 5)
        assert bench.ratio_of(auto, batch) == (1.0, 0.0)
        assert bench.need([auto, batch]) == 0
        assert bench.need([auto, batch, limit]) > 1
        for one in (auto, batch):
            one.ms[:] = [1.0, 1.01, 1.0, 1.01, 1.0]
        assert bench.need([auto, batch, limit]) <= 1
        assert bench.need([batch, limit]) == bench.need([self.series("auto"), limit]) == 0

    def test_the_error_of_a_ratio(self):
        """As often as it should, the median of noisy turns is within so much of the truth."""
        rng = np.random.default_rng(0)
        within = []
        for _ in range(200):
            mine = self.series("auto", *([1.0] * 60))
            other = self.series("batch", *rng.normal(1.1, 0.05, 60).tolist())
            ratio, error = bench.ratio_of(mine, other)
            within.append(abs(ratio - 1.1) < error)
        assert 0.5 < np.mean(within) < 0.85  # 0.68 where both are normal

    @pytest.mark.parametrize(
        ("times", "turns"),
        [((1.0,), 5), ((1.0, 1.0, 0.9), 5), ((0.5, 1.5), 200), ((1.4, 1.6), 5)],
        ids=["quiet", "outliers", "very noisy", "noisy, but clearly slower"],
    )
    def test_goes_on_until_the_ratios_are_known(self, on_emulated, monkeypatch, times, turns):
        found = bench.Bench([], bench.Options(runs=5))
        found.real = True
        auto, batch = self.series("auto"), self.series("batch")
        carefully = []

        def time_one(one, again):
            carefully.append(again)
            one.ms.append(times[len(one.ms) % len(times)] if one is batch else 1.0)

        monkeypatch.setattr(found, "time_one", time_one)
        for most in (5, 5 * bench.MORE_RUNS):
            found.time_all([auto, batch], bench.time.monotonic() + 60, most)
        assert len(auto.ms) == len(batch.ms) == turns
        assert auto.turns == batch.turns == list(range(turns))
        assert carefully == [False] * 2 * bench.FEW_RUNS + [True] * 2 * (turns - bench.FEW_RUNS)

    def test_what_is_known_least_goes_on(self, on_emulated, monkeypatch):
        """Cells are visited until all are known; one that fails keeps what it has.

        One that stays unknown leaves time to the others.
        """
        cells = [bench.Cell(512, 8, layers=layers) for layers in (2, 3, 4, 5, 6)]
        found = bench.Bench(cells, bench.Options(runs=5))
        found.real = True
        noise = {2: 0.0, 3: 0.2, 4: 0.1, 5: 0.3, 6: 0.6}
        measured, visits = [], []

        def more(one, count):
            for series in one.series:
                first = len(series.ms)
                loud = noise[one.cell.layers] * (series.name != "auto")
                series.ms += (1 + loud * np.linspace(-1, 1, count)).tolist()
                series.host_ms += [1.0] * count
                series.turns += range(first, first + count)

        for place, cell in enumerate(cells):
            series = [self.series("auto"), self.series("batch")]
            measured.append(bench.Measured(cell, series, {}, place))
            more(measured[-1], 5)
            found.result["cells"].append({})

        def visit(one, memory, deadline):
            if one.cell.layers == 5:
                raise RuntimeError("out of memory")
            visits.append(one.cell.layers)
            if one.cell.layers < 6:
                noise[one.cell.layers] = 0.001
            more(one, 20)

        monkeypatch.setattr(found, "visit", visit)
        bar = bench.Bar(4, "")
        found.refine(measured, None, bench.time.monotonic() + 60, bar)
        assert set(visits) == {3, 4, 6}
        assert visits.index(3) < visits.index(4) < 10 < len(visits)
        assert [bench.need(one.series) <= 1 for one in measured] == [True, True, True, False]
        assert bench.next_turn(measured[-1].series) >= 5 * bench.MORE_RUNS
        entries = found.result["cells"]
        assert [entry.get("layers") for entry in entries] == [None, 3, 4, 5, 6]
        assert entries[3]["notes"] == {"more runs": "RuntimeError: out of memory"}
        assert entries[3]["methods"]["auto"]["runs"] == 5
        del visits[:]
        found.refine(measured, None, bench.time.monotonic() - 1, bar)
        assert not visits

    @pytest.mark.parametrize("slower", [False, True], ids=["no time", "out of the race"])
    def test_who_gets_no_more_runs_is_not_visited_again(self, on_emulated, monkeypatch, slower):
        """A method that lost by its median is not run again, however little its ratio is known."""
        cell = bench.Cell(512, 8, layers=2)
        found = bench.Bench([cell], bench.Options(runs=3))
        found.real = True
        times = ([1.0, 1.1, 1.2], [1.2, 1.0, 1.1])
        if slower:
            times = ([1.0, 1.0, 1.0, 1.0, 2.0], [1.0, 1.0, 2.0, 2.0, 2.0])
        series = [self.series(name, *ms) for name, ms in zip(("auto", "batch"), times, strict=True)]
        for one in series:
            one.host_ms = list(one.ms)
        assert bench.need(series) > 1
        found.result["cells"].append({})
        visits = []
        monkeypatch.setattr(found, "visit", lambda *args: visits.append(args))
        begin = bench.time.monotonic()
        measured = [bench.Measured(cell, series, {}, 0)]
        found.refine(measured, None, begin + 60, bench.Bar(1, ""))
        assert bench.time.monotonic() - begin < 30
        assert len(visits) == (0 if slower else 1)

    def test_each_cell_is_sure_of_its_share_of_the_time(self, on_emulated, monkeypatch):
        cells = [bench.Cell(512, 8, layers=2)] * 10
        found = bench.Bench(cells, bench.Options(seconds=120))
        ends = []

        def measure(cell, memory, deadline):
            ends.append(deadline - found.begin)
            return [], {}

        monkeypatch.setattr(found, "measure", measure)
        found.run()
        assert ends == pytest.approx([30, 40, 50, 60, 70, 80, 90, 100, 110, 120])

    def test_a_visit_runs_what_the_cell_ran(self, on_emulated, monkeypatch):
        """In memory of its own; only methods that come close run again."""
        cell = bench.Cell(512, 8, layers=2)
        options = bench.Options(methods=("auto", "batch", "loop"), runs=3, verify=False)
        found = bench.Bench([cell], options)
        memory = bench.Memory(found.device, cell.pool_bytes, 0)
        series, notes = found.measure(cell, memory, bench.time.monotonic() + 60)
        assert notes == {}
        with pytest.raises(RuntimeError, match="no memory to work on"):
            series[0].submit()
        monkeypatch.setattr(found, "racing", lambda series: series[:2])
        monkeypatch.setattr(bench, "need", lambda series: 2.0)
        monkeypatch.setattr(bench, "MORE_RUNS", 2)
        found.visit(bench.Measured(cell, series, notes, 0), memory, bench.time.monotonic() + 60)
        assert [len(one.host_ms) for one in series] == [6, 6, 3]
        assert series[0].turns == [0, 1, 2, 3, 4, 5]
        with pytest.raises(RuntimeError, match="no memory to work on"):
            series[0].submit()

    def timed(self, monkeypatch, log, elapsed, **options):
        """What times runs on a GPU, without one: `elapsed` tells the milliseconds of a run."""

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self, stream):
                log.append("event")

            def synchronize(self):
                pass

            def elapsed_time(self, other):
                return elapsed()

        monkeypatch.setattr(bench.torch.cuda, "Event", Event)
        monkeypatch.setattr(bench.torch.cuda, "synchronize", lambda: log.append("wait"))
        found = bench.Bench([], bench.Options(**options))
        found.real = True
        return found

    @pytest.mark.parametrize(
        ("speeds", "again", "submits", "kept", "full"),
        [
            ([1, 1, 1], True, 0.0, [1, 2, 3], 3),
            ([0, 1, 0, 0, 1, 1], True, 0.0, [2, 5, 6], 3),
            ([0, 0, 0, 0, 1, 0, 1], True, 0.0, [4, 5, 7], 2),
            ([0, 1, 0], True, 0.8, [1, 2, 3], 1),
            ([0, 1, 0], False, 0.0, [1, 2, 3], 1),
        ],
        ids=["full speed", "slowed down", "no better", "the GPU is the slower one", "not again"],
    )
    def test_a_run_that_was_slowed_down_is_made_again(
        self, on_emulated, monkeypatch, speeds, again, submits, kept, full
    ):
        monkeypatch.setattr(bench, "SUBMITS", submits)
        made = []

        found = self.timed(monkeypatch, [], lambda: float(len(made)))
        found.speed.cpus = [0, 1]
        monkeypatch.setattr(found.speed, "settle", lambda: None)
        monkeypatch.setattr(found.speed, "here", lambda: bool(speeds[len(made) - 1]))
        one = bench.Series("auto", lambda: made.append(1) or bench.Outcome(), None)
        one.first_ms = bench.WARM_MS
        for _ in range(3):
            found.time_one(one, again)
        assert one.ms == kept
        assert len(one.host_ms) == 3
        assert (len(made), one.again) == (len(speeds), len(speeds) - 3)
        assert one.full_speed == full

    def test_a_short_run_follows_one_of_its_own_kind(self, on_emulated, monkeypatch):
        """Else it would begin with the data of another method in the CPU's caches."""
        log = []

        found = self.timed(monkeypatch, log, lambda: 1.0, full_speed=False)
        one = bench.Series("auto", lambda: log.append("run") or bench.Outcome(), None)
        timed = ["wait", "event", "run", "event"]
        for first_ms, expected in (
            (0.9 * bench.WARM_MS, ["run", "wait", *timed]),
            (1.1 * bench.WARM_MS, timed),
        ):
            log.clear()
            one.first_ms = first_ms
            found.time_one(one, again=False)
            assert log == expected
        assert len(one.ms) == 2


class TestFullSpeed:
    """A machine of four CPUs, of which some are slow."""

    @pytest.fixture
    def machine(self, monkeypatch):
        class Machine:
            ns = [400, 400, 400, 400]
            mask = {0, 1, 2, 3}
            moves = 0

            @property
            def here(self):
                return min(self.mask)

            def move(self, pid, mask):
                assert pid == 0
                self.mask = set(mask)
                self.moves += 1

        found = Machine()
        monkeypatch.setattr(bench.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
        monkeypatch.setattr(bench.os, "sched_setaffinity", found.move)
        monkeypatch.setattr(bench._threads, "loop_ns", lambda times: found.ns[found.here])
        monkeypatch.setattr(bench, "current_cpu", lambda: found.here)
        return found

    def test_stays_where_it_is_good(self, machine):
        speed = bench.FullSpeed()
        assert machine.mask == {0, 1, 2, 3}, "threads that are started may go anywhere"
        machine.moves = 0
        speed.settle()
        assert machine.moves == 0 and speed.here()

    @pytest.mark.parametrize("good", [1, 2, 3])
    def test_moves_to_one_at_full_speed(self, machine, monkeypatch, good):
        speed = bench.FullSpeed()
        machine.ns = [800] * 4
        machine.ns[good] = 410
        places = []
        move = machine.move
        monkeypatch.setattr(
            bench.os, "sched_setaffinity", lambda pid, mask: places.append(mask) or move(pid, mask)
        )
        speed.settle()
        assert places[-2:] == [{good}, [0, 1, 2, 3]]

    def test_those_that_were_good_most_often_come_first(self, machine, monkeypatch):
        speed = bench.FullSpeed()
        machine.ns = [800, 800, 800, 400]
        for _ in range(20):  # only the last one is ever good
            speed.settle()
        machine.ns = [400] * 4
        places = []
        move = machine.move
        monkeypatch.setattr(
            bench.os, "sched_setaffinity", lambda pid, mask: places.append(mask) or move(pid, mask)
        )
        speed.settle()
        assert places == [{3}, [0, 1, 2, 3]], "also where the one at hand is good just now"
        for _ in range(60):  # the first one has been good for long
            speed.here()
        del places[:]
        speed.settle()
        assert not places

    def test_knows_the_cpu_at_hand(self):
        cpus = bench.os.sched_getaffinity(0)
        try:
            for cpu in cpus:
                bench.os.sched_setaffinity(0, {cpu})
                assert bench.current_cpu() == cpu
        finally:
            bench.os.sched_setaffinity(0, cpus)

    def test_where_none_is_the_best_there_is_counts(self, machine):
        speed = bench.FullSpeed()
        machine.ns = [900, 800, 820, 1000]
        assert not speed.here()
        speed.settle()
        assert machine.mask == {0, 1, 2, 3}
        machine.ns = [810, 1000, 1000, 1000]
        assert speed.here()
        machine.ns[0] = 1000
        assert not speed.here()

    def test_a_slow_start_is_not_taken_for_full_speed(self, machine):
        machine.ns = [800, 800, 400, 800]
        assert not bench.FullSpeed().here()

    def test_not_wanted(self, machine):
        machine.ns = [800, 400, 400, 400]
        bench.FullSpeed(False).settle()
        assert machine.moves == 0


class TestSummary:
    def test_ratios_are_those_of_the_turns(self):
        result = gpu_result()
        for cell in result["cells"]:
            cell["methods"]["batch"]["auto_ratio"] = 0.97
        summary = bench.summary(result)
        assert (summary["worst"], summary["behind"]) == (0.97, [])

    def test_auto_behind_the_best(self):
        summary = bench.summary(gpu_result())
        assert (summary["compared"], summary["worst"]) == (4, 0.75)
        assert summary["behind"][0]["best"] == "batch"
        assert summary["rivals"] == {"batch": 0.75}
        assert summary["verified"] is True


class TestCommit:
    def test_what_the_environment_says(self, monkeypatch):
        monkeypatch.setenv("KVSIG_COMMIT", "0123abc")
        assert _commit.commit() == "0123abc"

    def test_that_of_the_checkout(self, monkeypatch, tmp_path):
        for name in ("KVSIG_COMMIT", "GIT_DIR", "GIT_WORK_TREE"):
            monkeypatch.delenv(name, raising=False)
        package = tmp_path / "kvsig"
        package.mkdir()
        monkeypatch.setattr(_commit, "__file__", str(package / "_commit.py"))
        assert _commit.commit() is None, "no checkout"

        def git(*args):
            command = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org", *args]
            done = subprocess.run(
                command, cwd=tmp_path, check=True, capture_output=True, text=True
            )
            return done.stdout.strip()

        git("init", "-q")
        assert _commit.commit() is None, "no commit yet"
        (package / "a.py").write_text("1\n")
        git("add", "-A")
        git("commit", "-qm", "one")
        assert _commit.commit() == git("rev-parse", "HEAD")
        (package / "a.py").write_text("2\n")
        assert _commit.commit() == git("rev-parse", "HEAD") + "-dirty"


class TestCommand:
    def main(self, *args: str) -> int:
        return cli.main(["bench", *args])

    def test_json(self, on_emulated, tmp_path, capsys):
        path = tmp_path / "result.json"
        assert self.main(*SMALL, "--json", str(path)) == 0
        result = json.loads(path.read_text())
        assert (result["schema"], result["kind"]) == (1, "bench")
        assert set(result["provenance"]) >= {
            "date",
            "commit",
            "device",
            "driver_version",
            "runtime_version",
            "library",
        }
        assert "/" not in result["provenance"]["library"]
        assert result["provenance"]["commit"] == _commit.commit()
        assert len(result["cells"]) == 4
        assert capsys.readouterr().out.count("operations (in calls)") == 2
        assert self.main("--from", str(path)) == 0

    @pytest.mark.parametrize(
        ("args", "text"),
        [
            (["--page-bytes", "12Q"], "'12Q' is not a number of bytes up to 1 GiB"),
            (["--page-bytes", "0"], "'0' is not a number of bytes up to 1 GiB"),
            (["--order", "random,odd"], "'odd' is not one of: random, runs8, sorted, reversed"),
            (["--model", "gpt"], "'gpt' is not one of: llama3-8b, llama3-70b-tp8, deepseek-v3"),
            (["--kinds", "3"], "'3' is not one of: 1, 2"),
            (["--plot", "speed.pdf"], "'speed.pdf' does not end in .png or .svg"),
        ],
    )
    def test_wrong_values(self, args, text, capsys):
        with pytest.raises(SystemExit) as caught:
            self.main(*args)
        assert caught.value.code == 2
        assert text in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("args", "text"),
        [
            (
                ["--section", "sizes", "--order", "sorted"],
                "--section chooses from the preset: not with selectors such as --order",
            ),
            (
                ["--model", "llama3-8b", "--layers", "2"],
                "--model has its own layers, kinds and page bytes; give --page-size",
            ),
            (
                ["--page-size", "16"],
                "--page-size is of a --model; without one, give --page-bytes",
            ),
            (
                ["--section", "none"],
                f"section 'none' is not one of: {', '.join(bench.SECTIONS)}",
            ),
            (
                ["--method", "fast", "--quick"],
                f"method 'fast' is not one of: {', '.join(bench.METHODS)}",
            ),
            (
                ["--compute"],
                "--compute needs a GPU: the runtime in use is the emulated one",
            ),
        ],
    )
    def test_refusals(self, on_emulated, args, text, capsys):
        assert self.main(*args) == 1
        assert capsys.readouterr().err == f"kvsig bench: {text}\n"

    def test_json_into_no_folder(self, tmp_path, capsys):
        path = tmp_path / "none" / "x.json"
        assert self.main("--quick", "--json", str(path)) == 1
        assert f"{path}: there is no folder {path.parent}" in capsys.readouterr().err

    def test_plot_without_matplotlib(self, no_matplotlib, tmp_path, capsys):
        assert self.main("--quick", "--plot", str(tmp_path / "x.svg")) == 1
        assert capsys.readouterr().err == (
            "kvsig bench: --plot needs matplotlib, which is not installed:"
            " pip install 'kvsig[plot]'\n"
        )

    def test_plot_of_the_emulated_runtime(self, on_emulated, monkeypatch, tmp_path, capsys):
        monkeypatch.setattr(command, "import_pyplot", lambda: None)
        assert self.main("--quick", "--plot", str(tmp_path / "x.png")) == 1
        assert capsys.readouterr().err == (
            "kvsig bench: --plot is of GB/s, and the emulated runtime has no speed: use a GPU\n"
        )

    def test_plot_of_compute(self, tmp_path, capsys):
        assert self.main("--compute", "--plot", str(tmp_path / "x.png")) == 1
        assert "--plot is of GB/s over page size: not with --compute" in capsys.readouterr().err

    def test_saved_result_is_shown(self, tmp_path, capsys):
        path = tmp_path / "result.json"
        bench.write_json(path, gpu_result())
        assert self.main("--from", str(path)) == 0
        out = capsys.readouterr().out
        assert "Some GPU, CUDA 13.0, driver 13.1" in out
        assert "GB/s, and auto's share of the limit" in out
        assert "at worst 0.75 of it in 4 cells" in out
        lines = [line.split() for line in out.splitlines()]
        assert ["4", "KiB", "8", "30.0", "40.0", "50.0", "60%"] in lines

    def test_what_is_no_result(self, tmp_path, capsys):
        path = tmp_path / "other.json"
        path.write_text("{}")
        assert self.main("--from", str(path)) == 1
        assert capsys.readouterr().err == (
            f"kvsig bench: {path} is not a result of kvsig bench --json\n"
        )

    @pytest.mark.skipif(
        importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed"
    )
    @pytest.mark.parametrize("suffix", ["png", "svg"])
    def test_plot(self, suffix, tmp_path):
        path = tmp_path / "result.json"
        bench.write_json(path, gpu_result())
        picture = tmp_path / f"speed.{suffix}"
        assert self.main("--from", str(path), "--plot", str(picture)) == 0
        assert picture.stat().st_size > 1000


class TestCalibrate:
    def test_refused_on_the_emulated_runtime(self, on_emulated, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert cli.main(["calibrate"]) == 1
        assert capsys.readouterr().err == (
            "kvsig calibrate: the CUDA runtime in use is the emulated one, whose times say nothing"
            " about a GPU: calibrate on a machine with a GPU, without"
            " KVSIG_CUDART=emulated:VERSION\n"
        )
        assert list(tmp_path.iterdir()) == []

    def test_table(self):
        from kvsig import calibration
        from kvsig.cli.calibrate import text_of

        cell = costs.Cell("batch", "load", 4096, 1, 256, 64)
        one = calibration.Measured(costs.Sample(cell, 200e-6, 100e-6), 5, 300.0, 210.0)
        text = text_of(costs.builtin("Some GPU"), [one])
        wanted = "load batch 4 KiB - 256 64 200.0 5.24 210.0 +5% +50%".split()
        assert wanted in [line.split() for line in text.splitlines()]
        assert one.as_dict()["us"] == 200.0


class TestScripts:
    @pytest.mark.parametrize("name", ["batch_vs_c", "explore"])
    def test_need_a_gpu(self, name):
        done = subprocess.run(
            [sys.executable, str(BENCHMARKS / f"{name}.py")],
            capture_output=True,
            text=True,
            env={"KVSIG_CUDART": "emulated:13.0", "PYTHONPATH": str(BENCHMARKS.parent)},
            check=False,
        )
        assert done.returncode == 1
        assert done.stderr == "this benchmark needs a GPU, and a real CUDA runtime\n"

    def test_the_c_compiles_and_copies(self, on_emulated, monkeypatch):
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        import baseline

        from kvsig import emulated

        c = baseline.Baseline()
        assert c.parameters == 8
        source = torch.randint(0, 255, (64, 256), dtype=torch.uint8)
        stream = emulated.Stream()
        place = np.arange(64, dtype=np.uint64) * np.uint64(256)
        sizes = np.full(64, 256, np.uint64)
        for name in ("batch", "loop", "threads"):
            target = torch.zeros_like(source)
            srcs = np.uint64(source.data_ptr()) + place
            dsts = np.uint64(target.data_ptr()) + place[::-1].copy()
            assert getattr(c, name)(dsts, srcs, sizes, [stream.cuda_stream]) > 0
            stream.synchronize()
            assert torch.equal(target, source.flip(0)), name

    def test_a_libcudart_that_times_its_copies(self, on_emulated, monkeypatch, tmp_path):
        """kvsig binds to it, all bytes arrive, and only copying functions are counted."""
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        import timed

        from kvsig import emulated

        info = _core.info()
        library = timed.Timed(tmp_path, info["runtime_version"], info["library"])
        with emulated.Stream() as stream:
            handle = stream.cuda_stream
            _core.rebind(str(library.path))
            try:
                bound = _core.info()
                assert bound["library"] == str(library.path) and not bound["emulated"]
                assert bound["runtime_version"] == info["runtime_version"]
                before = library.calls, library.us
                source = np.arange(1000, dtype=np.uint64)
                target = np.zeros_like(source)
                place = np.arange(1000, dtype=np.uint64) * np.uint64(8)
                dsts, srcs = target.ctypes.data + place, source.ctypes.data + place
                report = _core.copy_batch(dsts, srcs, 8, handle, "batch")
                kvsig.call("cudaStreamSynchronize", stream=handle)
                assert (report.calls, library.calls - before[0]) == (4, 4)
                assert library.us > before[1]
                assert np.array_equal(source, target)
            finally:
                _core.rebind(f"emulated:{info['runtime_version'] // 1000}.0")

    def test_sessions_sections(self, tmp_path):
        done = subprocess.run(
            [sys.executable, str(BENCHMARKS / "gpu_run.py"), str(tmp_path), "none"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        assert "no section none; there are: build, machine, tests" in done.stderr


@pytest.mark.gpu
class TestGpu:
    def test_quick_bench(self, tmp_path):
        cells = [
            bench.Cell(16 * KIB, 8, direction=direction, scope=scope, layout=layout)
            for direction in bench.DIRECTIONS
            for scope in bench.SCOPES
            for layout in bench.LAYOUTS
        ]
        result = bench.Bench(cells, bench.Options(runs=3)).run()
        assert result["summary"]["errors"] == []
        assert result["summary"]["verified"]
        for cell in result["cells"]:
            assert cell["methods"]["auto"]["gb_s"] > 0
            assert 0 < cell["methods"]["auto"]["share"] < 1.2

    def test_calibrate(self):
        from kvsig import calibration

        model, measured = calibration.calibrate(seconds=3)
        assert model.source == "calibrated"
        assert len(measured) == len(costs.cells())
        assert not _core.is_emulated()
