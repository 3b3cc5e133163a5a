"""What is fuzzed: each target draws one case from a random source, runs it, and compares.

A target is made once (``Target(seed)``) and called often (``target(rng)``). `rng` is a
`random.Random`: a real one in the long runs of ``fuzz_run.py``, or hypothesis's, which makes a
failing case smaller by drawing less. A wrong answer is an AssertionError, a crash is a crash.
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kvsig
from kvsig import _core, codegen, emulated, registry
from kvsig.check import registry_text
from kvsig.planning import costs

TESTS = Path(__file__).resolve().parents[1]
sys.path.append(str(TESTS / "registry"))

from generated import check_glue  # noqa: E402
from test_registry import SECOND, SMALL  # noqa: E402

VERSIONS = ("12.6", "12.9", "13.0")
SHARED = registry.load()


def bound(version: str) -> emulated.Control:
    """Bind kvsig to an emulated runtime, in its first state."""
    _core.rebind(f"emulated:{version}")
    control = emulated.Control(_core.info()["library"])
    control.reset()
    return control


class Target:
    """What is set up once, and run for each case."""

    #: Share of the time of a run.
    weight = 1

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, rng: random.Random) -> None:
        """Run one case."""
        raise NotImplementedError

    def close(self) -> None:
        """Give back what was set up."""


# --- Requests against a model in NumPy --------------------------------------------------------


class Pool:
    """A cache with random geometry, and arrays that say what its memory must hold."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.layers = int(rng.integers(1, 5))
        self.page_size = int(rng.choice([1, 2, 4, 16]))
        self.pages = {"device": int(rng.integers(1, 12)), "host": int(rng.integers(1, 12))}
        self.widths = [int(rng.choice([1, 3, 8, 40, 130])) for _ in range(int(rng.integers(1, 3)))]
        self.layout = str(rng.choice(["layer_first", "page_first_direct"]))
        apart = bool(rng.random() < 0.5)  # layers in tensors of their own, or slices of one
        self.device = [self._layers(rng, width, apart) for width in self.widths]
        self.host = [self._host(rng, width) for width in self.widths]
        self.views = {
            "device": [[self._pages(layer) for layer in group] for group in self.device],
            "host": [self._host_views(pool) for pool in self.host],
        }
        self.model = {
            side: [[view.copy() for view in group] for group in groups]
            for side, groups in self.views.items()
        }
        latent = len(self.widths) == 1
        device: Any = self.device[0] if latent else (self.device[0], self.device[1])
        host: Any = self.host[0] if latent else (self.host[0], self.host[1])
        seams = None
        if rng.random() < 0.3:
            at = [tensor.data_ptr() + int(rng.integers(0, tensor.nbytes)) for tensor in self.host]
            seams = sorted(at)
        self.cache = kvsig.PagedKVCache(
            device, host, self.layout, self.page_size, host_seams=seams
        )

    def _bytes(self, rng: np.random.Generator, *shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8))

    def _layers(self, rng: np.random.Generator, width: int, apart: bool) -> list[torch.Tensor]:
        tokens = self.pages["device"] * self.page_size
        if apart:
            return [self._bytes(rng, tokens, width) for _ in range(self.layers)]
        return list(self._bytes(rng, self.layers, tokens, width))

    def _host(self, rng: np.random.Generator, width: int) -> torch.Tensor:
        if self.layout == "layer_first":
            tokens = self.pages["host"] * self.page_size
            return self._bytes(rng, self.layers, tokens, width)
        return self._bytes(rng, self.pages["host"], self.layers, self.page_size, width)

    def _pages(self, layer: torch.Tensor) -> np.ndarray:
        return layer.numpy().reshape(-1, self.page_size * layer.shape[-1])

    def _host_views(self, pool: torch.Tensor) -> list[np.ndarray]:
        if self.layout == "layer_first":
            return [self._pages(layer) for layer in pool]
        array = pool.numpy()
        flat = array.reshape(array.shape[0], self.layers, -1)
        return [flat[:, layer] for layer in range(self.layers)]

    def apply(self, to: str, dst: list[int], src: list[int], layers: list[int]) -> None:
        origin = "host" if to == "device" else "device"
        for group in range(len(self.widths)):
            for layer in layers:
                self.model[to][group][layer][dst] = self.model[origin][group][layer][src]

    def check(self, where: object) -> None:
        for side in ("device", "host"):
            for now, want in zip(self.views[side], self.model[side], strict=True):
                for layer, (one, other) in enumerate(zip(now, want, strict=True)):
                    assert np.array_equal(one, other), (where, side, layer)

    def refresh(self, rng: random.Random) -> None:
        """Put new bytes into a page, so that pages stay different."""
        side = rng.choice(["device", "host"])
        group, layer = rng.randrange(len(self.widths)), rng.randrange(self.layers)
        page = rng.randrange(self.pages[side])
        view = self.views[side][group][layer]
        fresh = np.frombuffer(rng.randbytes(view.shape[1]), np.uint8)
        view[page] = self.model[side][group][layer][page] = fresh


