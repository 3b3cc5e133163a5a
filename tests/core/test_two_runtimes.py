"""Two real libcudarts in one process: version and functions come from one file, always.

Each case in a process of its own. ``dladdr`` tells which file an address lies in.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from kvsig import _core, registry
from kvsig.check import releases

ROOT = Path(_core.__file__).parent.parent
OLD, NEW = "12.9.79", "13.0.96"
LINKED = """
int cudaRuntimeGetVersion(int *version);
int linked_version(void) { int version = 0; cudaRuntimeGetVersion(&version); return version; }
"""
# The pairing that this project is about: one library tells the version, another has the function.
NAIVE = (
    """
#define _GNU_SOURCE
#include <dlfcn.h>
"""
    + LINKED
    + """
void *naive_function(void) { return dlsym(RTLD_DEFAULT, "cudaMemcpyBatchAsync"); }
void *naive_version_function(void) { return (void *)cudaRuntimeGetVersion; }
"""
)

PROBE = """
import ctypes, json, os, sys
for path, mode in json.loads(sys.argv[1]):
    ctypes.CDLL(path, mode=mode)
if sys.argv[2]:
    sys.path.insert(0, sys.argv[2])
    import torch
import numpy as np
import kvsig
from kvsig import _core
info = _core.info()
rows = {row["name"]: row for row in info["functions"]}
if len(sys.argv) > 3:
    ctypes.CDLL(sys.argv[3])
    info = _core.info()
lists = [np.array([v], np.uint64) for v in (0, 0, 8, 0)]
source, target = np.arange(8, dtype=np.uint8), np.zeros(8, np.uint8)
lists[0][0], lists[1][0] = target.ctypes.data, source.ctypes.data
error = None
try:
    kvsig.call("cudaMemcpyBatchAsync", dsts=lists[0], srcs=lists[1], sizes=lists[2], count=1,
               attrs=(1, (0, 0), (0, 0), 0), attrsIdxs=lists[3], numAttrs=1, stream=2)
except _core.CudaError as caught:
    error = [caught.code, caught.library, caught.variant]
try:
    devices = kvsig.call("cudaGetDeviceCount")
except _core.CudaError:
    devices = 0
