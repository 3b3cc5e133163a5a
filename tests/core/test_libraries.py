"""Which libraries a process has: each candidate is looked at, looked at again, and named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import fake_cuda
import pytest
from core_help import PACKAGE

from kvsig import emulated
from kvsig.check import releases

TELL = """
import ctypes, json, os, sys, warnings
warnings.simplefilter("ignore")
from kvsig import _core
info = {}
try:
    info = _core.info()
except _core.BindError as error:
    info = {"error": str(error)}
"""


def tell(text="", *arguments, **environment):
    """What `info` says in a fresh process; `text` comes before it is printed."""
    clean = {
        key: value for key, value in os.environ.items()
        if key not in ("KVSIG_CUDART", "KVSIG_ROUTE", "LD_LIBRARY_PATH")
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", f"{text or TELL}\nprint(json.dumps(info))", *map(str, arguments)],
        capture_output=True, text=True, timeout=60, cwd=PACKAGE.parent,
        env={**clean, "PYTHONPATH": str(PACKAGE.parent), **environment},
    )  # fmt: skip
    assert done.returncode == 0, f"ended by {done.returncode}\n{done.stderr}"
    return json.loads(done.stdout)


def after(before):
    """The same, with something done first."""
    return before + TELL


def real(release="12.9.79"):
    try:
        return str(releases.library(release))
    except releases.ReleaseError as error:
        if "package index cannot be reached" not in str(error):
            raise
        pytest.skip(str(error))


LOAD = "import ctypes, sys\nfor path in sys.argv[1:]: ctypes.CDLL(path)\n"


class TestCudart:
    @pytest.mark.known_failure("partial-library")
    @pytest.mark.parametrize(
        ("source", "lacks"),
        [
            (fake_cuda.NOTHING, "cudaRuntimeGetVersion"),
            (fake_cuda.CUDART.partition("int cudaMemcpyAsync")[0], "cudaMemcpyAsync"),
        ],
    )
    def test_a_partial_one_that_is_loaded_first(self, tmp_path, source, lacks):
        partial = fake_cuda.library(tmp_path / "libcudart.so.12", source)
        whole = fake_cuda.library(tmp_path / "whole/libcudart.so.12.9.79", fake_cuda.CUDART)
        info = tell(after(LOAD), partial, whole)
        assert info["library"] == whole and info["runtime_version"] == 12090
        assert f"not used as CUDA runtime: {partial} does not have {lacks}" in info["warnings"]

    def test_only_a_partial_one(self, tmp_path):
        partial = fake_cuda.library(tmp_path / "libcudart.so.12", fake_cuda.NOTHING)
        torch(tmp_path, "None")
        error = tell(after(LOAD), partial, PYTHONPATH=f"{tmp_path}:{PACKAGE.parent}")["error"]
        assert error.startswith(
            f"no CUDA runtime: {partial} does not have cudaRuntimeGetVersion; the installed torch"
            " is built without CUDA. "
        )
        assert "no libcudart is loaded" not in error

    @pytest.mark.known_failure("leftover-library")
    @pytest.mark.parametrize("left", ["libcudart-d0da41ae.so.11.0", "libcudart-d0da41ae.so.13"])
    def test_what_another_torch_left_in_its_folder(self, tmp_path, left):
        root = torch(tmp_path, "'12.8'")
        shutil.copy(fake_cuda.library(tmp_path / "left.so", fake_cuda.CUDART), root / "lib" / left)
        right = fake_cuda.library(
            tmp_path / "nvidia/cuda_runtime/lib/libcudart.so.12", fake_cuda.CUDART
        )
        info = tell(PYTHONPATH=f"{tmp_path}:{PACKAGE.parent}")
        assert info["library"] == right

    @pytest.mark.parametrize(
        ("cuda", "name"),
        [
            ("12.8", "libcudart-d0da41ae.so.12"), ("12.8", "libcudart-d0da41ae.so.12.8.90"),
            ("11.8", "libcudart-d0da41ae.so.11.0"), ("11.8", "libcudart.so.11.0"),
        ],
    )  # fmt: skip
    def test_torchs_own_name_for_it(self, tmp_path, cuda, name):
        root = torch(tmp_path, repr(cuda))
        own = fake_cuda.library(root / "lib" / name, fake_cuda.CUDART)
        assert tell(PYTHONPATH=f"{tmp_path}:{PACKAGE.parent}")["library"] == own

    def test_a_file_that_torch_would_not_load_is_not_taken(self, tmp_path):
        """The loader looks for a name; without the link of that name it finds no library."""
        torch(tmp_path, "'12.8'")
        fake_cuda.library(
            tmp_path / "nvidia/cuda_runtime/lib/libcudart.so.12.8.90", fake_cuda.CUDART
        )
        error = tell(PYTHONPATH=f"{tmp_path}:{PACKAGE.parent}")["error"]
        assert "the installed torch wants libcudart.so.12, which was not found" in error

    def test_a_broken_one_of_torch_is_passed_over(self, tmp_path):
        root = torch(tmp_path, "'12.8'")
        broken = root / "lib/libcudart.so.12"
        broken.write_bytes(b"no library")
        right = fake_cuda.library(
            tmp_path / "nvidia/cuda_runtime/lib/libcudart.so.12", fake_cuda.CUDART
        )
        info = tell(PYTHONPATH=f"{tmp_path}:{PACKAGE.parent}")
        assert info["library"] == right
        (warning,) = info["warnings"]
        assert warning.startswith(f"not used as CUDA runtime: {broken} cannot be loaded: ")

    @pytest.mark.known_failure("truncated-library")
    @pytest.mark.parametrize("part", [0.02, 0.3, 0.6, 0.95])
    def test_one_that_is_cut_off_is_refused_and_not_loaded(self, tmp_path, part):
        """The loader would map what is not there, and end the process by SIGBUS."""
        whole = Path(emulated.resolve("13.0")).read_bytes()
        cut = tmp_path / "libcudart.so.13"
        cut.write_bytes(whole[: int(part * len(whole))])
        error = tell(KVSIG_CUDART=str(cut))["error"]
        assert error.startswith(f"{cut} is cut off (KVSIG_CUDART={cut}): it has ")

    @pytest.mark.known_failure("truncated-by-name")
    @pytest.mark.parametrize("part", [0.3, 0.95])
    def test_one_that_a_name_stands_for(self, tmp_path, part):
        """The loader looks for it along LD_LIBRARY_PATH, and maps it in the same way."""
        whole = Path(emulated.resolve("13.0")).read_bytes()
        cut = tmp_path / "libcudart.so.77"
        cut.write_bytes(whole[: int(part * len(whole))])
        error = tell(KVSIG_CUDART=cut.name, LD_LIBRARY_PATH=str(tmp_path))["error"]
        assert error.startswith(f"{cut.name} is {cut}, which is cut off (KVSIG_CUDART={cut.name})")
        cut.write_bytes(whole)
        info = tell(KVSIG_CUDART=cut.name, LD_LIBRARY_PATH=str(tmp_path))
        assert info["library"] == str(cut)

    @pytest.mark.known_failure("not-a-library")
    @pytest.mark.parametrize("content", [b"", b"\x7fELF", b"\x7fELF\x02\x01" + b"\xff" * 58])
    def test_what_is_no_library_at_all(self, tmp_path, content):
        bad = tmp_path / "libcudart.so.12"
        bad.write_bytes(content)
        error = tell(KVSIG_CUDART=str(bad))["error"]
        assert error.startswith(f"{bad} ") and f"(KVSIG_CUDART={bad}): " in error

    @pytest.mark.known_failure("not-a-library")
    def test_a_folder(self, tmp_path):
        error = tell(KVSIG_CUDART=str(tmp_path))["error"]
        assert error.startswith(f"{tmp_path} is no file (KVSIG_CUDART={tmp_path}): ")


def torch(folder, cuda):
    """A torch that stands before the installed one."""
    root = folder / "torch"
    (root / "lib").mkdir(parents=True)
    (root / "__init__.py").touch()
    (root / "version.py").write_text(f"cuda = {cuda}\n")
    return root


class TestDriver:
    @pytest.fixture
    def cudart(self, tmp_path):
        return fake_cuda.library(tmp_path / "libcudart.so.12", fake_cuda.CUDART)

    @pytest.mark.known_failure("driver-by-runpath")
    def test_on_the_search_path_of_libcudart_alone(self, tmp_path):
        driver = fake_cuda.library(tmp_path / "driver/libcuda.so.1", fake_cuda.DRIVER)
        cudart = fake_cuda.library(
            tmp_path / "libcudart.so.12", fake_cuda.CUDART,
            f"-Wl,--enable-new-dtags,-rpath,{tmp_path / 'driver'}",
        )  # fmt: skip
        info = tell(KVSIG_CUDART=cudart)
        assert (info["driver_version"], info["driver_library"]) == (13000, driver)
        assert info["driver_found"] == "on libcudart's search path"

    @pytest.mark.known_failure("driver-later")
    def test_loaded_after_the_first_look(self, tmp_path, cudart):
        driver = fake_cuda.library(tmp_path / "driver/libcuda.so.1", fake_cuda.DRIVER)
        text = TELL + "first = info\nctypes.CDLL(sys.argv[1])\ninfo = [first, _core.info()]\n"
        first, second = tell(text, driver, KVSIG_CUDART=cudart)
        assert (first["driver_version"], first["driver_library"]) == (0, None)
        assert "libcuda.so.1 cannot be loaded: " in first["driver_found"]
        assert (second["driver_version"], second["driver_library"]) == (13000, driver)

    def test_a_partial_one_is_passed_over(self, tmp_path, cudart):
        partial = fake_cuda.library(tmp_path / "one/libcuda.so", fake_cuda.NOTHING)
        driver = fake_cuda.library(tmp_path / "two/libcuda.so.535", fake_cuda.DRIVER)
        info = tell(after(LOAD), partial, driver, KVSIG_CUDART=cudart)
        assert info["driver_library"] == driver

    def test_none(self, cudart):
        info = tell(KVSIG_CUDART=cudart)
        assert info["batch"] == {
            "path": "none", "why": "no copy can be made: the driver is missing"
        }  # fmt: skip

    @pytest.mark.known_failure("stub-driver")
    @pytest.mark.parametrize("route", ["auto", "runtime", "driver"])
    def test_a_stub(self, tmp_path, cudart, route):
        """It is not missing: it was asked, and answered 34."""
        stub = fake_cuda.library(tmp_path / "driver/libcuda.so.1", fake_cuda.STUB)
        info = tell(
            KVSIG_CUDART=cudart, LD_LIBRARY_PATH=str(tmp_path / "driver"), KVSIG_ROUTE=route
        )
        assert info["batch"] == {
            "path": "none",
            "why": f"no copy can be made: the driver does not tell its version: {stub} answered 34"
            " (CUDA_ERROR_STUB_LIBRARY)",
        }

    @pytest.mark.known_failure("truncated-by-name")
    @pytest.mark.parametrize("part", [0.3, 0.95])
    def test_one_that_is_cut_off(self, tmp_path, cudart, part):
        whole = Path(emulated.resolve("13.0")).read_bytes()
        cut = tmp_path / "driver/libcuda.so.1"
        cut.parent.mkdir()
        cut.write_bytes(whole[: int(part * len(whole))])
        info = tell(KVSIG_CUDART=cudart, LD_LIBRARY_PATH=str(tmp_path / "driver"))
        assert f"libcuda.so.1 is {cut}, which is cut off: it has " in info["driver_found"]
        assert info["batch"]["path"] == "none"

    @pytest.mark.known_failure("driver-of-older-major")
    def test_older_than_the_major_of_the_runtime(self, tmp_path, cudart):
        source = fake_cuda.DRIVER.replace("13000", "11080")
        fake_cuda.library(tmp_path / "driver/libcuda.so.1", source)
        info = tell(KVSIG_CUDART=cudart, LD_LIBRARY_PATH=str(tmp_path / "driver"))
        assert info["batch"] == {
            "path": "none",
            "why": "no copy can be made: the driver is 11.8, and libcudart 12.9 needs 12.0",
        }

    def test_one_that_is_asked_for_its_version_whatever_the_route(self, tmp_path, cudart):
        """With KVSIG_ROUTE=runtime batches do not go through it, but it is there."""
        fake_cuda.library(tmp_path / "driver/libcuda.so.1", fake_cuda.DRIVER)
        info = tell(
            KVSIG_CUDART=cudart, LD_LIBRARY_PATH=str(tmp_path / "driver"), KVSIG_ROUTE="runtime"
        )
        assert info["driver_version"] == 13000 and info["batch"]["path"] == "loop"
        assert "missing: " not in info["batch"]["why"]

    @pytest.mark.known_failure("hidden-function")
    def test_a_wrapper_that_hides_a_function(self, tmp_path):
        """What was seen is what its lookup answered; the function may be there."""
        wrapper = fake_cuda.library(tmp_path / "driver/libcuda.so.1", fake_cuda.WRAPPER)
        source = fake_cuda.CUDART.replace("12090", "12060")
        cudart = fake_cuda.library(tmp_path / "libcudart.so.12", source)
        info = tell(KVSIG_CUDART=cudart, LD_LIBRARY_PATH=str(tmp_path / "driver"))
        said = (
            f"cuGetProcAddress of {wrapper} does not give cuMemcpyBatchAsync of 12.8: it answered"
            " 500 (CUDA_ERROR_NOT_FOUND), with status 1 (CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND)"
        )
        rows = {row["name"]: row for row in info["functions"]}
        assert rows["cuMemcpyBatchAsync"]["why"] == said
        assert info["batch"] == {
            "path": "loop", "why": f"libcudart 12.6 has no cudaMemcpyBatchAsync, and {said}"
        }  # fmt: skip

    def test_without_a_lookup(self, tmp_path, cudart):
        driver = fake_cuda.library(tmp_path / "driver/libcuda.so.1", fake_cuda.DRIVER)
        info = tell(KVSIG_CUDART=cudart, LD_LIBRARY_PATH=str(tmp_path / "driver"))
        rows = {row["name"]: row for row in info["functions"]}
        assert rows["cuMemcpyBatchAsync"]["why"] == (
            "cuMemcpyBatchAsync of 12.8 cannot be looked up: cuGetProcAddress is not bound:"
            f" {driver} is 13.0, in the range 12.0 and later, but does not have"
            " cuGetProcAddress_v2"
        )


@pytest.mark.known_failure("holes-in-sentences")
def test_no_sentence_has_a_hole_where_a_name_should_be(tmp_path):
    """Whatever is there or not: no file is named by nothing."""
    cudart = fake_cuda.library(tmp_path / "libcudart.so.12", fake_cuda.CUDART)
    fake_cuda.library(tmp_path / "stub/libcuda.so.1", fake_cuda.STUB)
    for path in ("", str(tmp_path / "stub")):
        for row in tell(KVSIG_CUDART=cudart, LD_LIBRARY_PATH=path)["functions"]:
            assert not row["why"].startswith(" ") and "  " not in row["why"], row


class TestAskingChangesNothing:
    """Whoever opens the driver's devices has initialised it, and forked children are lost."""

    @pytest.fixture
    def driver(self, tmp_path):
        """Folder with the libcuda of Debian's package."""
        if shutil.which("strace") is None:
            pytest.skip("strace is not installed")
        return debian_libcuda(tmp_path)

    @pytest.mark.known_failure("asking-opens-devices")
    @pytest.mark.parametrize("release", ["12.9.79", "13.0.96"])
    @pytest.mark.parametrize("route", ["auto", "runtime", "driver"])
    def test_info_opens_no_device(self, tmp_path, driver, release, route):
        trace = tmp_path / "trace"
        environment = {
            "KVSIG_CUDART": real(release), "LD_LIBRARY_PATH": driver, "KVSIG_ROUTE": route,
        }  # fmt: skip
        done = subprocess.run(
            ["strace", "-f", "-e", "trace=openat,open,mknod,mknodat", "-o", str(trace),
             sys.executable, "-c",
             "import kvsig; i = kvsig.info(); print(i['driver_library'], i['driver_version'])"],
            capture_output=True, text=True, timeout=120, cwd=PACKAGE.parent,
            env={**os.environ, **environment},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        library, version = done.stdout.split()
        assert os.path.dirname(library) == driver and int(version) >= 12000
        seen = [line for line in trace.read_text().splitlines() if "libcuda.so.1" in line]
        assert seen, "strace saw nothing"
        files = ('"/dev/nv', '"/dev/dxg', '"/proc/driver')
        lines = trace.read_text().splitlines()
        assert [line for line in lines if any(file in line for file in files)] == []


def debian_libcuda(folder):
    """Fetch Debian's package of libcuda by apt, and unpack it; skip where it cannot be had."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        pytest.skip("no apt-get and dpkg-deb to fetch libcuda1 with")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kvsig/libcuda1"
    found = sorted(cache.rglob("libcuda.so.1"))
    if found:
        return str(found[0].parent)
    done = subprocess.run(
        ["apt-get", "download", "libcuda1"], cwd=folder, capture_output=True, text=True, timeout=120
    )
    packages = sorted(folder.glob("libcuda1_*.deb"))
    if done.returncode != 0:
        pytest.skip(f"apt-get download libcuda1: {done.stderr.strip().splitlines()[-1:]}")
    subprocess.run(["dpkg-deb", "-x", str(packages[0]), str(cache)], check=True)
    return str(sorted(cache.rglob("libcuda.so.1"))[0].parent)
