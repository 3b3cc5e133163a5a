"""The calibration, as far as it goes without a GPU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kvsig import cli
from kvsig.cli.calibrate import text_of
from kvsig.planning import costs
from kvsig.tools import calibration, fitting

CELL = fitting.Cell("batch", "load", 4096, 1, 256, 64)


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """A GPU on which everything takes 1.5 times as long as the careful default says."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = costs.builtin("Some GPU")

    def measure(seconds):
        return "Some GPU", [
            fitting.Sample(cell, 1.5 * us, 0.5 * us)
            for cell in fitting.cells()
            for us in [fitting.predict(getattr(model, cell.direction), cell)]
        ]

    monkeypatch.setattr(calibration, "measure", measure)
    return tmp_path


class TestCommand:
    def test_says_what_changes_before_it_keeps_it(self, measured, capsys):
        assert cli.main(["calibrate"]) == 0
        out = capsys.readouterr().out
        path = costs.cache_path("Some GPU")
        assert path.is_relative_to(measured)
        kept = costs.load("Some GPU")
        assert kept.source == "calibrated"
        rows = [line.split() for line in out.splitlines()]
        old, new = costs.builtin("Some GPU").load.byte, kept.load.byte
        assert ["load", "byte", f"{old:.4g}", f"{new:.4g}"] in rows
        assert new == pytest.approx(1.5 * old, rel=0.2)
        assert out.index("predicted times are off") < out.index(f"kept in {path}")

    def test_dry_run_keeps_nothing(self, measured, capsys):
        assert cli.main(["calibrate", "--dry-run"]) == 0
        assert list(measured.iterdir()) == []
        out = " ".join(capsys.readouterr().out.split())
        assert f"nothing was kept; without --dry-run these figures go to {measured}" in out

    def test_output(self, measured, tmp_path, capsys):
        path = tmp_path / "figures.json"
        assert cli.main(["calibrate", "--output", str(path)]) == 0
        assert costs.load("Some GPU", path).source == "calibrated"
        assert not costs.cache_path("Some GPU").exists()

    def test_refused_on_the_emulated_runtime(self, emulated_runtime, tmp_path, monkeypatch, capsys):
        emulated_runtime("13.0")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert cli.main(["calibrate"]) == 1
        assert capsys.readouterr().err == (
            "kvsig calibrate: the CUDA runtime in use is the emulated one, whose times say nothing"
            " about a GPU: calibrate on a machine with a GPU, without"
            " KVSIG_CUDART=emulated:VERSION\n"
        )
        assert list(tmp_path.iterdir()) == []


def test_changes_are_the_figures_that_differ():
    before = costs.builtin("Some GPU")
    after = replace(before, load=replace(before.load, latency=8.0))
    assert calibration.changes(before, before) == []
    assert calibration.changes(before, after) == [("load", "latency", before.load.latency, 8.0)]
    assert "no figure changes" in text_of(before, before, [])


def test_predictions_before_and_after():
    before = costs.builtin("Some GPU")
    after = replace(before, load=replace(before.load, latency=before.load.latency + 100))
    (row,) = calibration.compare([fitting.Sample(CELL, 200.0, 100.0)], before, after)
    assert row["after_us"] == pytest.approx(row["before_us"] + 100)
    assert (row["method"], row["us"], row["submit_us"]) == ("batch", 200.0, 100.0)


def test_strided_cells_move_what_they_say(monkeypatch, emulated_runtime):
    """On the emulated runtime, which has memory but no times: all rows arrive where they should."""
    import torch

    from kvsig import _core, emulated

    emulated_runtime("13.0")
    monkeypatch.setattr(calibration, "SPAN", 1 << 20)
    with emulated.Stream() as stream:
        meter = object.__new__(calibration.Meter)
        meter.stream = stream
        meter.rng = np.random.default_rng(0)
        meter.near = torch.randint(0, 1 << 62, (1 << 17,))
        meter.far = torch.zeros_like(meter.near)
        for direction in ("offload", "load"):
            cell = fitting.Cell("strided", direction, 512, 4, 64, 1)
            report = meter.submitter(cell)()
            stream.synchronize()
            assert report == _core.Report("strided", None, 256, 64, 256 * 512)
        moved = meter.far.view(-1, 64)
        assert int((moved != 0).any(1).sum()) == 256
