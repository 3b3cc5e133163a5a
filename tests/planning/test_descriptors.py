"""The planner of descriptor lists, against a simulation byte by byte."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest

from kvsig.planning import costs
from kvsig.planning import descriptors as descriptors
from kvsig.planning._plan import kernel_pays


def bytes_moved(found: descriptors.Descriptors) -> dict[int, int]:
    """Return the source byte of every destination byte; nothing may be written twice."""
    moved: dict[int, int] = {}

    def copy(dst: int, src: int, size: int) -> None:
        for i in range(size):
            assert dst + i not in moved
            moved[dst + i] = src + i

    sizes = np.broadcast_to(found.sizes, found.dsts.shape)
    for dst, src, size in zip(found.dsts, found.srcs, sizes, strict=True):
        copy(int(dst), int(src), int(size))
    for dst, dpitch, drows, src, spitch, srows, width, height, depth in found.rows.tolist():
        assert depth == 1 and drows == srows == height
        assert dpitch >= width and spitch >= width
        for row in range(height):
            copy(dst + row * dpitch, src + row * spitch, width)
    return moved


def arrays(copies: list[tuple[int, int, int]]) -> list[np.ndarray]:
    columns = np.array(copies, dtype=np.uint64).reshape(-1, 3)
    return [np.ascontiguousarray(columns[:, i]) for i in range(3)]


def random_copies(rng: random.Random) -> list[tuple[int, int, int]]:
    """Stretches that run on, up or down, evenly spaced or by chance, on both sides."""
    copies: list[tuple[int, int, int]] = []
    to = 1 << 20
    for _ in range(rng.randint(1, 6)):
        count, size = rng.randint(1, 14), rng.choice((1, 4, 4, 12))
        far, near = rng.choice(((size, size), (size, 20), (24, 16), (24, 24), (30, size)))
        origin = rng.randint(1 << 10, 1 << 12)
        stretch = [(to + i * far, origin + i * near, size) for i in range(count)]
        if rng.random() < 0.3:
            stretch.reverse()
        if rng.random() < 0.3:
            rng.shuffle(stretch)
        if rng.random() < 0.2:
            stretch = [(d, s, 0 if rng.random() < 0.3 else z) for d, s, z in stretch]
        copies += stretch
        to += (count + 1) * far + rng.choice((0, 7, 40))
    return copies


@pytest.mark.parametrize("seed", range(300))
def test_plan_moves_the_same_bytes(seed: int) -> None:
    rng = random.Random(seed)
    copies = random_copies(rng)
    dsts, srcs, sizes = arrays(copies)
    seams = sorted(rng.choice(copies)[rng.randint(0, 1)] for _ in range(rng.randint(0, 4)))
    marks = np.array(seams, dtype=np.uint64)
    found = descriptors.plan(dsts, srcs, sizes, marks, rng.choice((3, 8)))
    wanted = {d + i: s + i for d, s, z in copies for i in range(z)}
    assert bytes_moved(found) == wanted
    for place, spans in seam_crossings(found, seams):
        assert spans in {(c[place], c[2]) for c in copies}, "merged across a seam"


def seam_crossings(
    found: descriptors.Descriptors, seams: list[int]
) -> list[tuple[int, tuple[int, int]]]:
    """Return the copies and rows that lie across a seam: side, start and size."""
    spans = []
    sizes = np.broadcast_to(found.sizes, found.dsts.shape)
    for side, starts in enumerate((found.dsts, found.srcs)):
        spans += [(side, int(a), int(z)) for a, z in zip(starts, sizes, strict=True)]
    for row in found.rows.tolist():
        spans.append((0, row[0], row[1] * (row[7] - 1) + row[6]))
        spans.append((1, row[3], row[4] * (row[7] - 1) + row[6]))
    return [
        (side, (start, size))
        for side, start, size in spans
        if any(start < seam < start + size for seam in seams)
    ]


@pytest.mark.parametrize("seed", range(100))
def test_split_leaves_nothing_across_a_seam(seed: int) -> None:
    rng = random.Random(seed)
    copies = random_copies(rng)
    found = descriptors.plan(*arrays(copies), min_rows=3)
    low, high = min(c[1] for c in copies), max(c[0] + c[2] for c in copies)
    seams = [rng.choice((rng.randint(low, low + 200), rng.randint(high - 200, high)))
             for _ in range(4)]  # fmt: skip
    cut = descriptors.split(found, seams)
    assert bytes_moved(cut) == bytes_moved(found)
    assert seam_crossings(cut, seams) == []


def test_a_run_is_one_copy() -> None:
    dsts = np.arange(1000, 2600, 16, dtype=np.uint64)
    for order in (slice(None), slice(None, None, -1)):
        found = descriptors.plan(dsts[order], dsts[order] + np.uint64(9000), np.full(100, 16, "u8"))
        assert (found.dsts.tolist(), found.srcs.tolist()) == ([1000], [10000])
        assert np.asarray(found.sizes).tolist() == [1600] and len(found.rows) == 0


def test_even_spacing_is_one_strided_copy_with_a_pitch_of_its_own_on_each_side() -> None:
    steps = np.arange(20, dtype=np.uint64)
    found = descriptors.plan(steps * np.uint64(64) + 4096, steps * np.uint64(48) + 8192,
                             np.full(20, 32, "u8"))  # fmt: skip
    assert found.rows.tolist() == [[4096, 64, 20, 8192, 48, 20, 32, 20, 1]]
    assert len(found.dsts) == 0


def test_a_pitch_that_cuda_cannot_count_stays_a_list() -> None:
    steps = np.arange(20, dtype=np.uint64)
    found = descriptors.plan(steps << np.uint64(31), steps * np.uint64(48) + 8192,
                             np.full(20, 32, "u8"))  # fmt: skip
    assert len(found.rows) == 0 and len(found.dsts) == 20


@pytest.mark.parametrize("seed", range(100))
def test_patterns_of_pages_move_the_bytes_of_each_page(seed: int) -> None:
    rng = random.Random(seed)
    src: list[int] = []
    while len(src) < 30:
        first = rng.randint(0, 80)
        src += range(first, first + rng.randint(1, 12))
    dst = list(range(len(src)))
    if rng.random() < 0.5:
        cut = rng.randint(0, len(dst))
        dst = dst[cut:] + dst[:cut]
    width = rng.choice((3, 8))
    far, near = rng.choice((width, width + 5)), rng.choice((width, 2 * width))
    runs = descriptors.page_runs(np.array(dst, dtype="u8"), np.array(src, dtype="u8"))
    assert runs.top == (max(dst), max(src)) and runs.pages == len(dst)
    found = descriptors.place(
        descriptors.pattern(runs, far, near, width, min_rows=4),
        np.array([10_000, 50_000], dtype="u8"), np.array([1_000, 5_000], dtype="u8"),
    )  # fmt: skip
    wanted = {
        to + d * far + i: at + s * near + i
        for to, at in ((10_000, 1_000), (50_000, 5_000))
        for d, s in zip(dst, src, strict=True)
        for i in range(width)
    }
    assert bytes_moved(found) == wanted


def test_planning_takes_no_more_than_thirty_nanoseconds_a_descriptor() -> None:
    rng = np.random.default_rng(0)
    count = 8192
    pages = rng.permutation(count).astype(np.uint64)
    sizes = np.full(count, 4096, dtype=np.uint64)
    for src in (pages, np.arange(count, dtype=np.uint64)):
        dsts, srcs = pages * np.uint64(8192) + 4096, src * np.uint64(4096) + (1 << 40)
        best = min(_seconds(dsts, srcs, sizes) for _ in range(15))
        assert best / count < 60e-9  # twice the target: the machine is not ours alone


def _seconds(dsts: np.ndarray, srcs: np.ndarray, sizes: np.ndarray) -> float:
    start = time.perf_counter()
    descriptors.plan(dsts, srcs, sizes)
    return time.perf_counter() - start


class TestPageLists:
    """Copies as page numbers, for the page-copy kernel."""

    @pytest.mark.parametrize("seed", range(60))
    def test_are_the_same_copies(self, seed: int) -> None:
        rng = random.Random(seed)
        grain = 1 << rng.randint(0, 5)
        starts = [rng.randint(1, 1 << 40) for _ in "ds"]
        sizes = [rng.choice((0, 1, 12, 512, 4096)) for _ in range(rng.randint(1, 40))]
        copies = [
            (*(start + rng.randrange(1 << 20) * grain for start in starts), size) for size in sizes
        ]
        dsts, srcs, widths = arrays(copies)
        found = descriptors.page_lists(
            list(zip((dsts, srcs), starts, strict=True)), widths, grain
        )
        assert found is not None
        got = [
            (*(start + n * grain for n, start in zip(pair, starts, strict=True)), pages.size)
            for pages in found
            for pair in zip(*(side.tolist() for side in pages.pages), strict=True)
        ]
        assert sorted(got) == sorted(copy for copy in copies if copy[2])
        assert len(found) == len(set(sizes) - {0})

    @pytest.mark.parametrize(
        "copies",
        [
            [(1000, 2000, 8), (1001, 2008, 8)],  # between two multiples
            [(1000, 1992, 8)],  # before the stretch
            [(1000 + (1 << 35), 2000, 8)],  # number too large
            [(1000 + 16 * i, 2000 + 16 * i, i + 1) for i in range(5)],  # of five sizes
        ],
    )
    def test_what_is_none(self, copies: list[tuple[int, int, int]]) -> None:
        dsts, srcs, sizes = arrays(copies)
        assert descriptors.page_lists([(dsts, 1000), (srcs, 2000)], sizes, 8) is None


class TestKernelPays:
    """The rule by which copies that are known are left to copy engines, or given to the kernel."""

    COSTS = costs.builtin("NVIDIA H100").load

    @pytest.mark.parametrize(("width", "kernel"), [(256, 1), (4096, 1), (16384, 1), (65536, 0)])
    def test_small_pages_and_large_ones(self, width: int, kernel: int) -> None:
        assert kernel_pays(self.COSTS, 4, 400, 0, 0, 400 * width, 400) is bool(kernel)

    def test_few_pages(self) -> None:
        assert not kernel_pays(self.COSTS, 4, 2, 0, 0, 2 * 4096, 2)

    def test_neighbours_that_have_become_few_copies(self) -> None:
        assert not kernel_pays(self.COSTS, 4, 4, 0, 0, 400 * 4096, 400)

    def test_rows_of_strided_copies(self) -> None:
        assert not kernel_pays(self.COSTS, 4, 0, 2, 400, 400 * 4096, 400)

    def test_one_multiprocessor_is_slower_than_copy_engines_sooner(self) -> None:
        assert not kernel_pays(self.COSTS, 1, 400, 0, 0, 400 * 16384, 400)
