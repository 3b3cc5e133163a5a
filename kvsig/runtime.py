"""Which libcudart, libcuda and NVRTC this process has, and why.

Nothing of CUDA is called here: it is looked at what is loaded, what is installed and whether a file
is whole. Every candidate is looked at, and what was refused is named with its reason.
"""

from __future__ import annotations

import importlib.util
import os
import re
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from . import _loader
from ._errors import BindError
from .registry import format_version, parse_version

__all__ = [
    "Library",
    "cudart",
    "defect",
    "driver",
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


@dataclass(frozen=True)
class Library:
    """A library that was found, or why there is none.

    Attributes
    ----------
    handle : int
        The loader's; 0 where there is none.
    path : str
        The file.
    found : str
        How it was found, or why not.
    refused : tuple of str
        What was looked at before, and what is wrong with it.
    emulate : tuple of int, or None
        Versions of the runtime and the driver that an emulated one is asked to be.
    """

    handle: int
    path: str
    found: str
    refused: tuple[str, ...] = ()
    emulate: tuple[int, int] | None = None


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


# --- Files --------------------------------------------------------------------------------------


def defect(path: str) -> str | None:
    """Why a file is no whole 64-bit shared library, or None.

    The loader maps what the headers say and dies by SIGBUS where the file ends before.
    """
    try:
        size = os.stat(path).st_size
        if not os.path.isfile(path):
            return "is no file: it is a folder or a device"
        with open(path, "rb") as file:
            head = file.read(64)
            if len(head) < 64 or head[:6] != b"\x7fELF\x02\x01":
                return None  # the loader says what is wrong with it
            start, sections = struct.unpack_from("<QQ", head, 32)
            each, count, section, how_many = struct.unpack_from("<HHHH", head, 54)
            file.seek(min(start, size))
            table = file.read(each * count)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    needed = max(start + each * count, sections + section * how_many)
    if each >= 56 and len(table) == each * count:
        for at in range(0, len(table), each):
            kind, offset = struct.unpack_from("<I4xQ", table, at)
            (length,) = struct.unpack_from("<Q", table, at + 32)
            if kind == 1:  # a part of the file that is mapped
                needed = max(needed, offset + length)
    if needed > size:
        return f"is cut off: it has {size} bytes, and its headers speak of {needed}"
    return None


def _opened(
    path: str, found: str, needed: Sequence[str], *, is_loaded: bool = False
) -> Library | str:
    """Open a library that must have some functions; what is wrong with it otherwise."""
    if not is_loaded and os.sep in path:
        wrong = defect(path)
        if wrong:
            return wrong
    handle = _loader.open_library(path)
    if not handle:
        return f"cannot be loaded: {_loader.open_error()}"
    for name in needed:
        if not _loader.symbol(handle, name):
            return f"does not have {name}"
    return Library(handle, _loader.address_file(_loader.symbol(handle, needed[0])) or path, found)


def _first(candidates: Iterator[tuple[str, str, bool]], needed: Sequence[str]) -> Library:
    """The first candidate (path, how it was found, whether it is loaded) that is whole."""
    refused: list[str] = []
    seen = set()
    for path, found, is_loaded in candidates:
        real = os.path.realpath(path)
        if real in seen:
            continue
        seen.add(real)
        library = _opened(path, found, needed, is_loaded=is_loaded)
        if isinstance(library, Library):
            return replace(library, refused=tuple(refused))
        refused.append(f"{path} {library}")
    return Library(0, "", "", tuple(refused))


# --- libcudart ----------------------------------------------------------------------------------


def emulated_library(text: str, folder: str = EMULATED_FOLDER) -> str:
    """Path of the emulated runtime that serves a version, such as "12.9".

    Raises
    ------
    ValueError
        If the text is no version, nothing is built, or what is built starts later.
    """
    wanted = parse_version(text)
    names = os.listdir(folder) if os.path.isdir(folder) else []
    built = sorted(
        (parse_version(match[1]), name) for name in names if (match := EMULATED.fullmatch(name))
    )
    if not built:
        raise ValueError(
            f"no emulated CUDA runtime is built in {folder}: build with"
            " `python setup.py build_ext --inplace`"
        )
    for since, name in reversed(built):
        if since <= wanted:
            return os.path.join(folder, name)
    begin = ", ".join(format_version(since) for since, _ in built)
    raise ValueError(
        f"no emulated CUDA runtime serves version {format_version(wanted)}: those that are built"
        f" begin at {begin}"
    )


def loaded_cudarts() -> list[str]:
    """Paths of all libcudarts of this process, each file once."""
    found: dict[str, str] = {}
    for path in _loader.loaded_libraries():
        if CUDART.fullmatch(os.path.basename(path)):
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
    why = [""]
    library = _first(_candidates(why), needed)
    if library.handle:
        return library
    loaded = "no libcudart is loaded in this process, and "
    raise BindError(
        f"no CUDA runtime: {'' if loaded_cudarts() else loaded}"
        f"{'; '.join([*library.refused, why[0]])}."
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
            path = emulated_library(text)
        except ValueError as error:
            raise BindError(f"KVSIG_CUDART={spec!r}: {error}") from None
        library = _opened(path, found, needed)
        if isinstance(library, Library):
            return replace(library, emulate=(version, newest))
        raise BindError(f"{path} {library} ({found}); rebuild kvsig")
    if not os.path.exists(spec) and os.sep in spec:
        raise BindError(f"KVSIG_CUDART={spec!r}: there is no such file; give {HOWTO}")
    library = _opened(spec, found, needed)
    if isinstance(library, Library):
        return library
    if library.startswith("does not have"):
        raise BindError(f"{spec} is no CUDA runtime ({found}): it {library}")
    what, _, detail = library.partition(": ")
    raise BindError(f"{spec} {what} ({found}): {detail}; give {HOWTO}")


def _candidates(why: list[str]) -> Iterator[tuple[str, str, bool]]:
    """All libcudarts that come into question, in order; says in `why` if one is not installed."""
    paths = _loader.loaded_libraries()
    for wanted in TORCH_CUDA:
        for path in paths:
            if os.path.basename(path) == wanted:
                own = _linked_cudart(path)
                if own:
                    yield own, "loaded in this process, by torch", True
    for path in loaded_cudarts():
        yield path, "loaded in this process", True
    root, major, why[0] = _installed_torch()
    if not major:
        return
    soname = "libcudart.so.11.0" if major == "11" else f"libcudart.so.{major}"
    how = "the installed torch would load it"
    # A wheel of torch may have it under a name of its own; what another version left there has
    # another number behind.
    own_name = re.compile(rf"libcudart-[0-9a-f]{{8,}}{re.escape(soname[9:])}(\.\d+)*")
    for folder in _torch_folders(root, major, "cuda_runtime"):
        if os.path.exists(os.path.join(folder, soname)):
            yield os.path.join(folder, soname), how, False
        if folder == os.path.join(root, "lib") and os.path.isdir(folder):
            for name in sorted(os.listdir(folder)):
                if own_name.fullmatch(name):
                    yield os.path.join(folder, name), how, False
    if _loader.open_library(soname):
        yield soname, how, True
    why[0] = f"the installed torch wants {soname}, which was not found"


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

    def candidates() -> Iterator[tuple[str, str, bool]]:
        for soname in sonames:
            yield soname, "known to the loader", False
        for path in _loader.loaded_libraries():
            if DRIVER.fullmatch(os.path.basename(path)):
                yield path, "loaded in this process", True
        for folder in _loader.search_path(runtime) if runtime else ():
            for soname in sonames:
                if os.path.exists(os.path.join(folder, soname)):
                    yield os.path.join(folder, soname), "on libcudart's search path", False

    library = _first(candidates(), [needed])
    return library if library.handle else replace(library, found="; ".join(library.refused))


def nvrtc(sonames: Sequence[str], needed: str, runtime: str = "") -> Library:
    """Find NVRTC: loaded already, beside libcudart, beside the installed torch, or by its name.

    Parameters and result are those of `driver`, but for `runtime`: the path of libcudart.
    """

    def candidates() -> Iterator[tuple[str, str, bool]]:
        for path in _loader.loaded_libraries():
            if NVRTC.fullmatch(os.path.basename(path)):
                yield path, "loaded in this process", True
        folders = []
        if runtime:
            beside = os.path.dirname(os.path.realpath(runtime))
            folders = [beside, os.path.join(beside, "..", "..", "cuda_nvrtc", "lib")]
        root, major, _ = _installed_torch()
        if major:
            folders += _torch_folders(root, major, "cuda_nvrtc")
        for folder in folders:
            if os.path.isdir(folder):
                for name in sorted(os.listdir(folder), reverse=True):
                    if NVRTC.fullmatch(name):
                        yield os.path.join(folder, name), f"in {folder}", False
        for soname in sonames:
            yield soname, "known to the loader", False

    library = _first(candidates(), [needed])
    return library if library.handle else replace(library, found="; ".join(library.refused))
