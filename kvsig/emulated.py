"""The emulated CUDA runtimes: finding them, building others, and telling them what to do.

An emulated runtime is a shared library that stands in for libcudart on a machine without a GPU
and in tests. Device memory is host memory there, streams are queues with deferred execution, and
faults can be ordered. The build makes one for each ABI of the registry; ``KVSIG_CUDART`` set to
``emulated:12.9`` binds kvsig to the one that serves CUDA 12.9. No timing taken on it says
anything about a GPU.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shlex
import subprocess
from collections.abc import Collection
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from kvsig.registry import Registry, format_version

__all__ = ["Control", "Library", "Stream", "available", "build", "parse", "resolve"]

DIRECTORY = Path(__file__).resolve().parent / "_emulated"
SOURCES = Path(__file__).resolve().parent.parent / "csrc"
REBUILD = "python setup.py build_ext --inplace"
NOT_READY = 600

_FILE = re.compile(r"libcudart-emulated-(\d+)\.(\d+)\.so")
_VERSION = re.compile(r"(?:emulated:)?(\d+)\.(\d+)")


class Library(NamedTuple):
    """One emulated runtime: it serves the versions in [since, before)."""

    since: int
    before: int | None
    path: Path


def parse(version: str | int) -> int:
    """Return a version as CUDA counts.

    Parameters
    ----------
    version : str or int
        "12.9", "emulated:12.9" or 12090.

    Returns
    -------
    int
        12090 for all three.

    Raises
    ------
    ValueError
        The text is no version.
    """
    if isinstance(version, int):
        return version
    match = _VERSION.fullmatch(version.strip())
    if match is None:
        raise ValueError(
            f"{version!r} names no version of an emulated CUDA runtime: "
            'write MAJOR.MINOR, such as "12.9" or "emulated:12.9"'
        )
    return int(match[1]) * 1000 + int(match[2]) * 10


def available(directory: Path | str | None = None) -> list[Library]:
    """Return the emulated runtimes that are built, oldest first.

    Parameters
    ----------
    directory : path-like, optional
        Where to look; by default where the build of kvsig puts them.

    Returns
    -------
    list of Library
        Each serves the versions up to the next one's first; the last has no end.
    """
    folder = DIRECTORY if directory is None else Path(directory)
    found = []
    for path in folder.glob("libcudart-emulated-*.so"):
        if match := _FILE.fullmatch(path.name):
            found.append((int(match[1]) * 1000 + int(match[2]) * 10, path))
    found.sort()
    ends = [*(since for since, _ in found[1:]), None]
    return [Library(since, end, path) for (since, path), end in zip(found, ends, strict=False)]


def resolve(version: str | int, directory: Path | str | None = None) -> Path:
    """Return the emulated runtime that serves a version.

    Parameters
    ----------
    version : str or int
        "12.9", "emulated:12.9" or 12090.
    directory : path-like, optional
        Where to look; by default where the build of kvsig puts them.

    Returns
    -------
    Path

    Raises
    ------
    ValueError
        The text is no version, nothing is built, or what is built starts later.
    """
    wanted = parse(version)
    libraries = available(directory)
    if not libraries:
        folder = DIRECTORY if directory is None else directory
        raise ValueError(f"no emulated CUDA runtime is built in {folder}: build with `{REBUILD}`")
    for library in reversed(libraries):
        if library.since <= wanted:
            return library.path
    names = ", ".join(format_version(library.since) for library in libraries)
    raise ValueError(
        f"no emulated CUDA runtime serves version {format_version(wanted)}: "
        f"those that are built begin at {names}"
    )


def build(
    registry: Registry,
    version: str | int,
    directory: Path | str,
    without: Collection[str] = (),
) -> Path:
    """Compile an emulated runtime from a registry.

    Parameters
    ----------
    registry : Registry
        Where the prototypes come from.
    version : str or int
        A version that the library is to serve, such as "14.0" or 14000.
    directory : path-like
        Where the library goes; made if missing.
    without : collection of str, optional
        Symbols that the library is not to export.

    Returns
    -------
    Path
        The library.

    Raises
    ------
    RuntimeError
        The C sources are not there (they are part of the source tree, not of a wheel), or the
        compiler failed.
    """
    source = SOURCES / "emulated.c"
    if not source.is_file():
        raise RuntimeError(
            f"an emulated CUDA runtime is compiled from csrc/emulated.c, and {source} is not "
            "there: it is part of kvsig's source tree, not of an installed wheel"
        )
    number = parse(version)
    glue: str = import_module("kvsig.codegen").emulated_glue(registry, number, without=without)
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    name = f"libcudart-emulated-{format_version(number)}"
    text = folder / f"{name}.c"
    text.write_text(glue)
    common = folder / "emulated.o"  # the same for every version
    newest = max(source.stat().st_mtime, (SOURCES / "emulated.h").stat().st_mtime)
    if not common.exists() or common.stat().st_mtime <= newest:
        _compile(["-c", str(source), "-o", str(common)])
    # Linked under another name first, so that a library which is loaded is not written over.
    library, fresh = folder / f"{name}.so", folder / f"{name}.so.new"
    _compile(["-shared", str(text), str(common), "-o", str(fresh), "-ldl"])
    fresh.replace(library)
    return library


def _compile(arguments: list[str]) -> None:
    compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    flags = ["-std=gnu11", "-O2", "-fPIC", "-pthread", "-fvisibility=hidden", f"-I{SOURCES}"]
    command = [*compiler, *flags, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise RuntimeError(
            f"no C compiler to build an emulated CUDA runtime: {compiler[0]}: {error.strerror}; "
            "set CC to one"
        ) from error
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr}")


_c_int_p = ctypes.POINTER(ctypes.c_int)
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "abi": (None, [_c_int_p, _c_int_p]),
    "set_version": (None, [ctypes.c_int, ctypes.c_int]),
    "set_devices": (None, [ctypes.c_int]),
    "set_attribute": (None, [ctypes.c_int, ctypes.c_int]),
    "fault": (None, [ctypes.c_char_p, ctypes.c_int, ctypes.c_long, ctypes.c_long]),
    "stub": (None, [ctypes.c_char_p, ctypes.c_int]),
    "delay": (None, [ctypes.c_char_p, ctypes.c_long]),
    "record": (None, [ctypes.c_int]),
    "calls": (ctypes.c_void_p, []),
    "free": (None, [ctypes.c_void_p]),
    "counter": (ctypes.c_longlong, [ctypes.c_char_p]),
    "hold": (ctypes.c_int, [ctypes.c_void_p]),
    "release": (ctypes.c_int, [ctypes.c_void_p]),
    "pending": (ctypes.c_longlong, [ctypes.c_void_p]),
    "stream_create": (ctypes.c_void_p, [ctypes.c_uint]),
    "stream_synchronize": (ctypes.c_int, [ctypes.c_void_p]),
    "stream_query": (ctypes.c_int, [ctypes.c_void_p]),
    "stream_destroy": (ctypes.c_int, [ctypes.c_void_p]),
    "mark_device": (ctypes.c_int, [ctypes.c_void_p, ctypes.c_size_t]),
    "unmark_device": (ctypes.c_int, [ctypes.c_void_p]),
    "reset": (ctypes.c_int, []),
}


def _handle(stream: Any) -> int:
    return int(getattr(stream, "cuda_stream", stream))


class Control:
    """What a test or a demo tells an emulated runtime, and what it asks it.

    The library is loaded if it is not yet; its state is the process's, so every Control of the
    same file speaks to the same runtime, the one that kvsig is bound to included.

    Parameters
    ----------
    library : path-like, str or int
        A library file, or a version to `resolve`.

    Attributes
    ----------
    path : Path
        The library file.
    library : ctypes.CDLL
        It, loaded.
    """

    def __init__(self, library: Path | str | int) -> None:
        if isinstance(library, int) or (
            isinstance(library, str) and _VERSION.fullmatch(library.strip())
        ):
            self.path = resolve(library)
        else:
            self.path = Path(library)
        self.library = ctypes.CDLL(str(self.path))
        for name, (result, arguments) in _SIGNATURES.items():
            try:
                function = getattr(self.library, f"kvsig_emulated_{name}")
            except AttributeError:
                raise ValueError(
                    f"{self.path} is not an emulated CUDA runtime of this kvsig: "
                    f"it lacks kvsig_emulated_{name}"
                ) from None
            function.restype, function.argtypes = result, arguments

    def _ask(self, name: str, *arguments: Any) -> Any:
        return getattr(self.library, f"kvsig_emulated_{name}")(*arguments)

    def _check(self, name: str, *arguments: Any) -> None:
        if code := self._ask(name, *arguments):
            shown = ", ".join(hex(argument) for argument in arguments)
            raise RuntimeError(f"emulated {name}({shown}) answered error {code}")

    @property
    def abi(self) -> tuple[int, int]:
        """First version that the library serves, and the first that it no longer does."""
        since, before = ctypes.c_int(), ctypes.c_int()
        self._ask("abi", ctypes.byref(since), ctypes.byref(before))
        return since.value, before.value

    def set_version(self, runtime: str | int, driver: str | int | None = None) -> None:
        """Set the versions that the library claims.

        Parameters
        ----------
        runtime : str or int
            Need not be one that the library serves.
        driver : str or int, optional
            By default the runtime's. 0 stands for no driver: all but version and error
            queries answer 35 (InsufficientDriver).
        """
        number = parse(runtime)
        self._ask("set_version", number, number if driver is None else parse(driver))

    def set_devices(self, count: int) -> None:
        """Set the number of devices, 0 to 16."""
        self._ask("set_devices", count)

    def set_attribute(self, attribute: int, value: int) -> None:
        """Set what cudaDeviceGetAttribute answers for an attribute."""
        self._ask("set_attribute", attribute, value)

    def fault(self, function: str, error: int, nth: int = 1, fail_index: int = -1) -> None:
        """Order a fault.

        Parameters
        ----------
        function : str
            A function by its name in the registry.
        error : int
            The code that it answers instead of doing anything.
        nth : int, default 1
            The call that it strikes, counted from now, the first being 1; 0 is every call.
        fail_index : int, default -1
            For batch functions: the copy that fails. Those before it are made, and
            ``failIdx`` is set where the variant has it.
        """
        self._ask("fault", function.encode(), error, nth, fail_index)

    def stub(self, function: str | None = None, on: bool = True) -> None:
        """Let a function (or all) only be recorded and succeed, whatever its arguments."""
        self._ask("stub", None if function is None else function.encode(), on)

    def delay(self, function: str, microseconds: int) -> None:
        """Keep the caller of a function so much longer at each call, asleep; 0 ends it.

        Parameters
        ----------
        function : str
            A function by its name in the registry.
        microseconds : int
            At least 0.

        Raises
        ------
        ValueError
            If `microseconds` is negative.
        """
        if microseconds < 0:
            raise ValueError(f"microseconds must be at least 0, not {microseconds}")
        self._ask("delay", function.encode(), microseconds)

    def record(self, on: bool = True) -> None:
        """Start to record calls, forgetting earlier ones, or stop."""
        self._ask("record", on)

    def calls(self, function: str | None = None) -> list[dict[str, Any]]:
        """Return the recorded calls, oldest first; the newest 65,536 are kept.

        Parameters
        ----------
        function : str, optional
            Only the calls of this function.

        Returns
        -------
        list of dict
            ``function``, ``symbol``, ``variant``, ``result``, ``arguments`` (each a dict of
            ``name``, ``type`` and ``value``, or ``bytes`` in hex for a struct by value) and,
            for calls that take lists of copies, ``observed``: what the arguments pointed to.
        """
        address = self._ask("calls")
        try:
            text = ctypes.string_at(address).decode("ascii")
        finally:
            self._ask("free", address)
        calls: list[dict[str, Any]] = json.loads(text)
        return [call for call in calls if function in (None, call["function"])]

    def counter(self, name: str) -> int:
        """Return a count since the last reset.

        Parameters
        ----------
        name : str
            "calls" (of any function), "operations" (finished by queues), "copies" and "bytes"
            (made), "batches" (accepted), or "dropped" (recorded calls that were not kept).
        """
        value = int(self._ask("counter", name.encode()))
        if value < 0:
            raise ValueError(
                f"no counter {name!r}: there are calls, operations, copies, bytes, batches, dropped"
            )
        return value

    def hold(self, stream: Any) -> None:
        """Keep a stream's queue from starting any more work."""
        self._check("hold", _handle(stream))

    def release(self, stream: Any) -> None:
        """Let a held queue go on."""
        self._check("release", _handle(stream))

    def pending(self, stream: Any) -> int:
        """Return the number of operations of a stream that are not finished."""
        pending = int(self._ask("pending", _handle(stream)))
        if pending < 0:
            raise RuntimeError(f"no emulated stream has the handle {_handle(stream):#x}")
        return pending

    def synchronize(self, stream: Any = 0) -> None:
        """Wait for a stream; 0, the legacy stream, stands for all blocking ones."""
        self._check("stream_synchronize", _handle(stream))

    def mark_device(self, pointer: int, size: int) -> None:
        """Let host memory count as device memory until `unmark_device` or `reset`."""
        self._check("mark_device", pointer, size)

    def unmark_device(self, pointer: int) -> None:
        """Take back `mark_device`."""
        self._check("unmark_device", pointer)

    def reset(self) -> None:
        """Forget faults, stubs, delays, records, marks and settings; release and drain queues.

        Versions stay as they are, since kvsig has bound itself by them.

        Raises
        ------
        RuntimeError
            A queue did not run dry within ten seconds.
        """
        self._check("reset")


