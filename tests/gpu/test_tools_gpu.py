"""The tools on a real GPU: the demo, a few cells of the benchmark, the calibration."""

from __future__ import annotations

import json

import pytest
from commands import kvsig_command

from kvsig import _core
from kvsig.tools import calibration, fitting, measuring
from kvsig.tools.cells import CHOICES, Cell

pytestmark = pytest.mark.gpu


def test_demo_of_one_gib_of_llama3_8b():
    done = kvsig_command("demo", "--json", cudart=None)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = json.loads(done.stdout)["runs"]
    assert run["emulated"] is False
    assert run["bytes"] >= 1 << 30
    for direction in ("offload", "load"):
        assert run[direction]["gb_per_s"] > 0
        assert run["one_copy"][direction]["gb_per_s"] > 0


def test_bench():
    cells = [
        Cell(16384, 8, direction=direction, scope=scope, layout=layout)
        for direction in CHOICES["direction"]
        for scope in CHOICES["scope"]
        for layout in CHOICES["layout"]
    ]
    result = measuring.Bench(cells, runs=3).run()
    assert result["summary"]["errors"] == []
    assert result["summary"]["verified"]
    for cell in result["cells"]:
        assert cell["methods"]["auto"]["gb_s"] > 0
        assert 0 < cell["methods"]["auto"]["share"] < 1.2


def test_calibration():
    name, samples = calibration.measure(seconds=3)
    model = fitting.fit(samples, name)
    assert model.source == "calibrated"
    assert [one.cell for one in samples] == fitting.cells()
    assert not _core.is_emulated()