class Event:
    """Waits for what is queued when it is recorded, and lets its layer be compared."""

    def __init__(self, look: Callable[[], None], control: emulated.Control) -> None:
        self.look, self.control = look, control

    def record(self, stream: Any) -> None:
        handle = getattr(stream, "cuda_stream", stream)
        self.control.synchronize(0 if handle is None else handle)
        self.look()


FORMS: tuple[Callable[[list[int]], Any], ...] = (
    list,
    tuple,
    lambda pages: np.array(pages, np.int64),
    lambda pages: np.array(pages, np.int32),
    lambda pages: np.repeat(np.array(pages, np.int64), 2)[::2],
    lambda pages: np.array(pages[::-1], np.int64)[::-1],
    lambda pages: torch.tensor(pages, dtype=torch.int64),
    lambda pages: torch.tensor(pages, dtype=torch.int16),
    lambda pages: np.array(pages, np.uint64),
    lambda pages: range(pages[0], pages[0] + len(pages))
    if pages and pages == list(range(pages[0], pages[0] + len(pages)))
    else pages,
)


class Requests(Target):
    """`PagedKVCache`: every layout, path, form of page numbers and stream, right and wrong."""

    weight = 5

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        made = np.random.default_rng(seed)
        self.version = VERSIONS[seed % len(VERSIONS)]
        self.control = bound(self.version)
        self.stream = emulated.Stream(self.control)
        self.blocking = emulated.Stream(self.control, blocking=True)
        self.pools = [Pool(made) for _ in range(8)]

    def close(self) -> None:
        self.stream.destroy()
        self.blocking.destroy()

    def __call__(self, rng: random.Random) -> None:
        pool = rng.choice(self.pools)
        to = rng.choice(["host", "device"])
        origin = "device" if to == "host" else "host"
        dst, src = self._pages(rng, pool, to, origin)
        layers: Any = None
        chosen = list(range(pool.layers))
        if rng.random() < 0.4:
            chosen = rng.sample(chosen, rng.randrange(pool.layers + 1))
            layers = chosen[0] if len(chosen) == 1 and rng.random() < 0.5 else chosen
        path = rng.choice(["auto", "auto", "batch", "strided", "loop"])
        wrong = self._spoil(rng, pool, dst, src, to, origin) if rng.random() < 0.2 else None
        if wrong is None and rng.random() < 0.03:
            wrong, layers = "layers", rng.choice([[pool.layers], [0, 0], [-1], 0.5, [True], "0"])
        if wrong is None and rng.random() < 0.02:
            wrong, path = "path", rng.choice(["", "Batch", None, 3, "kernels"])
        self._run(rng, pool, to, dst, src, layers, chosen, path, wrong)

    def _pages(
        self, rng: random.Random, pool: Pool, to: str, origin: str
    ) -> tuple[list[int], list[int]]:
        count = rng.randrange(pool.pages[to] + 1)
        if rng.random() < 0.4:
            start = rng.randrange(pool.pages[to] - count + 1)
            dst = list(range(start, start + count))
            first = rng.randrange(pool.pages[origin])
            src = [(first + i) % pool.pages[origin] for i in range(count)]
            if rng.random() < 0.3:
                dst.reverse()
            if rng.random() < 0.3:
                src.reverse()
            return dst, src
        dst = rng.sample(range(pool.pages[to]), count)
        return dst, [rng.randrange(pool.pages[origin]) for _ in range(count)]

    def _spoil(
        self, rng: random.Random, pool: Pool, dst: list[int], src: list[int], to: str, origin: str
    ) -> str | None:
        """Make a request wrong; None where this one cannot be."""
        kind = rng.choice(["range", "twice", "lengths", "negative", "huge"])
        pages, side = rng.choice([(dst, to), (src, origin)])
        if kind == "lengths":
            pages.append(0)
        elif not pages or (kind == "twice" and len(dst) < 2):
            return None
        elif kind == "twice":
            one, other = rng.sample(range(len(dst)), 2)
            dst[one] = dst[other]
        else:
            bad = {
                "range": pool.pages[side] + rng.randrange(3),
                "negative": -1 - rng.randrange(3),
                "huge": rng.choice([2**31, 2**32, 2**62, -(2**63), 2**63 - 1]),
            }
            pages[rng.randrange(len(pages))] = bad[kind]
        return kind

    def _run(
        self, rng: random.Random, pool: Pool, to: str, dst: list[int], src: list[int],
        layers: Any, chosen: list[int], path: Any, wrong: str | None,
    ) -> None:  # fmt: skip
        # Not every type holds a number that is out of range.
        forms = FORMS if wrong in (None, "layers", "path") else FORMS[:3]
        given = [rng.choice(forms)(pages) for pages in (dst, src)]
        stream = rng.choice([self.stream, self.stream, self.stream.cuda_stream, None, 0, 2,
                             self.blocking, self.blocking.cuda_stream])  # fmt: skip
        where = (self.version, repr(pool.cache), to, dst, src, layers, path, wrong, stream)
        events = None
        if to == "device" and rng.random() < 0.3:
            events = self._events(pool, dst, src, chosen, where)
            if rng.random() < 0.05 and wrong is None:
                wrong, events = "events", [*events, None]
        moves = bool(dst) and bool(chosen)
        refused = path == "batch" and bool(dst) and self.version == "12.6"
        try:
            if to == "host":
                report = pool.cache.offload(given[1], given[0], layers, stream, path)
            else:
                report = pool.cache.load(given[1], given[0], layers, stream, path, events)
        except (ValueError, TypeError) as error:
            assert wrong is not None, (where, error)
        except kvsig.BindError as error:
            assert refused, (where, error)
        else:
            assert wrong is None and not (refused and moves), where
            size = pool.page_size * sum(pool.widths)
            assert report.bytes == len(dst) * len(chosen) * size, (where, report)
            assert 0 <= report.calls <= report.copies, (where, report)
            pool.apply(to, dst, src, chosen)
            assert (report.path == "none") == (not moves), (where, report)
        self.control.synchronize(0)
        self.stream.synchronize()
        if stream == 2:
            self.control.synchronize(2)
        pool.check(where)
        if rng.random() < 0.3:
            pool.refresh(rng)

    def _events(
        self, pool: Pool, dst: list[int], src: list[int], chosen: list[int], where: object
    ) -> list[Event]:
        def look(layer: int) -> None:
            for group in range(len(pool.widths)):
                now = pool.views["device"][group][layer][dst]
                assert np.array_equal(now, pool.model["host"][group][layer][src]), (where, layer)

        return [Event(lambda layer=layer: look(layer), self.control) for layer in chosen]


