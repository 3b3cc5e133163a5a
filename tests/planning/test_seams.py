"""Copies are cut where allocations and registered blocks meet."""

import numpy as np
import pytest
from geometries import DEVICE, H100, HOST, cubes, flat, groups, layer_first, page_first, plan


class TestSeams:
    def separate(self, layers, width, pages):
        """Bounds of layers that are allocations of their own."""
        return DEVICE + np.arange(layers + 1) * pages * width

    @pytest.mark.known_failure("strided-across-allocations")
    def test_layers_in_allocations_of_their_own_are_no_rows(self):
        width, pages, layers = 4096, 512, 40
        planes = page_first(layers, width, pages, kv=1)
        seams = self.separate(layers, width, pages)
        assert groups(planes, None, seams) == [(width, 1, 1)] * layers
        result = plan(planes, [7, 100], [5, 2], "load", "auto", H100, None, seams)
        assert result.method in ("batch", "loop") and len(result.dsts) == 80
        runs = np.arange(64)
        result = plan(planes, runs, runs, "load", "strided", H100, None, seams)
        assert flat(result)[:, 5].tolist() == [64] * layers

    def test_layers_of_one_segment_are_rows(self):
        width, pages = 4096, 512
        planes = page_first(8, width, pages, kv=1)
        seams = self.separate(8, width, pages)[[0, 3, 8]]
        assert groups(planes, None, seams) == [(width, 1, 3), (width, 1, 5)]

    @pytest.mark.parametrize("side", ["host", "device"])
    def test_pools_of_k_and_v_in_two_allocations_are_no_slices(self, side):
        width, pages, layers = 4096, 64, 8
        planes = page_first(layers, width, pages)
        seam = (HOST if side == "host" else DEVICE) + layers * pages * width
        seams = {f"{side}_seams": [seam]}
        result = plan(planes, [7], [5], "load", "strided", H100, **seams)
        assert len(cubes(result)) == 0 and flat(result)[:, 4:].tolist() == [[width, 8]] * 2
        assert groups(planes, **seams) == [(width, 1, layers)] * 2
        # nor are they two rows of one layer
        one = plan(planes.select([3]), [7], [5], "load", "strided", H100, **seams)
        assert flat(one)[:, 4:].tolist() == [[width, 1]] * 2

    def test_seam_within_a_pool_splits_only_what_meets_it(self):
        width, pages, layers = 4096, 64, 8
        planes = page_first(layers, width, pages)
        seam = HOST + 20 * layers * width
        result = plan(planes, [7, 8], [19, 20], "load", "strided", H100, [seam])
        # page 20 of K and of V lie behind the seam, page 19 of K does not
        assert cubes(result)[:, 3].tolist() == [seam]
        assert flat(result)[:, 5].tolist() == [layers] * 2

    def test_seams_beside_the_tensors_change_nothing(self):
        width, pages, layers = 4096, 64, 8
        planes = page_first(layers, width, pages)
        host = [HOST, HOST + 2 * pages * layers * width]
        device = [DEVICE - 5000, DEVICE, DEVICE + 2 * pages * layers * width]
        with_seams = plan(planes, [7], [5], "load", "strided", H100, host, device)
        without = plan(planes, [7], [5], "load", "strided", H100)
        assert cubes(with_seams).tolist() == cubes(without).tolist()

    @pytest.mark.known_failure("many-blocks")
    def test_many_seams(self):
        """Registered chunk by chunk: as quick as without seams, but for those that are met."""
        width, pages, layers = 4096, 4096, 8
        planes = page_first(layers, width, pages, kv=1)
        seams = HOST + np.arange(1, pages // 2) * 2 * layers * width
        order = np.random.default_rng(0).permutation(pages)
        result = plan(planes, order, order, "load", "strided", H100, seams)
        assert flat(result)[:, 5].tolist() == [layers] * pages

    def test_copy_is_split(self):
        planes = layer_first(1, 100, 10, kv=1)
        result = plan(planes, [2, 3], [4, 5], "load", "batch", H100, [HOST + 450, HOST + 520])
        assert result.srcs.tolist() == [HOST + 400, HOST + 450, HOST + 520]
        assert result.dsts.tolist() == [DEVICE + 200, DEVICE + 250, DEVICE + 320]
        assert result.sizes.tolist() == [50, 70, 80]

    def test_seam_between_pages_ends_a_run(self):
        planes = layer_first(1, 100, 10, kv=1)
        result = plan(planes, [2, 3], [4, 5], "load", "batch", H100, [HOST + 500])
        assert result.sizes.tolist() == [100, 100]

    def test_strided_copy_is_broken_at_the_row(self):
        planes = page_first(8, 256, 10, kv=1)
        seam = HOST + 8 * 256 * 4 + 3 * 256 + 10
        result = plan(planes, [1], [4], "load", "strided", H100, [seam])
        assert flat(result)[:, 4:].tolist() == [[256, 3], [10, 1], [246, 1], [256, 4]]
