"""What a plan makes of neighbours, runs, and layers that are evenly spaced."""

import numpy as np
import pytest
from geometries import (
    DEVICE,
    H100,
    HOST,
    choose,
    cubes,
    flat,
    groups,
    layer_first,
    page_first,
    plan,
    planes_of,
)

from kvsig.planning import Geometry, pieces


class TestFindsStructure:
    @pytest.mark.known_failure("unmerged-runs")
    def test_neighbours_on_both_sides_are_one_copy(self):
        planes = layer_first(2, 4096, 64, kv=1)
        result = plan(planes, [3, 4, 5, 6, 20], [40, 41, 42, 43, 9], "load", "batch", H100)
        assert result.copies_in == 10
        assert sorted(result.sizes.tolist()) == [4096] * 2 + [4 * 4096] * 2
        assert result.dsts[0] == DEVICE + 3 * 4096 and result.srcs[0] == HOST + 40 * 4096

    @pytest.mark.known_failure("unmerged-runs")
    def test_neighbours_downwards_too(self):
        planes = layer_first(1, 4096, 64, kv=1)
        result = plan(planes, [9, 8, 7], [33, 32, 31], "offload", "batch", H100)
        assert result.sizes.tolist() == [3 * 4096]
        assert result.srcs.tolist() == [DEVICE + 7 * 4096]
        assert result.dsts.tolist() == [HOST + 31 * 4096]

    def test_up_on_one_side_and_down_on_the_other_is_no_run(self):
        planes = layer_first(1, 4096, 64, kv=1)
        result = plan(planes, [7, 8, 9], [33, 32, 31], "offload", "batch", H100)
        assert result.sizes.tolist() == [4096] * 3

    def test_all_layers_of_a_page_are_one_strided_copy(self):
        width, pages, layers = 4096, 512, 40
        result = plan(page_first(layers, width, pages), [7, 100], [5, 2], "load", model=H100)
        assert result.method == "strided"
        page, pitch = layers * width, pages * width
        # K and V are two slices; from one to the other are as many rows as there are layers on
        # the device, and as many as there are layers of all pages on the host.
        slices = [width, layers, 2]
        assert cubes(result).tolist() == [
            [DEVICE + d * width, pitch, layers, HOST + h * page, width, pages * layers, *slices]
            for d, h in ((7, 5), (100, 2))
        ]
        assert len(flat(result)) == len(result.dsts) == 0
        assert (result.calls, result.rows, result.copies_in) == (2, 160, 160)
        back = plan(page_first(layers, width, pages), [7], [5], "offload", model=H100)
        assert cubes(back).tolist() == [
            [HOST + 5 * page, width, pages * layers, DEVICE + 7 * width, pitch, layers, *slices]
        ]

    def test_all_layers_of_one_pool_are_one_strided_copy(self):
        width, pages, layers = 4096, 512, 40
        result = plan(page_first(layers, width, pages, kv=1), [7, 100], [5, 2], "load", model=H100)
        assert result.method == "strided"
        assert flat(result).tolist() == [
            [DEVICE + d * width, pages * width, HOST + h * layers * width, width, width, layers]
            for d, h in ((7, 5), (100, 2))
        ]

    @pytest.mark.parametrize("gap", [1, 4096])
    def test_pools_at_a_distance_of_no_whole_number_of_rows(self, gap):
        """The distance from slice to slice is a number of rows: others take a copy each."""
        width, pages, layers = 4096, 64, 40
        planes = page_first(layers, width, pages)
        planes.host_base[layers:] += np.uint64(gap)
        result = plan(planes, [7, 9], [5, 2], "load", "strided", H100)
        assert len(flat(result)) == (4 if gap == 1 else 0)
        assert len(cubes(result)) == (0 if gap == 1 else 2)
        planes.device_base[layers:] += np.uint64(gap)
        result = plan(planes, [7, 9], [5, 2], "load", "strided", H100)
        assert len(flat(result)) == 4 and len(cubes(result)) == 0

    def test_k_and_v_the_other_way_round(self):
        width, pages, layers = 64, 10, 3
        planes = page_first(layers, width, pages)
        swapped = planes_of(
            np.roll(planes.device_base, layers), width, np.roll(planes.host_base, layers),
            layers * width, width, pages, layers,
        )
        result = plan(swapped, [4], [6], "load", "strided", H100)
        other = plan(planes, [4], [6], "load", "strided", H100)
        assert cubes(result).tolist() == cubes(other).tolist()
        # K in front of V on one side only: no slices
        planes.host_base[:] = np.roll(planes.host_base, layers)
        assert len(plan(planes, [4], [6], "load", "strided", H100).strided) == 2

    def test_run_of_one_layer_of_k_and_v_is_one_copy(self):
        """Rows are the pages; K and V are the slices."""
        width, layers, pages = 2048, 8, 500
        planes = page_first(layers, width, pages).select([2])
        run = np.arange(100, 164)
        result = plan(planes, run, run - 50, "load", model=H100)
        assert cubes(result).tolist() == [
            [DEVICE + (2 * pages + 100) * width, width, layers * pages,
             HOST + (50 * layers + 2) * width, layers * width, pages, width, 64, 2]
        ]
        assert result.calls == 1 and result.method == "strided"

    def test_evenly_spaced_in_parts(self):
        """A caching allocator may put some layers elsewhere."""
        device = [DEVICE + i * 10_000 for i in (0, 1, 2, 3, 50, 51, 52, 9)]
        planes = planes_of(device, 100, [HOST + i * 100 for i in range(8)], 800, 100, 10)
        assert groups(planes) == [(100, 1, 4), (100, 1, 3), (100, 1, 1)]

    def test_layers_out_of_order_in_memory(self):
        order = [3, 1, 0, 2]
        planes = planes_of(
            [DEVICE + i * 10_000 for i in order], 100, [HOST + i * 100 for i in order], 400, 100, 10
        )
        assert groups(planes) == [(100, 1, 4)]

    def test_reversed_on_both_sides_is_one_group(self):
        planes = planes_of(
            [DEVICE + i * 10_000 for i in (2, 1, 0)], 100,
            [HOST + i * 100 for i in (2, 1, 0)], 300, 100, 10,
        )
        result = plan(planes, [4], [6], "load", "strided", H100)
        assert flat(result).tolist() == [[DEVICE + 400, 10_000, HOST + 1800, 100, 100, 3]]

    def test_opposite_orders_are_no_group(self):
        planes = planes_of(
            [DEVICE + i * 10_000 for i in range(3)], 100,
            [HOST + i * 100 for i in (2, 1, 0)], 300, 100, 10,
        )
        assert groups(planes) == [(100, 1, 1)] * 3

    def test_pitch_beyond_the_limit_is_no_group(self):
        near = planes_of([DEVICE, DEVICE + 2**31 - 1], 64, [HOST, HOST + 64], 128, 64, 10)
        far = planes_of([DEVICE, DEVICE + 2**31], 64, [HOST, HOST + 64], 128, 64, 10)
        assert groups(near) == [(64, 1, 2)]
        assert groups(far) == [(64, 1, 1)] * 2

    def test_k_and_v_of_one_layer_are_two_rows(self):
        planes = page_first(8, 256, 100).select([3])
        result = plan(planes, [5], [6], "offload", "strided", H100)
        assert flat(result)[:, 4:].tolist() == [[256, 2]]

    def test_run_of_one_layer_is_strided(self):
        """Neighbouring pages of a layer: rows whose host pitch is the whole page."""
        width, layers = 2048, 8
        planes = page_first(layers, width, 500, kv=1).select([2])
        pages = np.arange(100, 164)
        result = plan(planes, pages, pages - 50, "load", model=H100)
        assert flat(result).tolist() == [
            [DEVICE + 1100 * width, width, HOST + (50 * layers + 2) * width, layers * width,
             width, 64]
        ]

    def test_run_with_steps_is_strided(self):
        planes = layer_first(1, 2048, 500, kv=1)
        result = plan(planes, np.arange(90, 0, -3), np.arange(180, 120, -2), "load", model=H100)
        assert flat(result).tolist() == [
            [DEVICE + 3 * 2048, 3 * 2048, HOST + 122 * 2048, 2 * 2048, 2048, 30]
        ]

    @pytest.mark.known_failure("pitch-limit")
    @pytest.mark.parametrize(("device_pitch", "host_pitch"), [(2**30, 2048), (2048, 2**30)])
    def test_step_beyond_the_pitch_limit_is_no_run(self, device_pitch, host_pitch):
        planes = planes_of([DEVICE], device_pitch, [HOST], host_pitch, 2048, 500)
        near, far = np.arange(90), np.arange(0, 90, 3)
        assert len(plan(planes, near, near, "load", "strided", H100).strided) == 1
        result = plan(planes, far, far, "load", "strided", H100)
        assert flat(result)[:, 5].tolist() == [1] * 30

    def test_run_right_after_a_run_of_no_use(self):
        """Five pages two apart cannot be merged; the last of them begins a run that can."""
        pages = np.concatenate([np.arange(0, 8, 2), np.arange(8, 41)])
        result = plan(layer_first(1, 512, 64, kv=1), pages, pages, "load", "batch", H100)
        assert result.sizes.tolist() == [512] * 4 + [33 * 512]

    def test_merged_run_wider_than_the_distance_of_layers(self):
        """Sources may overlap; a strided copy may not be wider than its pitch."""
        width, layers = 64, 40
        planes = planes_of(
            [DEVICE + i * 100 * width for i in range(layers)], width,
            [HOST + i * 2 * width for i in range(layers)], width, width, 100,
        )
        short = plan(planes, [4, 5], [7, 8], "load", model=H100)
        assert flat(short)[:, 4:].tolist() == [[2 * width, layers]]
        long = plan(planes, [4, 5, 6], [7, 8, 9], "load", "strided", H100)
        assert flat(long)[:, 4:].tolist() == [[3 * width, 1]] * layers

    def test_planes_side_by_side_on_both_sides_are_one(self):
        """Page-first on both sides: the page is one copy, and so is a run of them."""
        planes = planes_of(
            [DEVICE + i * 100 for i in range(4)], 400, [HOST + i * 100 for i in range(4)], 400,
            100, 10,
        )
        result = plan(planes, [1, 2, 7], [4, 5, 0], "load", "batch", H100)
        assert result.copies_in == 12 and result.sizes.tolist() == [800, 400]

    def test_merged_run_of_many_layers_is_strided_over_layers(self):
        planes = layer_first(64, 512, 100)
        result = plan(planes, np.arange(4), np.arange(8, 12), "load", model=H100)
        assert flat(result)[:, 4:].tolist() == [[4 * 512, 128]]

    def test_mixture(self):
        """Evenly spaced layers are strided, the one that lies elsewhere goes into the batch."""
        device = [DEVICE + i * 10**6 for i in range(32)] + [DEVICE + 123_456_789]
        planes = planes_of(device, 4096, [HOST + i * 4096 for i in range(33)], 33 * 4096, 4096, 200)
        rng = np.random.default_rng(0)
        ready = Geometry(planes, H100)
        device, host = rng.permutation(200), rng.permutation(200)
        result = plan(ready, device, host, "load")
        assert result.method == "strided+batch"
        assert len(result.dsts) == 200 and flat(result)[:, 5].tolist() == [32] * 200
        found = pieces(choose(ready, device, host, "load"))
        assert [kind for kind, _ in found] == ["strided", "batch"]
