"""Every plan moves exactly the bytes of the plain list of copies."""

import os
from dataclasses import replace

import numpy as np
import pytest
from geometries import (
    DEVICE,
    H100,
    HOST,
    choose,
    cubes,
    extents,
    page_first,
    plain_bytes,
    plan,
    planned_bytes,
    random_geometry,
    random_model,
    random_pages,
    random_seams,
)

from kvsig import _core
from kvsig import emulated as emulated_runtimes
from kvsig.planning import Geometry, pieces

#: 500 random requests each; KVSIG_PLAN_SEEDS=200 makes 100,000 of them.
SEEDS = int(os.environ.get("KVSIG_PLAN_SEEDS", "8"))


class TestMovesTheSameBytes:
    @pytest.mark.parametrize("seed", range(SEEDS))
    def test_random_requests(self, seed):
        rng = np.random.default_rng(seed)
        seen = set()
        for _ in range(500):
            planes = random_geometry(rng)
            direction = str(rng.choice(["offload", "load"]))
            method = str(rng.choice(["auto", "auto", "batch", "strided", "loop"]))
            device_pages, host_pages = random_pages(rng, planes.device_pages, direction)
            seams = [random_seams(rng, planes, device) for device in (False, True)]
            batch = bool(rng.random() < 0.8)
            result = plan(
                planes, device_pages, host_pages, direction, method, random_model(rng), *seams,
                batch=batch,
            )
            seen.add(result.method)
            seen |= {"in slices"} if len(cubes(result)) else set()

            device, host = plain_bytes(planes, device_pages, host_pages)
            want_dst, want_src = (host, device) if direction == "offload" else (device, host)
            dst, src = planned_bytes(result)
            assert len(dst) == len(want_dst) == result.bytes
            # bit for bit, in memories that hold both sides whole
            to, of = (HOST, DEVICE) if direction == "offload" else (DEVICE, HOST)
            size = 1 + max(
                int((planes.host_base + planes.host_pitch * planes.host_pages).max()) - HOST,
                int((planes.device_base + planes.device_pitch * planes.device_pages).max())
                - DEVICE,
            )
            source = rng.integers(0, 256, size, dtype=np.uint8)
            memory = rng.integers(0, 256, size, dtype=np.uint8)
            want = memory.copy()
            want[want_dst - to] = source[want_src - of]
            memory[dst - to] = source[src - of]
            assert np.array_equal(memory, want)
            # and byte for byte from the same place, which equal values would hide
            by_dst, by_want = np.argsort(dst), np.argsort(want_dst)
            assert np.array_equal(dst[by_dst], want_dst[by_want])
            assert np.array_equal(src[by_dst], want_src[by_want])

            for ends, of_device in zip(seams, (False, True), strict=True):
                if ends is None:
                    continue
                ends = np.sort(ends.astype(np.int64))
                low, high = np.array(extents(result, of_device) or [(0, 0)]).T
                assert np.array_equal(
                    np.searchsorted(ends, low, "right"), np.searchsorted(ends, high, "right")
                )
            assert result.copies_in == len(device_pages) * len(planes)
            if method == "strided":
                assert len(result.dsts) == 0
            elif method != "auto":
                assert len(result.strided) == 0
                assert result.method == method
            elif not batch:
                assert "batch" not in result.method
        assert {"batch", "strided", "loop", "strided+batch", "in slices"} <= seen

    def test_random_requests_through_the_calls(self, emulated):
        """Packed piece by piece, and made by the calls themselves in real memory."""
        rng = np.random.default_rng(99)
        stream = emulated_runtimes.Stream()
        for _ in range(1000):
            planes = random_geometry(rng)
            direction = str(rng.choice(["offload", "load"]))
            method = str(rng.choice(["auto", "batch", "strided", "loop"]))
            device_pages, host_pages = random_pages(rng, planes.device_pages, direction)
            size = 1 + max(
                int((planes.host_base + planes.host_pitch * planes.host_pages).max()) - HOST,
                int((planes.device_base + planes.device_pitch * planes.device_pages).max())
                - DEVICE,
            )
            device = rng.integers(0, 256, size, dtype=np.uint8)
            host = rng.integers(0, 256, size, dtype=np.uint8)
            device_at, host_at = plain_bytes(planes, device_pages, host_pages)
            want_device, want_host = device.copy(), host.copy()
            if direction == "load":
                want_device[device_at - DEVICE] = host[host_at - HOST]
            else:
                want_host[host_at - HOST] = device[device_at - DEVICE]

            real = replace(
                planes,
                device_base=planes.device_base - np.uint64(DEVICE) + np.uint64(device.ctypes.data),
                host_base=planes.host_base - np.uint64(HOST) + np.uint64(host.ctypes.data),
            )
            seams = [random_seams(rng, real, device_side) for device_side in (False, True)]
            ready = Geometry(real, random_model(rng), *seams)
            chosen = choose(ready, device_pages, host_pages, direction, method)
            for kind, arrays in pieces(chosen):
                if kind == "strided":
                    _core.copy_strided(arrays, stream.cuda_stream)
                else:
                    _core.copy_batch(
                        *arrays, stream.cuda_stream, path=kind, batch_size=chosen.batch_size
                    )
            stream.synchronize()
            assert np.array_equal(device, want_device)
            assert np.array_equal(host, want_host)

    @pytest.mark.parametrize("method", ["auto", "batch", "strided"])
    def test_in_many_pieces(self, method):
        """More pages than a piece holds, runs and single pages mixed, both sides page-first."""
        rng = np.random.default_rng(5)
        pages = 60_000
        planes = page_first(2, 3, pages)
        parts = np.array_split(np.arange(pages), 9_000)
        device_pages = np.concatenate([parts[i] for i in rng.permutation(len(parts))])
        host_pages = np.roll(device_pages, 17)[: 3 * pages // 4]
        device_pages = device_pages[: len(host_pages)]
        ready = Geometry(planes, H100)
        chosen = choose(ready, device_pages, host_pages, "load", method)
        assert len(pieces(chosen)) > 2
        result = plan(ready, device_pages, host_pages, "load", method)
        dst, src = planned_bytes(result)
        want_dst, want_src = plain_bytes(planes, device_pages, host_pages)
        by_dst, by_want = np.argsort(dst), np.argsort(want_dst)
        assert np.array_equal(dst[by_dst], want_dst[by_want])
        assert np.array_equal(src[by_dst], want_src[by_want])

    def test_pieces_add_up_to_the_plan(self):
        rng = np.random.default_rng(3)
        ready = Geometry(page_first(4, 2048, 5000), H100)
        device_pages, host_pages = rng.permutation(5000), rng.permutation(5000)
        result = plan(ready, device_pages, host_pages, "offload", "batch")
        parts = pieces(choose(ready, device_pages, host_pages, "offload", "batch"))
        assert np.array_equal(np.concatenate([p[0] for _, p in parts]), result.dsts)
        assert np.array_equal(np.concatenate([p[1] for _, p in parts]), result.srcs)
        assert all(array.flags.c_contiguous for _, part in parts for array in part)
        assert all(array.dtype == np.uint64 for _, part in parts for array in part)
