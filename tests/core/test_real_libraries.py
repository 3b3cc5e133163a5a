"""Every real libcudart, each in a process of its own: versions, variants, symbols, and calls.

No driver is needed: without one each call answers InsufficientDriver. With one, copies are made.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import elf
import pytest

from kvsig import _core, registry
from kvsig.check import releases

REGISTRY = registry.load()
ROOT = Path(_core.__file__).parent.parent
BATCH = "cudaMemcpyBatchAsync"

# What one process tells about its library. Where there is a device, pages go there and back.
PROBE = """
import ctypes, json, os
# What a process shows that has done nothing: without a driver this very query answers 35.
untouched = ctypes.CDLL(os.environ["KVSIG_CUDART"]).cudaPeekAtLastError()
import numpy as np
import kvsig
from kvsig import _core

def attempt(work):
    try:
        return work()
    except (_core.CudaError, _core.BindError) as error:
        fields = ("code", "name", "function", "variant", "library", "index")
        kind = type(error).__name__
        return {"error": kind, "text": str(error), **{f: getattr(error, f, None) for f in fields}}

def report(one):
    return one if isinstance(one, dict) else {
        "path": one.path, "reason": one.reason, "copies": one.copies}

info = _core.info()
peek = lambda: kvsig.call("cudaPeekAtLastError")
found = {"info": info, "untouched": untouched, "last_errors": [peek()]}
count = attempt(lambda: kvsig.call("cudaGetDeviceCount"))
found["devices"] = count if isinstance(count, int) else 0
found["last_errors"].append(peek())
n, size = 600, 4096
if found["devices"]:
    stream = kvsig.call("cudaStreamCreateWithFlags", flags=1)
    device = kvsig.call("cudaMalloc", size=n * size)
    host = kvsig.call("cudaHostAlloc", size=2 * n * size)
    view = np.ctypeslib.as_array((ctypes.c_uint8 * (2 * n * size)).from_address(host))
    view[:n * size] = np.random.default_rng(0).integers(1, 256, n * size)
    view[n * size:] = 0
    steps = np.arange(n, dtype=np.uint64) * np.uint64(size)
    there = steps[::-1] + np.uint64(device)
    for name, on in (("stream", stream), ("legacy", 0)):
        view[n * size:] = 0
        kvsig.call("cudaMemsetAsync", devPtr=device, value=0, count=n * size, stream=on)
        down = _core.copy_batch(np.ascontiguousarray(there), steps + np.uint64(host), size, on)
        up = _core.copy_batch(steps + np.uint64(host + n * size), np.ascontiguousarray(there),
                              size, on)
        kvsig.call("cudaStreamSynchronize", stream=on)
        found[name] = {"down": report(down), "up": report(up),
                       "equal": bool((view[:n * size] == view[n * size:]).all())}
        found["last_errors"].append(peek())
else:
    one, two = np.ones(n * size, np.uint8), np.zeros(n * size, np.uint8)
    lists = [np.array([a.ctypes.data], np.uint64) for a in (two, one)] + [
        np.array([64], np.uint64), np.array([0], np.uint64)]
    found["batch"] = attempt(lambda: kvsig.call(
        "cudaMemcpyBatchAsync", dsts=lists[0], srcs=lists[1], sizes=lists[2], count=1,
        attrs=(1, (0, 0), (0, 0), 0), attrsIdxs=lists[3], numAttrs=1, stream=2))
    found["last_errors"].append(peek())
    found["copy"] = attempt(lambda: report(_core.copy_batch(lists[0], lists[1], 64, 2)))
    found["last_errors"].append(peek())
    found["legacy"] = attempt(lambda: report(_core.copy_batch(lists[0], lists[1], 64, 0)))
    found["strict"] = attempt(lambda: report(_core.copy_batch(lists[0], lists[1], 64, 2, "batch")))
    found["last_errors"].append(peek())
    found["moved"] = int(two.sum())
found["files"] = sorted({_core.address_file(row["address"]) for row in info["functions"]
                         if row["address"] and row["library"] == "cudart"})