print(json.dumps({
    "info": info, "error": error, "devices": devices,
    "version_file": _core.address_file(rows["cudaRuntimeGetVersion"]["address"]),
    "files": [_core.address_file(row["address"]) for row in rows.values()
              if row["address"] and row["library"] == "cudart"],
}))
"""


@pytest.fixture(scope="module")
def libraries():
    """Paths of the two libraries."""
    try:
        return {release: str(releases.library(release)) for release in (OLD, NEW)}
    except releases.ReleaseError as error:
        if "package index cannot be reached" not in str(error):
            raise
        pytest.skip(str(error))


def compiled(source, target, library):
    """A shared library that is linked to a libcudart."""
    target.parent.mkdir(parents=True, exist_ok=True)
    text = target.with_suffix(".c")
    text.write_text(source)
    command = [
        *shlex.split(os.environ.get("CC", "cc")), "-shared", "-fPIC", "-o", str(target), str(text),
        library, f"-Wl,-rpath,{os.path.dirname(library)}", "-Wl,--no-as-needed", "-ldl",
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return str(target)


def run(load, cudart=None, site="", later=None, script=PROBE):
    """What a fresh process tells that loads these (path, mode) first, and its warnings."""
    environment = {
        key: value for key, value in os.environ.items()
        if key not in ("KVSIG_CUDART", "KVSIG_ROUTE", "LD_LIBRARY_PATH")
    }  # fmt: skip
    if cudart:
        environment["KVSIG_CUDART"] = cudart
    arguments = [json.dumps(load), str(site), *([later] if later else [])]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=120,
        cwd=ROOT, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stderr}"
    return json.loads(done.stdout), done.stderr


def of_one_file(version, version_file, files):
    """Whether a version and the functions used by it are of one library, that tells it."""
    release = OLD if version == 12090 else NEW
    same = {os.path.realpath(file) for file in [version_file, *files]}
    return len(same) == 1 and f"libcudart.so.{release.split('.')[0]}" in same.pop()


def check(libraries, found, warned, release, both=True):
    info = found["info"]
    version = registry.parse_version(".".join(release.split(".")[:2]))
    assert info["runtime_version"] == version
    assert os.path.samefile(info["library"], libraries[release])
    assert of_one_file(version, found["version_file"], found["files"])
    assert len(found["files"]) > 40
    variant = registry.load().functions["cudaMemcpyBatchAsync"].select(version)
    row = next(row for row in info["functions"] if row["name"] == "cudaMemcpyBatchAsync")
    assert row["variant"] == variant.label
    if found["devices"]:
        assert found["error"] is None
    else:
        code, library, label = found["error"]
        assert code == 35 and label == variant.label
        assert os.path.samefile(library, libraries[release])
    if both:
        other = next(path for key, path in libraries.items() if key != release)
        expected = (
            f"more than one libcudart is loaded: kvsig uses {info['library']}, and beside it there"
            f" is {other}. Version and functions come from the first alone"
        )
        named = {os.path.realpath(path) for path in info["libraries"]}
        assert named == {os.path.realpath(path) for path in libraries.values()}
        assert info["warnings"] == [expected]
        assert expected in warned


ORDERS = [(OLD, NEW), (NEW, OLD)]
MODES = {"global": os.RTLD_GLOBAL, "local": os.RTLD_LOCAL}
LOCAL = os.RTLD_LOCAL

orders = pytest.mark.parametrize("order", ORDERS, ids=["12-first", "13-first"])
modes = pytest.mark.parametrize("mode", MODES.values(), ids=list(MODES))


@pytest.mark.known_failure("two-runtimes")
@orders
@modes
@pytest.mark.parametrize("wanted", [OLD, NEW])
def test_by_kvsig_cudart(libraries, order, mode, wanted):
    load = [(libraries[release], mode) for release in order]
    check(libraries, *run(load, cudart=libraries[wanted]), wanted)


@pytest.mark.known_failure("loaded-first")
@orders
@modes
def test_the_first_that_is_loaded(libraries, order, mode):
    load = [(libraries[release], mode) for release in order]
    check(libraries, *run(load), order[0])


@pytest.mark.known_failure("loaded-local")
@orders
def test_one_global_one_local(libraries, order):
    load = [(libraries[order[0]], LOCAL), (libraries[order[1]], os.RTLD_GLOBAL)]
    check(libraries, *run(load), order[0])


@orders
@modes
def test_by_an_extension_that_is_linked_to_one(libraries, tmp_path, order, mode):
    """The extension brings its libcudart along, before or after the other one."""
    first, second = order
    linked = compiled(LINKED, tmp_path / "extension.so", libraries[first])
    check(libraries, *run([(linked, mode), (libraries[second], mode)]), first)
    check(libraries, *run([(libraries[second], mode), (linked, mode)]), second)


@pytest.mark.parametrize("release", [OLD, NEW])
def test_kvsig_cudart_may_name_what_is_linked_to_it(libraries, tmp_path, release):
    other = NEW if release == OLD else OLD
    linked = compiled(LINKED, tmp_path / "extension.so", libraries[release])
    load = [(libraries[other], os.RTLD_GLOBAL)]
    check(libraries, *run(load, cudart=linked), release)


def fake_torch(folder, library, loads=True):
    """The part of an installed torch that matters here: its layout, version and libraries."""
    lib = folder / "torch/lib"
    compiled(LINKED, lib / "libc10_cuda.so", library)
    major = library.rpartition(".so.")[2]
    (folder / "torch/version.py").write_text(f"cuda: str = '{major}.0'\n")
    text = "import ctypes, os\n"
    if loads:
        text += (
            "ctypes.CDLL(os.path.join(os.path.dirname(__file__), 'lib/libc10_cuda.so'),"
            " ctypes.RTLD_GLOBAL)\n"
        )
    (folder / "torch/__init__.py").write_text(text)
    return folder


@modes
@pytest.mark.parametrize("release", [OLD, NEW])
def test_torchs_own_comes_first(libraries, tmp_path, release, mode):
    """Another libcudart is loaded before torch; kvsig takes the one that torch is linked to."""
    other = NEW if release == OLD else OLD
    site = fake_torch(tmp_path, libraries[release])
    found, warned = run([(libraries[other], mode)], site=site)
    assert found["info"]["found"] == "loaded in this process, by torch"
    check(libraries, found, warned, release)


@pytest.mark.parametrize("release", [OLD, NEW])
def test_the_installed_torchs_is_loaded_where_none_is(libraries, tmp_path, release):
    site = fake_torch(tmp_path, libraries[release], loads=False)
    folder = {OLD: "nvidia/cuda_runtime/lib", NEW: "nvidia/cu13/lib"}[release]
    (tmp_path / folder).mkdir(parents=True)
    link = tmp_path / folder / os.path.basename(libraries[release])
    link.symlink_to(libraries[release])
    found, warned = run([], site=site)
    assert found["info"]["found"] == "the installed torch would load it"
    check(libraries, found, warned, release, both=False)
    assert found["info"]["warnings"] == [] and len(found["info"]["libraries"]) == 1


@pytest.mark.known_failure("loaded-first")
@orders
def test_one_that_is_loaded_after_binding_changes_nothing_but_the_warning(libraries, order):
    bound, later = order
    found, _ = run([(libraries[bound], LOCAL)], later=libraries[later])
    check(libraries, found, found["info"]["warnings"][0], bound)


NAIVE_PROBE = """
import ctypes, json, sys
import kvsig
from kvsig import _core
load = json.loads(sys.argv[1])
for path, mode in load[:-1]:
    ctypes.CDLL(path, mode=mode)
naive = ctypes.CDLL(load[-1][0])
for name in ("naive_function", "naive_version_function"):
    getattr(naive, name).restype = ctypes.c_size_t
print(json.dumps([naive.linked_version(), _core.address_file(naive.naive_version_function()),
                  [_core.address_file(naive.naive_function())]]))
"""


@pytest.mark.known_failure("built-for-another")
@orders
def test_the_naive_pairing_is_caught(libraries, tmp_path, order):
    """Version by a linked symbol, function by RTLD_DEFAULT: two files, and the check sees it."""
    first, second = order
    naive = compiled(NAIVE, tmp_path / "naive.so", libraries[second])
    load = [(libraries[first], os.RTLD_GLOBAL), (libraries[second], os.RTLD_GLOBAL)]
    (version, version_file, files), _ = run([*load, (naive, LOCAL)], script=NAIVE_PROBE)
    assert version == registry.parse_version(".".join(second.split(".")[:2]))
    assert os.path.samefile(version_file, libraries[second])
    assert os.path.samefile(files[0], libraries[first])
    assert not of_one_file(version, version_file, files)
