"""copy_batch: bytes between addresses, and what it refuses to touch."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import kvsig
from kvsig import _core, emulated


class Memory:
    """Two buffers of random bytes with slots of one size, and what has to become of them."""

    def __init__(self, slots=64, width=96, seed=0):
        rng = np.random.default_rng(seed)
        self.src = rng.integers(0, 256, (slots, width), dtype=np.uint8)
        self.dst = rng.integers(0, 256, (slots, width), dtype=np.uint8)
        self.want = self.dst.copy()
        self.before = self.src.copy()

    def request(self, to, origin, sizes):
        """Addresses of slots, and the bytes that the copies have to leave."""
        for d, s, n in zip(to, origin, np.broadcast_to(sizes, len(to)), strict=True):
            self.want[d, :n] = self.src[s, :n]
        width = self.src.shape[1]
        dsts = self.dst.ctypes.data + np.asarray(to, dtype=np.int64) * width
        srcs = self.src.ctypes.data + np.asarray(origin, dtype=np.int64) * width
        return dsts, srcs

    def check(self):
        assert np.array_equal(self.dst, self.want)
        assert np.array_equal(self.src, self.before)


FORMS = {
    "int64": lambda a: np.asarray(a, dtype=np.int64),
    "uint64": lambda a: np.asarray(a, dtype=np.uint64),
    "big-endian": lambda a: np.asarray(a, dtype=">i8"),
    "every other": lambda a: np.repeat(np.asarray(a, dtype=np.int64), 2)[::2],
    "list": lambda a: [int(x) for x in a],
    "torch int64": lambda a: torch.tensor(np.asarray(a, dtype=np.int64)),
    "torch uint64": lambda a: torch.tensor(np.asarray(a, dtype=np.int64)).view(torch.uint64),
}


class TestMovesBytes:
    @pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
    def test_of_every_form(self, stream, form):
        memory = Memory()
        rng = np.random.default_rng(1)
        to, origin = rng.permutation(64)[:40], rng.integers(0, 64, 40)
        sizes = rng.integers(1, 97, 40)
        dsts, srcs = memory.request(to, origin, sizes)
        report = kvsig.copy_batch(form(dsts), form(srcs), form(sizes), stream)
        stream.synchronize()
        memory.check()
        assert (report.copies, report.bytes) == (40, sizes.sum())

    @pytest.mark.parametrize("size", [96, np.int32(96), np.uint64(1)])
    def test_of_one_size(self, stream, size):
        memory = Memory()
        dsts, srcs = memory.request(range(64), range(63, -1, -1), size)
        report = kvsig.copy_batch(dsts, srcs, size, stream)
        stream.synchronize()
        memory.check()
        assert (report.copies, report.bytes) == (64, 64 * int(size))

    def test_on_the_current_stream(self, runtime):
        memory = Memory()
        dsts, srcs = memory.request([3, 4], [9, 9], 96)
        report = kvsig.copy_batch(dsts, srcs, 96)
        assert report.path == ("loop" if runtime == "12.6" else "batch")
        kvsig.call("cudaStreamSynchronize", stream=0)
        memory.check()

    def test_on_a_handle(self, stream):
        memory = Memory()
        dsts, srcs = memory.request([3, 4], [9, 9], 96)
        kvsig.copy_batch(dsts, srcs, 96, stream.cuda_stream)
        stream.synchronize()
        memory.check()

    def test_by_the_path_asked_for(self, runtime, stream):
        for path in ("loop", "auto") if runtime == "12.6" else ("loop", "auto", "batch"):
            memory = Memory()
            dsts, srcs = memory.request(range(10), range(10), 96)
            report = kvsig.copy_batch(dsts, srcs, 96, stream, path=path)
            stream.synchronize()
            memory.check()
            best = "loop" if runtime == "12.6" else "batch"
            assert report.path == (best if path == "auto" else path)

    @pytest.mark.parametrize(("size", "calls"), [(4, 3), (10, 1), (1 << 70, 1)])
    def test_in_calls_of_batch_size(self, runtime, stream, size, calls):
        memory = Memory()
        dsts, srcs = memory.request(range(10), range(10), 96)
        report = kvsig.copy_batch(dsts, srcs, 96, stream, batch_size=size)
        stream.synchronize()
        memory.check()
        assert report.calls == (10 if runtime == "12.6" else calls)


class TestStreamOrder:
    def test_nothing_moves_before_its_turn(self, stream):
        memory = Memory()
        before = memory.dst.copy()
        dsts, srcs = memory.request([3, 4], [9, 9], 96)
        stream.hold()
        kvsig.copy_batch(dsts, srcs, 96, stream)
        assert np.array_equal(memory.dst, before)
        stream.release()
        stream.synchronize()
        memory.check()

    def test_one_transfer_behind_the_other(self, stream):
        memory = Memory()
        first, second = memory.request([3], [9], 96), memory.request([3], [5], 96)
        stream.hold()
        for path, (dsts, srcs) in (("auto", first), ("loop", second)):
            kvsig.copy_batch(dsts, srcs, 96, stream, path=path)
        stream.release()
        stream.synchronize()
        memory.check()


class TestNothingToMove:
    @pytest.mark.parametrize(
        "empty",
        [[], (), np.array([]), np.array([], np.int64), torch.tensor([]), torch.arange(0)],
        ids=repr,
    )
    def test_no_copies(self, stream, empty):
        report = kvsig.copy_batch(empty, empty, empty, stream)
        assert (report.path, report.copies, report.calls, report.bytes) == ("none", 0, 0, 0)

    @pytest.mark.known_failure("empty-entries")
    def test_empty_entries_are_left_out(self, stream):
        memory = Memory()
        sizes = [0, 96, 0, 5, 0]
        dsts, srcs = memory.request([7, 1, 1, 2, 2], [0, 1, 2, 3, 4], sizes)
        dsts[0] = srcs[4] = 0  # not even a null address matters
        report = kvsig.copy_batch(dsts, srcs, sizes, stream)
        stream.synchronize()
        memory.check()
        assert (report.copies, report.bytes) == (2, 101)

    def test_size_zero_for_all(self, stream):
        report = kvsig.copy_batch([1, 2], [3, 4], 0, stream)
        assert (report.path, report.copies) == ("none", 0)


def refused(error, text, *args, **options):
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        kvsig.copy_batch(*args, **options)


class TestRefuses:
    @pytest.fixture(autouse=True)
    def bound(self, runtime):
        pass

    def test_different_lengths(self):
        text = "dsts has 2 addresses and srcs has 3: give as many of each"
        refused(ValueError, text, [16, 32], [48, 64, 80], 16)
        text = "sizes has 1 entries and dsts has 2: give as many of each, or one int for all"
        refused(ValueError, text, [16, 32], [48, 64], [16])

    @pytest.mark.known_failure("null-entries")
    def test_null_addresses(self):
        refused(ValueError, "dsts[1] is null (address 0)", [16, 0], [48, 64], 16)
        refused(ValueError, "srcs[0] is null (address 0)", [16, 32], [0, 64], 16)

    def test_null_addresses_among_empty_entries(self):
        refused(ValueError, "srcs[2] is null (address 0)", [0, 16, 32], [0, 64, 0], [0, 8, 8])

    def test_negative_values(self):
        refused(ValueError, "dsts[1] is negative: -32", [16, -32], [48, 64], 16)
        refused(ValueError, "srcs[0] is negative: -1", [16, 32], np.array([-1, 64]), 16)
        refused(ValueError, "sizes[1] is negative: -5", [16, 32], [48, 64], [4, -5])
        refused(ValueError, "sizes is -5: a size is at least 0 and below 2**63", [16], [48], -5)

    def test_addresses_beyond_every_machine(self):
        high = np.array([16, 1 << 63], dtype=np.uint64)
        refused(ValueError, f"dsts[1] is not below 2**63: {1 << 63}", high, [48, 64], 16)

    def test_other_types(self):
        text = "{} must hold int64 or uint64, not {}"
        refused(TypeError, text.format("dsts", "float64"), [16.0], [48], 16)
        refused(TypeError, text.format("srcs", "int32"), [16], np.array([48], np.int32), 16)
        refused(TypeError, text.format("sizes", "bool"), [16], [48], [True])
        refused(TypeError, text.format("sizes", "bool"), [16], [48], True)
        text = "dsts must hold integers, not torch.float32"
        refused(TypeError, text, torch.zeros(1), [48], 16)

    def test_other_shapes(self):
        text = "dsts must be one-dimensional, not of shape (1, 2)"
        refused(ValueError, text, np.array([[16, 32]]), [48, 64], 16)
        refused(ValueError, "srcs must be one-dimensional, not of shape ()", [16], 48, 16)

    @pytest.mark.parametrize("wrong", ["dsts", "srcs"])
    def test_tensors_in_the_place_of_addresses(self, wrong):
        tensor = torch.zeros(8)
        lists = {"dsts": [tensor.data_ptr()], "srcs": [tensor.data_ptr()], wrong: [tensor]}
        text = f"{wrong} holds tensors: give their addresses, as t.data_ptr() does"
        refused(TypeError, text, lists["dsts"], lists["srcs"], 4)

    def test_tensors_elsewhere(self):
        text = "dsts is on meta: addresses are read on the CPU, pass dsts.cpu()"
        refused(TypeError, text, torch.zeros(1, dtype=torch.int64, device="meta"), [48], 16)

    def test_unknown_paths(self):
        text = "path must be 'auto', 'batch' or 'loop', not 'strided'"
        refused(ValueError, text, [16], [48], 16, path="strided")

    def test_bad_batch_sizes(self):
        for bad in (0, 2.0, True):
            text = f"batch_size must be an int of at least 1, not {bad!r}"
            refused(ValueError, text, [16], [48], 16, batch_size=bad)

    def test_things_that_are_no_streams(self):
        text = (
            "stream must be None, a handle (int), a torch.cuda.Stream or an object with "
            "cuda_stream, not {}"
        )
        refused(TypeError, text.format("str"), [16], [48], 16, "default")
        refused(TypeError, text.format("bool"), [16], [48], 16, True)
        refused(TypeError, text.format("torch.cpu.Stream"), [16], [48], 16, torch.cpu.Stream())
        text = "stream handle -1 is not an address: give the cudaStream_t as it is"
        refused(ValueError, text, [16], [48], 16, -1)

    @pytest.mark.skipif(torch.backends.cuda.is_built(), reason="this torch is built with CUDA")
    def test_no_stream_where_torch_has_none(self, monkeypatch):
        monkeypatch.setattr(_core, "is_emulated", lambda: False)
        text = (
            f"torch {torch.__version__} is built without CUDA and has no current stream: "
            "give a stream"
        )
        refused(ValueError, text, [16], [48], 16)

    def test_the_batch_path_where_it_cannot_be(self):
        _core.rebind("emulated:12.6")
        stream = emulated.Stream()
        memory = Memory()
        before = memory.dst.copy()
        dsts, srcs = memory.request([1], [2], 96)
        with pytest.raises(kvsig.BindError, match="^path='batch' is not possible: .*12.8"):
            kvsig.copy_batch(dsts, srcs, 96, stream, path="batch")
        stream.synchronize()
        assert np.array_equal(memory.dst, before)


class TestOverlap:
    """Copies of a batch have no order, so none may write what another one touches."""

    tail = ": copies of one batch have no order among themselves"

    @pytest.fixture(autouse=True)
    def bound(self, runtime):
        pass

    @pytest.mark.known_failure("overlaps")
    def test_of_destinations_of_one_size(self):
        text = "dsts[1] (0x1018, 16 bytes) overlaps dsts[2] (0x1010, 16 bytes)" + self.tail
        refused(ValueError, text, [0x2000, 0x1018, 0x1010], [0x8000, 0x8100, 0x8200], 16)

    def test_of_the_same_destination_twice(self):
        text = "dsts[0] (0x1000, 8 bytes) overlaps dsts[3] (0x1000, 8 bytes)" + self.tail
        refused(ValueError, text, [0x1000, 0x2000, 0x3000, 0x1000], [0x8000] * 4, 8)

    def test_of_destinations_of_many_sizes(self):
        text = "dsts[0] (0x1000, 4096 bytes) overlaps dsts[3] (0x1fff, 1 bytes)" + self.tail
        sizes = [0x1000, 0, 16, 1]
        refused(ValueError, text, [0x1000, 0x1800, 0x9000, 0x1FFF], [0x8000] * 4, sizes)

    def test_of_a_source_with_a_destination(self):
        text = "dsts[0] (0x1000, 16 bytes) overlaps srcs[1] (0x1008, 16 bytes)" + self.tail
        refused(ValueError, text, [0x1000, 0x2000], [0x8000, 0x1008], 16)
        text = "dsts[1] (0x2000, 32 bytes) overlaps srcs[0] (0x1fff, 2 bytes)" + self.tail
        refused(ValueError, text, [0x1000, 0x2000], [0x1FFF, 0x8000], [2, 32])

    def test_of_a_copy_onto_itself(self):
        text = "dsts[0] (0x1000, 16 bytes) overlaps srcs[0] (0x1000, 16 bytes)" + self.tail
        refused(ValueError, text, [0x1000], [0x1000], 16)

    @pytest.mark.known_failure("overlaps")
    def test_agrees_with_looking_at_every_pair(self, monkeypatch):
        from kvsig import copies

        monkeypatch.setattr(copies._core, "copy_batch", lambda *args: kvsig.Report())
        rng = np.random.default_rng(7)
        outcomes = set()
        for case in range(3000):
            n = int(rng.integers(1, 6))
            spread = int(rng.choice([40, 100, 400]))
            dsts, srcs = rng.integers(1, spread, (2, n))
            sizes = rng.integers(0, 12, n) if case % 2 else np.full(n, rng.integers(0, 12))
            reads = [range(s, s + k) for s, k in zip(srcs, sizes, strict=True)]
            writes = [range(d, d + k) for d, k in zip(dsts, sizes, strict=True)]
            clash = any(
                set(writes[i]) & (set(reads[j]) | (set(writes[j]) if i != j else set()))
                for i in range(n)
                for j in range(n)
            )
            try:
                kvsig.copy_batch(dsts, srcs, sizes)
            except ValueError as error:
                assert clash, (dsts, srcs, sizes, error)
                one, side, other = re.match(
                    r"dsts\[(\d+)\].* overlaps (dsts|srcs)\[(\d+)\]", str(error)
                ).groups()
                against = writes if side == "dsts" else reads
                assert set(writes[int(one)]) & set(against[int(other)]), (dsts, srcs, sizes, error)
            else:
                assert not clash, (dsts, srcs, sizes)
            outcomes.add(clash)
        assert outcomes == {True, False}

    def test_is_not_seen_in_neighbours(self, stream):
        memory = Memory(slots=8)
        buffer = memory.dst
        base, width = buffer.ctypes.data, buffer.shape[1]
        memory.want[[0, 2, 4, 6]] = memory.want[[1, 3, 5, 7]]
        even = base + np.arange(0, 8, 2) * width
        kvsig.copy_batch(even, even + width, width, stream)
        stream.synchronize()
        memory.check()

    def test_is_not_seen_in_sources_read_twice(self, stream):
        memory = Memory()
        dsts, srcs = memory.request([1, 2, 3], [5, 5, 5], 96)
        kvsig.copy_batch(dsts, srcs, 96, stream)
        stream.synchronize()
        memory.check()

    def test_is_not_looked_for_without_check(self, stream):
        memory = Memory()
        dsts, srcs = memory.request([1, 1], [5, 5], 96)
        kvsig.copy_batch(dsts, srcs, 96, stream, check=False)
        stream.synchronize()
        memory.check()


class TestMerging:
    """Neighbours become one copy and even steps strided ones, where there are many."""

    def request(self, rows, width, pitch, order=None):
        src = np.random.default_rng(3).integers(0, 256, (rows, pitch), dtype=np.uint8)
        dst = np.zeros((rows, pitch), dtype=np.uint8)
        index = np.arange(rows) if order is None else order
        want = np.zeros_like(dst)
        want[index, :width] = src[index, :width]
        to, origin = (a.ctypes.data + index * pitch for a in (dst, src))
        return src, dst, want, (to, origin, np.full(rows, width))

    @pytest.mark.parametrize("listed", [True, False])
    @pytest.mark.parametrize("descending", [True, False])
    def test_neighbours_are_one_copy(self, stream, listed, descending):
        order = np.arange(300)[::-1].copy() if descending else None
        _, dst, want, (to, origin, sizes) = self.request(300, 64, 64, order)
        report = kvsig.copy_batch(to, origin, sizes if listed else 64, stream)
        stream.synchronize()
        assert (dst == want).all()
        assert (report.copies, report.calls, report.bytes) == (1, 1, 300 * 64)

    def test_even_steps_are_strided(self, stream):
        _, dst, want, (to, origin, sizes) = self.request(400, 64, 96)
        report = kvsig.copy_batch(to, origin, sizes, stream)
        stream.synchronize()
        assert (dst == want).all()
        assert (report.path, report.calls, report.bytes) == ("strided", 1, 400 * 64)

    def test_a_seam_is_not_crossed(self, stream, runtime):
        control = emulated.Control(_core.info()["library"])
        src, dst, want, (to, origin, sizes) = self.request(300, 64, 64)
        for first, last in ((0, 100), (100, 300)):
            control.mark_host(src[first:].ctypes.data, (last - first) * 64)
        control.mark_device(dst.ctypes.data, dst.nbytes)
        report = kvsig.copy_batch(to, origin, sizes, stream)
        stream.synchronize()
        control.reset()
        assert (dst == want).all()
        assert report.copies == 2

    @pytest.mark.parametrize(
        "options", [{"merge": False}, {"path": "loop"}], ids=["merge=False", "loop"]
    )
    def test_can_be_turned_off(self, stream, options):
        _, dst, want, (to, origin, sizes) = self.request(300, 64, 64)
        assert kvsig.copy_batch(to, origin, sizes, stream, **options).copies == 300
        stream.synchronize()
        assert (dst == want).all()

    def test_few_copies_and_scattered_ones_are_left_alone(self, stream):
        *_, arguments = self.request(200, 64, 64)
        assert kvsig.copy_batch(*arguments, stream).copies == 200
        stream.synchronize()
        order = np.random.default_rng(1).permutation(300)
        _, dst, want, arguments = self.request(300, 64, 64, order)
        assert kvsig.copy_batch(*arguments, stream).copies == 300
        stream.synchronize()
        assert (dst == want).all()

    def test_an_error_says_that_copies_were_merged(self, stream):
        control = emulated.Control(_core.info()["library"])
        *_, arguments = self.request(300, 64, 96)
        control.fault("cudaMemcpy3DAsync", 1)
        with pytest.raises(kvsig.CudaError) as caught:
            kvsig.copy_batch(*arguments, stream)
        control.reset()
        assert any("merge=False" in note for note in caught.value.__notes__)


class TestImport:
    def test_touches_neither_torch_nor_cuda(self):
        script = (
            "import sys, kvsig; dir(kvsig); kvsig.__version__; "
            "heavy = {'torch', 'numpy', 'kvsig._core'} & set(sys.modules); "
            "assert not heavy, heavy"
        )
        subprocess.run([sys.executable, "-c", script], check=True)

    def test_names_are_all_there(self):
        for name in kvsig.__all__:
            assert getattr(kvsig, name) is getattr(kvsig, name)
            assert name in dir(kvsig)
        assert kvsig.emulated is emulated

    def test_unknown_names(self):
        with pytest.raises(
            AttributeError, match="^module 'kvsig' has no attribute 'copy_batches'$"
        ):
            kvsig.copy_batches  # noqa: B018
