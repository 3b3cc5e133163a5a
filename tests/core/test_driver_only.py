"""A process with a driver and no libcudart: the driver's own entry point makes batches.

An emulated runtime under the name libcuda.so.1 is the driver, in a process of its own. A torch
that is built without CUDA stands before the installed one, which might have a libcudart.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from kvsig import emulated

PRELUDE = """
import json
import numpy as np
from kvsig import _core, emulated
driver = emulated.Control("libcuda.so.1")
driver.set_version("13.0")
on = driver._ask("stream_create", 1)
source = np.arange(2048, dtype=np.uint8).reshape(4, 512)
target = np.zeros((8, 512), np.uint8)
srcs = np.array([row.ctypes.data for row in source], np.uint64)
dsts = np.array([row.ctypes.data for row in target[::2]], np.uint64)

def strided(*values):
    return np.array([values], np.uint64)

def refused(*arguments):
    try:
        _core.copy_batch(dsts, srcs, 512, *arguments)
    except _core.BindError as error:
        return str(error)

def done():
    driver.synchronize(on)
    return bool((target[::2] == source).all())
"""
NO_LOOP = "no page copies: libcudart.so is not there"
LEGACY = (
    "the stream is the legacy default stream, which batches refuse, and cudaGetDevice is not bound"
    " for a way around"
)


@pytest.fixture
def answer(tmp_path):
    """``answer(code, expression)``: what a process without libcudart has to say."""
    shutil.copy(emulated.resolve("13.0"), tmp_path / "libcuda.so.1")
    torch = tmp_path / "torch"
    torch.mkdir()
    (torch / "__init__.py").touch()
    (torch / "version.py").write_text("cuda = None\n")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("KVSIG_")}
    environment["LD_LIBRARY_PATH"] = str(tmp_path)
    root = str(emulated.DIRECTORY.parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), root])

    def answer(code, expression, **variables):
        text = f"{PRELUDE}\n{code}\nprint(json.dumps({expression}))"
        done = subprocess.run(
            [sys.executable, "-c", text], env=environment | variables, cwd=tmp_path,
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return answer


def test_batches_go_through_the_driver(answer, tmp_path):
    code = "report = _core.copy_batch(dsts, srcs, 512, on)"
    path, calls, right, info = answer(
        code, "[report.path, report.calls, done(), _core.info()]"
    )  # fmt: skip
    assert (path, calls, right) == ("batch", 1, True)
    assert info["library"] is None and info["libraries"] == [] and info["route"] == "driver"
    assert info["driver_library"] == str(tmp_path / "libcuda.so.1")
    assert (info["runtime_version"], info["driver_version"]) == (0, 13000)
    assert info["batch"] == {
        "path": "batch",
        "why": "cuMemcpyBatchAsync of the driver, pinned at 12.8: there is no libcudart",
    }
    assert info["found"].startswith(
        "no CUDA runtime: no libcudart is loaded in this process, and the installed torch is built"
        " without CUDA. "
    )
    rows = {row["name"]: row for row in info["functions"]}
    assert rows["cuMemcpyBatchAsync"]["status"] == "bound"
    assert rows["cudaMemcpyAsync"]["status"] == "no library"
    assert rows["cudaMemcpyAsync"]["why"] == "libcudart.so is not there"


@pytest.mark.parametrize(
    "call",
    [
        "copy_strided(strided(target.ctypes.data, 1024, 4, source.ctypes.data, 512, 4,"
        " 512, 4, 1), on)",
        "copy_strided(strided(target.ctypes.data, 1024, 2, source.ctypes.data, 512, 2,"
        " 512, 2, 2), on)",
    ],
)
def test_strided_copies_are_made_as_batches_of_rows(answer, call):
    code = f"report = _core.{call}"
    assert answer(code, "[report.path, report.copies, report.bytes, done()]") == [
        "batch", 4, 2048, True,
    ]  # fmt: skip


def test_the_strided_copy_that_failed_is_named(answer):
    code = """
driver.fault("cuMemcpyBatchAsync", 1, 1, 3)
ops = np.concatenate(
    [strided(dsts[2 * i], 1024, 2, srcs[2 * i], 512, 2, 512, 2, 1) for i in (0, 1)])
try:
    _core.copy_strided(ops, on)
except _core.CudaError as error:
    found = [error.index, error.code, error.name, error.function]
"""
    assert answer(code, "found") == [1, 1, "CUDA_ERROR_INVALID_VALUE", "cuMemcpyBatchAsync"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("on, 'loop'", f"{NO_LOOP}. Use path='auto' or 'batch', or set KVSIG_CUDART to the path of"
         " a libcudart"),
        ("0", f"{NO_LOOP}, and no batch: {LEGACY}. Give a stream that is not the default one, or"
         " set KVSIG_CUDART to the path of a libcudart"),
        ("0, 'batch'", f"{NO_LOOP}, and no batch: {LEGACY}. Give a stream that is not the default"
         " one, or set KVSIG_CUDART to the path of a libcudart"),
    ],
)  # fmt: skip
def test_what_cannot_be_says_what_can(answer, arguments, text):
    assert answer(f"text = refused({arguments})", "text") == text


def test_a_driver_that_is_too_old(answer):
    code = 'driver.set_version("12.6")\ntext = refused(on)'
    assert answer(code, "text") == (
        f"{NO_LOOP}, and no batch: the driver is 12.6, and batches need 12.8."
        " Set KVSIG_CUDART to the path of a libcudart"
    )


def test_a_driver_that_refuses(answer):
    code = 'driver.fault("cuMemcpyBatchAsync", 801, 0)\ntext = refused(on)'
    assert (
        answer(code, "[text, refused(on)]")
        == [
            f"{NO_LOOP}, and no batch: cuMemcpyBatchAsync answered 801 (CUDA_ERROR_NOT_SUPPORTED)."
            " Set KVSIG_CUDART to the path of a libcudart"
        ]
        * 2
    )


@pytest.mark.known_failure("nameless-codes")
def test_every_code_of_the_driver_has_its_name(answer):
    """The registry has a few of them; the driver knows them all."""
    code = """
found = {}
for state in (46, 214, 804, 806, 807, 990):
    driver.set_driver(state)
    try:
        _core.copy_batch(dsts, srcs, 512, on)
    except _core.CudaError as error:
        found[state] = [error.name, error.text]
"""
    found = answer(code, "found")
    assert {int(state): name for state, (name, _) in found.items()} == {
        46: "CUDA_ERROR_DEVICE_UNAVAILABLE",
        214: "CUDA_ERROR_ECC_UNCORRECTABLE",
        804: "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE",
        806: "CUDA_ERROR_MPS_RPC_FAILURE",
        807: "CUDA_ERROR_MPS_SERVER_NOT_READY",
        990: "unknown",
    }
    assert found["804"][1] == "forward compatibility was attempted on non supported HW"
    assert found["990"][1] == "no text"


def test_without_the_route_there_is_no_runtime(answer):
    text = answer("text = refused(on)", "text", KVSIG_ROUTE="runtime")
    assert text.startswith("no CUDA runtime: no libcudart is loaded in this process, and ")


def test_info_on_the_command_line(answer):
    code = "from kvsig.cli import info"
    lines = answer(code, "info.describe(_core.info()).splitlines()")
    assert lines[:2] == ["CUDA runtime  none", "library       none"]
    assert any(line.startswith("page copies   batch: cuMemcpyBatchAsync") for line in lines)