class Stream:
    """An emulated stream, as other code hands torch's streams to kvsig.

    Parameters
    ----------
    library : Control, path-like, str or int, optional
        The emulated runtime; by default the one that kvsig is bound to.
    blocking : bool, default False
        Whether the stream is ordered with the legacy stream.

    Attributes
    ----------
    cuda_stream : int
        The handle.
    control : Control
        The runtime that it belongs to.
    """

    def __init__(
        self, library: Control | Path | str | int | None = None, *, blocking: bool = False
    ) -> None:
        if library is None:
            library = str(import_module("kvsig._core").info()["library"])
        self.control = library if isinstance(library, Control) else Control(library)
        self.cuda_stream: int = self.control._ask("stream_create", 0 if blocking else 1)

    def synchronize(self) -> None:
        """Wait for all work of the stream."""
        self.control.synchronize(self)

    def query(self) -> bool:
        """Whether all work of the stream is done."""
        code = self.control._ask("stream_query", self.cuda_stream)
        if code not in (0, NOT_READY):
            raise RuntimeError(f"emulated stream_query answered error {code}")
        return bool(code == 0)

    def hold(self) -> None:
        """Keep the queue from starting any more work."""
        self.control.hold(self)

    def release(self) -> None:
        """Let a held queue go on."""
        self.control.release(self)

    @property
    def pending(self) -> int:
        """Number of operations that are not finished."""
        return self.control.pending(self)

    def destroy(self) -> None:
        """Give the stream back; work that it still has is finished first."""
        self.control._check("stream_destroy", self.cuda_stream)

    def __enter__(self) -> Stream:
        """Give the stream itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Release the queue, wait for it unless an error is on its way, and give it back."""
        self.release()
        if kind is None:
            self.synchronize()
        self.destroy()
