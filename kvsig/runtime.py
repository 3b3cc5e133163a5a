"""Which libcudart, libcuda and NVRTC this process has, and why.

Nothing of CUDA is called here: it is looked at what is loaded and what is installed, in the order
in which each library comes into question.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from . import _loader
from ._errors import BindError
from .library import Candidate, Library, defect_of_name, files, first, loaded, opened
from .registry import format_version, parse_version

__all__ = [
    "Library",
    "cudart",
    "driver",
    "emulated_libraries",
    "emulated_library",
    "loaded_cudarts",
    "nvrtc",
    "route",
]

CUDART = re.compile(r"libcudart(-[0-9a-f]{8,})?\.so[.\d]*")
DRIVER = re.compile(r"libcuda\.so[.\d]*")
NVRTC = re.compile(r"libnvrtc(-[0-9a-f]{8,})?\.so[.\d]*")
EMULATED = re.compile(r"libcudart-emulated-(\d+\.\d+)\.so")
TORCH_CUDA = ("libc10_cuda.so", "libtorch_cuda.so")
ROUTES = ("auto", "runtime", "driver")
HOWTO = "the path of a libcudart, or emulated:VERSION, such as emulated:12.9"
EMULATED_FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "_emulated")


def route(environ: Mapping[str, str]) -> str:
    """What ``KVSIG_ROUTE`` says: "auto", "runtime" or "driver".

    Raises
    ------
    BindError
        If it is anything else.
    """
    wanted = environ.get("KVSIG_ROUTE", "") or "auto"
    if wanted not in ROUTES:
        raise BindError(f"KVSIG_ROUTE={wanted!r}: use auto, runtime or driver")
    return wanted


# --- libcudart ----------------------------------------------------------------------------------


def emulated_libraries(folder: str = EMULATED_FOLDER) -> list[tuple[int, str]]:
    """First version and path of each emulated runtime that is built, oldest first."""
    paths = files([folder], EMULATED)
    found = ((EMULATED.fullmatch(os.path.basename(path)), path) for path in paths)
    return sorted((parse_version(match[1]), path) for match, path in found if match)


def emulated_library(wanted: int, folder: str = EMULATED_FOLDER) -> str:
    """Path of the emulated runtime that serves a version.

    Raises
    ------
    ValueError
        If nothing is built, or what is built starts later.
    """
    built = emulated_libraries(folder)
    if not built:
        raise ValueError(
            f"no emulated CUDA runtime is built in {folder}: build with"
            " `python setup.py build_ext --inplace`"
        )
    for since, path in reversed(built):
        if since <= wanted:
            return path
    begin = ", ".join(format_version(since) for since, _ in built)
    raise ValueError(
        f"no emulated CUDA runtime serves version {format_version(wanted)}: those that are built"
        f" begin at {begin}"
    )


def loaded_cudarts() -> list[str]:
    """Paths of all libcudarts of this process, each file once."""
    found: dict[str, str] = {}
    for path in loaded(CUDART):
        found.setdefault(os.path.realpath(path), path)
    return list(found.values())


def cudart(spec: str, needed: Sequence[str]) -> Library:
    """Find libcudart, and open it.

    Parameters
    ----------
    spec : str
        As ``KVSIG_CUDART``: a path, a name that the loader knows, ``emulated:VERSION``, or empty.
    needed : sequence of str
        Functions that it must have; where one was asked for by `spec`, only the first.

    Raises
    ------
    BindError
        If there is none; the message names what was looked at, and what is wrong with it.
    """
    if spec:
        return _chosen(spec, needed[:1])
    library = first(_cudart_candidates(), needed)
    if library.handle:
        return library
    _, major, why = _installed_torch()
    if major:
        why = f"the installed torch wants {_soname(major)}, which was not found"
    none = "" if loaded_cudarts() else "no libcudart is loaded in this process, and "
    raise BindError(
        f"no CUDA runtime: {none}{'; '.join([*library.refused, why])}."
        " Install torch with CUDA, import what loads libcudart first, or set KVSIG_CUDART to the"
        " path of a libcudart or to emulated:VERSION, such as emulated:12.9"
    )


def _chosen(spec: str, needed: Sequence[str]) -> Library:
    by_user = spec == os.environ.get("KVSIG_CUDART")
    found = f"KVSIG_CUDART={spec}" if by_user else f"the program asked for {spec}"
    if spec.startswith("emulated:"):
        text, _, over = spec.partition(":")[2].partition("/")
        try:
            version = parse_version(text)
            newest = parse_version(over) if over else version
            path = emulated_library(version)
        except ValueError as error:
            raise BindError(f"KVSIG_CUDART={spec!r}: {error}") from None
        library = opened(path, found, needed)
        if isinstance(library, Library):
            return replace(library, emulate=(version, newest))
        raise BindError(f"{path} {library} ({found}); rebuild kvsig")
    if not os.path.exists(spec) and os.sep in spec:
        raise BindError(f"KVSIG_CUDART={spec!r}: there is no such file; give {HOWTO}")
    library = opened(spec, found, needed)
    if isinstance(library, Library):
        return library
    if library.startswith("does not have"):
        raise BindError(f"{spec} is no CUDA runtime ({found}): it {library}")
    what, _, detail = library.partition(": ")
    raise BindError(f"{spec} {what} ({found}): {detail}; give {HOWTO}")


def _soname(major: str) -> str:
    return "libcudart.so.11.0" if major == "11" else f"libcudart.so.{major}"


def _cudart_candidates() -> Iterator[Candidate]:
    """All libcudarts that come into question, in order."""
    paths = _loader.loaded_libraries()
    for wanted in TORCH_CUDA:
        for path in paths:
            own = _linked_cudart(path) if os.path.basename(path) == wanted else ""
            if own:
                yield own, "loaded in this process, by torch", True
    for path in loaded_cudarts():
        yield path, "loaded in this process", True
    root, major, _ = _installed_torch()
    if not major:
        return
    how, soname = "the installed torch would load it", _soname(major)
    # By the name that torch asks the loader for. A wheel of torch may have it under a name of its
    # own; what another version left there has another number behind.
    name, own = re.escape(soname), rf"libcudart-[0-9a-f]{{8,}}{re.escape(soname[9:])}(\.\d+)*"
    names = re.compile(f"{name}|{own}")
    for path in files(_torch_folders(root, major, "cuda_runtime"), names):
        yield path, how, False
    if defect_of_name(soname):
        yield soname, how, False  # refused by name
    elif _loader.open_library(soname):
        yield soname, how, True


def _linked_cudart(path: str) -> str:
    """The libcudart that a loaded library of torch is bound to; empty where there is none."""
    handle = _loader.open_library(path, only_loaded=True)
    address = _loader.symbol(handle, "cudaRuntimeGetVersion") if handle else 0
    file = _loader.address_file(address) if address else ""
    return file if CUDART.fullmatch(os.path.basename(file)) else ""


def _installed_torch() -> tuple[str, str, str]:
    """Folder of the installed torch and the major of its CUDA; or why there is none."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return "", "", "torch is not installed"
    root = spec.submodule_search_locations[0]
    try:
        with open(os.path.join(root, "version.py"), encoding="utf-8") as file:
            match = re.search(r"^cuda\b[^=]*=\s*['\"](\d+)\.(\d+)", file.read(), re.M)
    except OSError as error:
        return root, "", f"the installed torch has no readable version.py ({error})"
    if match is None:
        return root, "", "the installed torch is built without CUDA"
    return root, match[1], ""


