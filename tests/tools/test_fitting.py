"""Figures read off measured copies."""

from dataclasses import fields, replace

import numpy as np
import pytest

from kvsig.planning.costs import CostModel, DirectionCosts, builtin
from kvsig.tools.fitting import Cell, Sample, cells, fit, predict

H100 = builtin("NVIDIA H100 80GB HBM3")


def host_us(costs, cell):
    """Host time that a cell should take."""
    calls = cell.calls * (costs.call_submit if cell.method == "batch" else 0)
    each = {"batch": "copy_submit", "loop": "loop_submit", "strided": "strided_submit"}
    return calls + cell.copies * getattr(costs, each[cell.method])


class TestFit:
    def test_finds_the_figures_that_made_the_samples(self):
        rng = np.random.default_rng(0)
        truth = CostModel(
            "X",
            "built in",
            replace(H100.offload, byte=1 / 24e3, strided_engine=4.5, copy_submit=0.8),
            replace(H100.load, byte=1 / 22e3, loop_engine=4.0),
        )
        samples = []
        for cell in cells():
            costs = getattr(truth, cell.direction)
            us = predict(costs, cell) * rng.normal(1, 0.005)
            samples.append(Sample(cell, us, host_us(costs, cell)))
        model = fit(samples, H100.name)
        assert model.source == "calibrated" and model.name == H100.name
        assert model.offload.byte == pytest.approx(1 / 24e3, rel=0.02)
        assert model.load.byte == pytest.approx(1 / 22e3, rel=0.02)
        for cell in cells():
            got = predict(getattr(model, cell.direction), cell)
            assert got == pytest.approx(predict(getattr(truth, cell.direction), cell), rel=0.12), (
                cell
            )

    def test_no_figure_is_negative(self):
        rng = np.random.default_rng(1)
        for _ in range(20):
            times = [10 ** rng.uniform(0, 4, 2) for _ in cells()]
            pairs = zip(cells(), times, strict=True)
            model = fit([Sample(c, *map(float, t)) for c, t in pairs], "X")
            for side in (model.load, model.offload):
                assert all(getattr(side, f.name) >= 0 for f in fields(DirectionCosts))

    def test_without_samples_nothing_changes(self):
        model = fit([], H100.name)
        assert (model.load, model.offload) == (H100.load, H100.offload)

    def test_without_batches_their_figures_stay(self):
        """Where the driver has no batches, the rest is fitted all the same."""
        samples = [
            Sample(c, 2 * predict(H100.load, c), host_us(H100.load, c))
            for c in cells()
            if c.method != "batch"
        ]
        model = fit(samples, H100.name)
        assert model.load.copy_submit == H100.load.copy_submit
        assert model.load.byte == pytest.approx(2 * H100.load.byte, rel=0.05)

    @pytest.mark.parametrize("times", [(0.0, 1.0), (1.0, float("nan")), (1.0, -1.0)])
    def test_refuses_a_time_that_is_none(self, times):
        with pytest.raises(ValueError, match="needs a time above 0"):
            Sample(cells()[0], *times)

    def test_measures_little(self):
        assert all(c.copies * c.rows * c.width <= 256 << 20 for c in cells())

    def test_unknown_method(self):
        with pytest.raises(ValueError, match="method is 'dma'"):
            predict(H100.load, Cell("dma", "load", 1, 1, 1, 1))