# --- copy_batch against looking at every byte -------------------------------------------------


class Copies(Target):
    """`copy_batch`: random lists in one buffer, with overlaps, empty and null entries."""

    weight = 4

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.version = VERSIONS[seed % len(VERSIONS)]
        self.control = bound(self.version)
        self.stream = emulated.Stream(self.control)
        self.buffer = np.random.default_rng(seed).integers(0, 256, 512, dtype=np.uint8)
        self.base = self.buffer.ctypes.data

    def close(self) -> None:
        self.stream.destroy()

    def __call__(self, rng: random.Random) -> None:
        count = rng.randrange(7)
        reach = rng.choice([40, 120, 480])
        dsts = [rng.randrange(reach) for _ in range(count)]
        srcs = [rng.randrange(reach) for _ in range(count)]
        one = rng.random() < 0.4
        sizes = [rng.randrange(24)] * count if one else [rng.randrange(24) for _ in range(count)]
        null = rng.random() < 0.05 and count > 0 and sizes[0] > 0
        path = rng.choice(["auto", "auto", "batch", "loop"])
        legacy = rng.random() < 0.1
        where = (self.version, dsts, srcs, sizes, null, path, legacy)
        clash = self._clash(dsts, srcs, sizes)
        to = np.array(dsts, np.uint64) + np.uint64(self.base)
        origin: Any = [s + self.base for s in srcs]
        if null:
            to[0] = 0
        if rng.random() < 0.5:
            origin = np.array(origin, np.int64)
        moved = [i for i in range(count) if sizes[i]]
        refused = path == "batch" and moved and self.version == "12.6"
        want = self.buffer.copy()
        for i in moved:
            want[dsts[i] : dsts[i] + sizes[i]] = self.buffer[srcs[i] : srcs[i] + sizes[i]]
        length: Any = sizes[0] if one and count else sizes
        try:
            report = kvsig.copy_batch(
                to, origin, length, 0 if legacy else self.stream, path,
                batch_size=rng.choice([1, 2, 3, 256]),
            )  # fmt: skip
        except ValueError as error:
            assert clash or null, (where, error)
            want = self.buffer.copy()
        except kvsig.BindError as error:
            assert refused, (where, error)
            want = self.buffer.copy()
        else:
            assert not (clash or null or refused), where
            assert (report.copies, report.bytes) == (len(moved), sum(sizes)), (where, report)
        self.control.synchronize(0 if legacy else self.stream)
        assert np.array_equal(self.buffer, want), where
        if rng.random() < 0.1:
            self.buffer[: rng.randrange(512)] ^= rng.randrange(256)

    def _clash(self, dsts: list[int], srcs: list[int], sizes: list[int]) -> bool:
        """Whether any byte is written twice, or written and read."""
        written = 0
        for dst, size in zip(dsts, sizes, strict=True):
            span = ((1 << size) - 1) << dst
            if written & span:
                return True
            written |= span
        return any(
            written & (((1 << size) - 1) << src) for src, size in zip(srcs, sizes, strict=True)
        )