def _torch_folders(root: str, major: str, package: str) -> list[str]:
    """Where torch and NVIDIA's packages beside it keep libraries."""
    folders = [os.path.join(root, "lib")]
    for site in dict.fromkeys([os.path.dirname(root), *sys.path]):
        folders.append(os.path.join(site, "nvidia", f"cu{major}", "lib"))
        folders.append(os.path.join(site, "nvidia", package, "lib"))
    return folders


# --- libcuda and NVRTC --------------------------------------------------------------------------


def driver(sonames: Sequence[str], needed: str, runtime: int = 0) -> Library:
    """Find libcuda: as the loader knows it, loaded already, or where libcudart would find it.

    Parameters
    ----------
    sonames : sequence of str
    needed : str
        A function that it must have.
    runtime : int
        Handle of libcudart, whose own search path counts as well; 0 where there is none.

    Returns
    -------
    Library
        With handle 0, and the reason in ``found``, where there is none.
    """

    def candidates() -> Iterator[Candidate]:
        for soname in sonames:
            yield soname, "known to the loader", False
        for path in loaded(DRIVER):
            yield path, "loaded in this process", True
        for folder in _loader.search_path(runtime) if runtime else ():
            for soname in sonames:
                if os.path.exists(os.path.join(folder, soname)):
                    yield os.path.join(folder, soname), "on libcudart's search path", False

    return first(candidates(), [needed])


def nvrtc(sonames: Sequence[str], needed: str, runtime: str = "") -> Library:
    """Find NVRTC: loaded already, beside libcudart, beside the installed torch, or by its name.

    Parameters and result are those of `driver`, but for `runtime`: the path of libcudart.
    """

    def candidates() -> Iterator[Candidate]:
        for path in loaded(NVRTC):
            yield path, "loaded in this process", True
        folders = []
        if runtime:
            beside = os.path.dirname(os.path.realpath(runtime))
            folders = [beside, os.path.join(beside, "..", "..", "cuda_nvrtc", "lib")]
        root, major, _ = _installed_torch()
        if major:
            folders += _torch_folders(root, major, "cuda_nvrtc")
        for path in files(folders, NVRTC):
            yield path, f"in {os.path.dirname(path)}", False
        for soname in sonames:
            yield soname, "known to the loader", False

    return first(candidates(), [needed])