print(json.dumps(found))
"""


@pytest.fixture(scope="module", params=REGISTRY.verified)
def release(request):
    return request.param


@pytest.fixture(scope="module")
def library(release):
    try:
        return str(releases.library(release))
    except releases.ReleaseError as error:
        if "package index cannot be reached" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def probe(library):
    environment = {k: v for k, v in os.environ.items() if k != "KVSIG_ROUTE"}
    done = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, cwd=ROOT, timeout=120,
        env={**environment, "KVSIG_CUDART": library},
    )  # fmt: skip
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stderr}"
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def version(release):
    """Version of the library, as CUDA counts."""
    return registry.parse_version(".".join(release.split(".")[:2]))


@pytest.fixture(scope="module")
def told(version, probe):
    """The version that the library tells; CUDA 11 does not tell it without a driver."""
    if version < 12000 and probe["info"]["driver_version"] == 0:
        return 0
    return version


def test_version(probe, told):
    assert probe["info"]["runtime_version"] == told


def test_library_is_the_one_that_was_asked_for(probe, library):
    assert os.path.samefile(probe["info"]["library"], library)
    assert len(probe["files"]) == 1 and os.path.samefile(probe["files"][0], library)
    assert probe["info"]["emulated"] is False and probe["info"]["warnings"] == []


def test_every_function_has_its_variant_or_is_rightly_missing(probe, version, told, library):
    symbols = elf.exported(library)
    for row in probe["info"]["functions"]:
        function = REGISTRY.functions[row["name"]]
        if function.library != "cudart":
            continue
        right = function.select(version)
        # The table agrees with the file, whatever this process could learn of its version.
        if right is None:
            assert function.variants[0].symbol not in symbols, row
            assert row["status"] == ("absent" if told else "version unknown"), row
            assert row["address"] is None
        elif told or right.open:
            assert row["status"] == "bound" and row["variant"] == right.label, row
            assert row["symbol"] == right.symbol and row["address"], row
        else:
            assert row["status"] == "version unknown" and row["address"] is None, row


def test_elf_symbol_versions_agree_with_the_ranges(library, version):
    symbols = elf.exported(library)
    major = version // 1000
    name = "libcudart.so.11.0" if major == 11 else f"libcudart.so.{major}"
    handle = ctypes.CDLL(None)
    handle.dlvsym.restype = ctypes.c_void_p
    handle.dlvsym.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p]
    opened = ctypes.CDLL(library)._handle
    for function in REGISTRY.functions.values():
        variant = function.select(version) if function.library == "cudart" else None
        if variant is None:
            continue
        assert symbols[variant.symbol] == elf.Symbol(name, True), variant.symbol
        # The loader agrees: by this version it is found, and by the next major's it is not.
        assert handle.dlvsym(opened, variant.symbol.encode(), name.encode())
        other = f"libcudart.so.{major + 1}"
        assert not handle.dlvsym(opened, variant.symbol.encode(), other.encode())
        # A range that is closed lies within what one symbol version stands for.
        if not variant.open and variant is not function.variants[-1]:
            assert variant.since // 1000 <= major < -(-variant.before // 1000)


def test_no_last_error_is_left(probe):
    assert probe["untouched"] == (0 if probe["devices"] else 35)
    assert set(probe["last_errors"]) == {probe["untouched"]}


def test_without_a_driver_a_real_call_is_refused_and_nothing_else(probe, version, told, library):
    if probe["devices"]:
        pytest.skip("there is a device: copies are made instead")
    batch, copy = probe["batch"], probe["copy"]
    if version < 12080:
        assert batch["error"] == "BindError"
        why = (
            f"{probe['info']['library']} does not tell its version"
            if not told
            else f"{registry.format_version(version)} is older than 12.8"
        )
        assert batch["text"] == f"{BATCH} is not bound: {why}"
    else:
        variant = REGISTRY.functions[BATCH].select(version)
        assert batch["error"] == "CudaError"
        assert (batch["code"], batch["name"]) == (35, "cudaErrorInsufficientDriver")
        assert (batch["function"], batch["variant"]) == (BATCH, variant.label)
        assert os.path.samefile(batch["library"], library)
    # Page copies are tried, since there is no driver for batches; it is they that are refused.
    for refused in (copy, probe["legacy"]):
        assert (refused["error"], refused["code"]) == ("CudaError", 35)
        # There is no driver for any copy: none is to blame.
        assert (refused["function"], refused["index"]) == ("cudaMemcpyAsync", None)
    assert probe["strict"]["error"] == "BindError"
    assert probe["strict"]["text"] == (
        "path='batch' is not possible: the driver is missing, and batches need 12.8."
        " Use path='auto' or 'loop'"
    )
    assert probe["moved"] == 0


@pytest.mark.gpu
def test_on_a_device_pages_go_there_and_back(probe, version):
    assert probe["devices"] > 0
    driver = probe["info"]["driver_version"]
    expected = "batch" if driver >= 12080 else "loop"
    route = "runtime" if version >= 12080 else "driver"
    assert probe["info"]["route"] == (route if expected == "batch" else "none")
    for where in ("stream", "legacy"):
        assert probe[where]["equal"]
        for way in ("down", "up"):
            assert probe[where][way]["path"] == expected, probe[where]
            assert probe[where][way]["copies"] == 600