# --- kvsig.call -------------------------------------------------------------------------------

BITS = {
    "char": (8, True), "unsigned char": (8, False), "short": (16, True), "int": (32, True),
    "unsigned int": (32, False), "long": (64, True), "unsigned long": (64, False),
    "long long": (64, True), "unsigned long long": (64, False), "size_t": (64, False),
}  # fmt: skip


class Calls(Target):
    """`kvsig.call`: any function of the registry with arguments of any kind."""

    weight = 3

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        made = random.Random(seed)
        self.version = made.choice(["11.8", "12.6", "12.9", "13.0", "13.2", "13.5"])
        self.control = bound(self.version)
        self.control.stub()
        labels = {
            row["name"]: row["variant"]
            for row in _core.info()["functions"]
            if row["status"] == "bound"
        }
        self.variants = {
            name: next(v for v in SHARED.functions[name].variants if v.label == label)
            for name, label in labels.items()
        }
        self.names = sorted(self.variants)

    def close(self) -> None:
        self.control.reset()

    def __call__(self, rng: random.Random) -> None:
        name = rng.choice(self.names)
        variant = self.variants[name]
        arguments: dict[str, Any] = {}
        expected: dict[str, Any] = {}
        wrong = False
        keep = []
        for param in variant.params:
            if (param.value is not None or param.out) and rng.random() < 0.5:
                continue
            value, want, fits = self._draw(rng, param)
            keep.append(value)
            arguments[param.name], expected[param.name] = value, want
            wrong |= not fits
        if rng.random() < 0.05:
            wrong, arguments["noSuchParameter"] = True, 1
        if rng.random() < 0.05 and arguments:
            gone = rng.choice(list(arguments))
            del arguments[gone]
            param = next((p for p in variant.params if p.name == gone), None)
            wrong = True if param and param.value is None and not param.out else wrong
            if gone == "noSuchParameter" or (param and (param.value is not None or param.out)):
                return  # whether the others are right is not looked at again
        recorded = rng.random() < 0.3
        if recorded:
            self.control.record()
        where = (self.version, name, arguments)
        try:
            kvsig.call(name, **arguments)
        except (TypeError, ValueError) as error:
            assert wrong, (where, error)
            assert name in str(error), (where, error)
            return
        assert not wrong, where
        if recorded:
            calls = self.control.calls(name)
            assert len(calls) == 1, (where, calls)
            for shown in calls[0]["arguments"]:
                want = expected.get(shown["name"])
                if want is not None:
                    # C has enumerations without negative constants as unsigned numbers.
                    assert (shown["value"] - want) % 2**32 == 0, (where, shown)
                    assert shown["value"] == want or -(2**31) <= want < 0, (where, shown)

    def _draw(self, rng: random.Random, param: registry.Param) -> tuple[Any, Any, bool]:
        """A value, what the recorder shows of it (None: not compared), and whether it fits."""
        ctype = SHARED.resolve(param.type)
        if ctype.pointers:
            return self._pointer(rng)
        if ctype.name in SHARED.structs:
            bad = rng.random() < 0.1
            return ({"noSuchField": 1} if bad else {}), None, not bad
        bits, signed = BITS.get(ctype.base, (32, True))
        if ctype.base in ("float", "double"):
            return 1.5, None, True
        low, high = (-(1 << (bits - 1)), 1 << (bits - 1)) if signed else (0, 1 << bits)
        kind = rng.random()
        if kind < 0.06:
            return rng.choice([low - 1, high, 10**30, -(10**30)]), None, False
        if kind < 0.1:
            return rng.choice([1.5, None, "7", [], object()]), None, False
        value = rng.choice([low, high - 1, 0, 1, rng.randrange(low, high)])
        return (np.int64(value) if value < 2**63 and rng.random() < 0.2 else value), value, True

    def _pointer(self, rng: random.Random) -> tuple[Any, Any, bool]:
        kind = rng.random()
        if kind < 0.06:
            return rng.choice([-1, 2**64, 10**30, 1.5, object()]), None, False
        if kind < 0.1:
            return np.zeros(8)[::2], None, False
        if kind < 0.3:
            array = np.zeros(4)
            return array, array.ctypes.data, True
        if kind < 0.4:
            return None, 0, True
        value = rng.randrange(1 << 64)
        return value, value, True


