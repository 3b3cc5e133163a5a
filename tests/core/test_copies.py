"""Copies on emulated runtimes: prototypes, bytes, reports, and what is refused before."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from core_help import BATCH, FORMS, REGISTRY, Copies, strided

from kvsig import _core, registry


class TestTypedCaller:
    @pytest.mark.known_failure("parameters-changed")
    @pytest.mark.parametrize("version", FORMS)
    def test_batch_gets_each_argument_in_its_place(self, bind, stream, version):
        control, copies = bind(version), Copies(7)
        on = stream()
        control.record()
        report = _core.copy_batch(*copies.arguments, on.cuda_stream, "batch")
        on.synchronize()
        copies.check()
        assert report == _core.Report("batch", None, 7, 1, int(copies.sizes.sum()))
        (call,) = control.calls(BATCH)
        variant = REGISTRY.functions[BATCH].select(registry.parse_version(version))
        assert [(a["name"], a["type"]) for a in call["arguments"]] == [
            (p.name, str(p.type)) for p in variant.params
        ]
        values = {a["name"]: a["value"] for a in call["arguments"]}
        assert values["dsts"] == copies.dsts.ctypes.data
        assert values["srcs"] == copies.srcs.ctypes.data
        assert values["sizes"] == copies.sizes.ctypes.data
        assert values["count"] == 7 and values["numAttrs"] == 1
        assert values["stream"] == on.cuda_stream
        assert ("failIdx" in values) == (version < "13")
        assert values.get("failIdx", 1) != 0
        seen = call["observed"]
        # Stream order for the source, no flags and no hints; the first attribute serves all.
        assert [a["bytes"] for a in seen["attributes"]] == ["01000000" + "00" * 20]
        assert seen["attrsIdxs"] == [0]
        assert seen["dsts"] == copies.dsts.tolist() and seen["srcs"] == copies.srcs.tolist()
        assert seen["sizes"] == copies.sizes.tolist()

    @pytest.mark.parametrize("version", FORMS)
    def test_one_size_for_all(self, bind, stream, version):
        control, copies = bind(version), Copies(300)
        copies.sizes[:] = 48
        on = stream()
        control.record()
        report = _core.copy_batch(copies.dsts, copies.srcs, 48, on.cuda_stream, "batch")
        on.synchronize()
        copies.check()
        assert report == _core.Report("batch", None, 300, 2, 300 * 48)
        assert control.calls(BATCH)[1]["observed"]["sizes"] == [48] * 44

    @pytest.mark.known_failure("huge-batch")
    @pytest.mark.parametrize("version", FORMS)
    @pytest.mark.parametrize(
        ("count", "batch_size", "sizes"),
        [
            (256, None, [256]), (257, None, [256, 1]), (600, None, [256, 256, 88]),
            (600, 100, [100] * 6), (3, 1, [1, 1, 1]), (1500, 1500, [1500]), (5, 2**62, [5]),
        ],
    )  # fmt: skip
    def test_calls_hold_so_many_copies_at_most(
        self, bind, stream, version, count, batch_size, sizes
    ):
        control, copies = bind(version), Copies(count)
        on = stream()
        control.record()
        setting = {} if batch_size is None else {"batch_size": batch_size}
        report = _core.copy_batch(*copies.arguments, on.cuda_stream, **setting)
        on.synchronize()
        copies.check()
        assert [call["observed"]["copies"] for call in control.calls(BATCH)] == sizes
        assert report.calls == len(sizes) and report.copies == count

    @pytest.mark.parametrize("version", ["11.8", "12.6", *FORMS, "13.5"])
    def test_strided(self, bind, stream, version):
        control = bind(version)
        on = stream()
        rng = np.random.default_rng(3)
        source = rng.integers(1, 256, (2, 6, 32), dtype=np.uint8)
        target = np.zeros((2, 6, 40), np.uint8)
        ops = strided(
            [target[i].ctypes.data + 8, 40, 3, source[i].ctypes.data, 64, 3, 24, 3, 1]
            for i in range(2)
        )
        control.record()
        report = _core.copy_strided(ops, on.cuda_stream)
        on.synchronize()
        assert report == _core.Report("strided", None, 6, 2, 2 * 3 * 24)
        assert (target[:, :3, 8:32] == source[:, ::2, :24]).all()
        assert target[:, :3, :8].sum() == 0 and target[:, 3:].sum() == 0
        assert len(control.calls("cudaMemcpy3DAsync")) == 2

    @pytest.mark.parametrize("version", ["11.8", *FORMS])
    def test_strided_slices(self, bind, stream, version):
        """Slices of rows that are neither neighbours nor as far apart on both sides."""
        bind(version)
        on = stream()
        source = np.random.default_rng(4).integers(1, 256, (3, 5, 32), dtype=np.uint8)
        target = np.zeros((3, 4, 40), np.uint8)
        ops = strided([[target.ctypes.data, 40, 4, source.ctypes.data, 32, 5, 24, 2, 3]])
        report = _core.copy_strided(ops, on.cuda_stream)
        on.synchronize()
        assert report == _core.Report("strided", None, 6, 1, 6 * 24)
        assert (target[:, :2, :24] == source[:, :2, :24]).all()
        assert target[:, 2:].sum() == 0 and target[:, :, 24:].sum() == 0

    def test_nothing_to_do(self, bind):
        control = bind("13.0")
        control.record()
        none = np.zeros(0, np.uint64)
        assert _core.copy_batch(none, none, none, 2) == _core.Report()
        assert _core.copy_batch(none, none, 16, 2, "batch") == _core.Report()
        assert _core.copy_strided(np.zeros((0, 9), np.uint64), 2) == _core.Report()
        assert control.calls() == []


class TestRefusedRequests:
    """What cannot be copied is refused before CUDA is called."""

    @pytest.fixture(autouse=True)
    def bound(self, bind):
        control = bind("13.0")
        control.record()
        yield
        assert control.calls() == []

    def refuses(self, text, *arguments, **settings):
        with pytest.raises(ValueError) as caught:
            _core.copy_batch(*arguments, **settings)
        assert str(caught.value) == text

    def test_batch(self):
        one, two = np.array([16], np.uint64), np.array([16, 32], np.uint64)
        zero = np.array([16, 0], np.uint64)
        give = "give one for each"
        self.refuses(f"1 destinations, but 2 sources; {give}", one, two, 4, 2)
        self.refuses(f"2 destinations, but 1 sizes; {give}", two, two, one, 2)
        end = "addresses and sizes must not be 0"
        self.refuses(f"copy 1 is not possible: dst=0x0, src=0x20, size=4; {end}", zero, two, 4, 2)
        self.refuses(f"copy 1 is not possible: dst=0x20, src=0x0, size=4; {end}", two, zero, 4, 2)
        self.refuses(
            f"copy 1 is not possible: dst=0x20, src=0x20, size=0; {end}", two, two, zero, 2
        )
        self.refuses("size 0 is no number of bytes to copy; it must be above 0", one, one, 0, 2)
        self.refuses("size -4 is no number of bytes to copy; it must be above 0", one, one, -4, 2)
        self.refuses("path='fast': use 'auto', 'batch' or 'loop'", one, one, 4, 2, path="fast")
        self.refuses(
            "batch_size 0 copies nothing; it must be above 0", one, one, 4, 2, batch_size=0
        )

    @pytest.mark.parametrize(
        ("column", "value"),
        [(0, 0), (3, 0), (6, 0), (7, 0), (8, 0), (1, 7), (4, 7), (2, 1), (5, 1)],
    )
    def test_strided(self, column, value):
        good = [16, 8, 2, 16, 8, 2, 8, 2, 2]
        bad = list(good)
        bad[column] = value
        with pytest.raises(ValueError) as caught:
            _core.copy_strided(strided([good, bad]), 2)
        dst, dpitch, drows, src, spitch, srows, width, height, depth = bad
        assert str(caught.value) == (
            f"strided copy 1 is not possible: dst={dst:#x}, dpitch={dpitch}, drows={drows},"
            f" src={src:#x}, spitch={spitch}, srows={srows}, width={width}, height={height},"
            f" depth={depth}; nothing may be 0, pitches not below the width, and rows from slice to"
            " slice not below the height"
        )
        with pytest.raises(ValueError, match="^6 columns; strided copies have 9$"):
            _core.copy_strided(np.ones((2, 6), np.uint64), 2)


class TestReport:
    def test_adds_up(self):
        batch = _core.Report("batch", None, 3, 1, 30)
        loop = _core.Report("loop", "why", 2, 2, 20)
        assert batch + loop == _core.Report("batch+loop", "why", 5, 3, 50)
        assert batch + loop + batch == _core.Report("batch+loop", "why", 8, 4, 80)
        assert _core.Report() + loop == loop and loop + _core.Report() == loop
        assert pickle.loads(pickle.dumps(loop)) == loop
        assert hash(loop) == hash(loop + _core.Report())
        assert repr(loop) == "Report(path='loop', copies=2, calls=2, bytes=20, reason='why')"
        assert loop != 3
        with pytest.raises(TypeError):
            loop + 3
