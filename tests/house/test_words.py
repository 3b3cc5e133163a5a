"""What stands in one place only, and what is gone for good."""

from __future__ import annotations

import re

import pytest
from house.sources import CYTHON, ROOT, tracked

#: A type of a CUDA function that is written by hand; generated callers get theirs from the TOML.
PROTOTYPES = re.compile(
    r"\b(?:cudaError_t|CUresult|nvrtcResult)\s*\(\s*\*"
    r"|\bCFUNCTYPE\b"
    r"|\b(?:cuda|cu|nvrtc)[A-Z]\w*\.(?:argtypes|restype)\b"
    r"|^\s*(?:extern\s+)?(?:cudaError_t|CUresult|nvrtcResult)\s+cu\w+\(",
    re.MULTILINE,
)
#: Machinery that timed itself and learnt: paces, slowness of the CPU, teams of threads.
GONE = re.compile(r"\bpaces?\b|\bpaced\b|slowness|\bteams?\b", re.IGNORECASE)
#: An offload by the kernel is slowed down to the rate that the link bears: a figure of one launch.
PACED = {"kvsig/_kernel.pxi", "kvsig/_core.pyi", "csrc/page_copy.cu", "csrc/emulated/page_copy.c"}


def sources(*folders: str) -> dict[str, str]:
    """Text of the code in some folders, by path."""
    return {
        str(path): file.read_text(encoding="utf-8")
        for file in tracked()
        if (path := file.relative_to(ROOT)).parts[0] in folders
        and file.suffix in (".py", ".pyi", ".c", ".h", ".cu", *CYTHON)
    }


def test_prototypes_are_in_the_registry_only():
    """csrc/emulated answers calls by name, and has no prototype of its own either."""
    found = {
        path: match[0]
        for path, text in sources("kvsig", "csrc").items()
        if (match := PROTOTYPES.search(text))
    }
    assert found == {}


@pytest.mark.parametrize(
    "text",
    [
        "ctypedef cudaError_t (*copy_t)(void *dst) noexcept nogil",
        "copy = CFUNCTYPE(c_int, c_void_p)",
        "library.cudaMemcpyAsync.argtypes = [c_void_p]",
        "    CUresult cuInit(unsigned int flags)",
    ],
)
def test_a_prototype_would_be_found(text):
    assert PROTOTYPES.search(text)


def test_nothing_learns():
    found = {
        path: sorted(set(GONE.findall(text)))
        for path, text in sources("kvsig").items()
        if GONE.search(text) and path not in PACED
    }
    assert found == {}