# --- The registry's reader and generator ------------------------------------------------------

FREE = "kvsigfreetext"
FRAGMENTS = (
    "\n", "\r", "\0", "\\", '"', "'", "#", "*/", "/*", "//", "{", "}", "[", "]", "(", ")", ";",
    "=", "\u2028", "\u202e", "\x1b[2J", "\n#include </etc/passwd>\n", "__attribute__((x))", "??/",
    "%s", "{0}", "0x", "010", "²", "-1", "1e3", "9" * 400, "class", "NULL", "asm", "int", "size_t",
    "struct Pair", "enum Color", "handle_t", "S", "*", "const", "void", "unsigned", "true", "inf",
    "nan", "0", "1", "2147483648", "18446744073709551616", "13.0", "12.8", "12.10", "13.99", "🙂",
    FREE, "[alias]\n", 'S = "S"\n', "size = 8\n", 'fields = ["struct Pair x"]\n', "open = true\n",
)  # fmt: skip


class Registries(Target):
    """Reader and generator: files are read or refused, and what is read makes plain code."""

    weight = 2

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.texts = [SMALL, SMALL + SECOND]
        self.runs = 0

    def __call__(self, rng: random.Random) -> None:
        text = rng.choice(self.texts)
        for _ in range(rng.randrange(1, 4)):
            text = self._changed(rng, text)
        try:
            table = registry.parse(text)
        except registry.RegistryError as error:
            assert error.problems, text
            return
        again = registry.parse(registry_text.dump(table))
        assert dataclasses.replace(again, digest="") == dataclasses.replace(table, digest=""), text
        try:
            written = [codegen.cython_text(table)]
            written += [codegen.emulated_glue(table, v) for v in codegen.emulated_versions(table)]
        except codegen.GenerationError:
            return
        for code in written:
            assert FREE not in code or f'"{FREE}"' not in text, text
            assert code.isascii() and "\\" not in code and "\r" not in code, text
        self.runs += 1
        if self.runs % 500 == 0 and codegen.emulated_versions(table):
            check_glue(table, codegen.emulated_versions(table)[0])

    def _changed(self, rng: random.Random, text: str) -> str:
        lines = text.split("\n")
        at = rng.randrange(len(lines))
        how = rng.randrange(7)
        if how == 0:
            del lines[at]
        elif how == 1:
            lines.insert(rng.randrange(len(lines)), lines[at])
        elif how == 2:
            lines[at] = lines[at].replace('"', "'", rng.randrange(3))
        elif how == 3 and lines[at].count('"') >= 2:
            head, _, rest = lines[at].partition('"')
            lines[at] = f'{head}"{rng.choice(FRAGMENTS)}"{rest.partition(chr(34))[2]}'
        elif how == 4:
            other = rng.randrange(len(lines))
            lines[at], lines[other] = lines[other], lines[at]
        else:
            line = lines[at]
            cut = rng.randrange(len(line) + 1)
            drop = rng.randrange(4)
            lines[at] = line[:cut] + rng.choice(FRAGMENTS) + line[cut + drop :]
        return "\n".join(lines)


# --- Files of costs ---------------------------------------------------------------------------


class CostFiles(Target):
    """A file of calibrated figures: taken, or a warning and the built-in ones; plans stand."""

    weight = 1

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "costs.json"
        costs.save(costs.builtin("H100"), self.path)
        self.text = self.path.read_text()
        self.keys = [k for k in json.loads(self.text)["load"]]
        device = [torch.zeros(64, 16, dtype=torch.uint8) for _ in range(2)]
        self.sides = device, torch.zeros(16, 2, 4, 16, dtype=torch.uint8)
        bound("13.0")

    def close(self) -> None:
        self.folder.cleanup()

    def __call__(self, rng: random.Random) -> None:
        text = self.text
        for _ in range(rng.randrange(1, 4)):
            key = rng.choice(self.keys)
            value = rng.choice(
                ["0", "1e6", "1e300", "-1", "NaN", "Infinity", "null", "true", '"x"', "[]", "{}",
                 "9" * 400, "1e-320", "5e5", "1000000.1", "[" * 2000, str(rng.random())]
            )  # fmt: skip
            text = re.sub(rf'("{key}": )[^,\n]*', lambda m, v=value: m[1] + v, text, count=1)
        if rng.random() < 0.3:
            cut = rng.randrange(len(text))
            text = text[:cut] + rng.choice(FRAGMENTS) + text[cut + rng.randrange(40) :]
        self.path.write_text(text, encoding="utf-8", errors="surrogatepass")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            model = costs.load("H100", self.path)
        assert len(said) <= 1, [str(w.message) for w in said]
        assert said or model.source in ("built in", "default", "calibrated") or model.source
        cache = kvsig.PagedKVCache(*self.sides, page_size=4, model=model)
        plan = cache.plan_load([1, 2, 3, 7], [0, 1, 2, 3], stream=0)
        assert plan.copies_in == 4 * 2 and str(plan), text


TARGETS: dict[str, type[Target]] = {
    "requests": Requests,
    "copy_batch": Copies,
    "call": Calls,
    "registry": Registries,
    "costs": CostFiles,
}
