"""Telling an emulated runtime what to do, and its streams."""

from __future__ import annotations

import ctypes
import json
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

from kvsig.emulated.libraries import is_version, parse, resolve

NOT_READY = 600

_c_int_p = ctypes.POINTER(ctypes.c_int)
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "abi": (None, [_c_int_p, _c_int_p]),
    "set_version": (None, [ctypes.c_int, ctypes.c_int]),
    "set_state": (ctypes.c_int, [ctypes.c_char_p]),
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
    "mark": (ctypes.c_int, [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int]),
    "unmark": (ctypes.c_int, [ctypes.c_void_p]),
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
        if isinstance(library, int) or (isinstance(library, str) and is_version(library)):
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

    def set_driver(self, state: str | int) -> None:
        """Put the driver into a state that programs meet in the field.

        ``KVSIG_EMULATED_DRIVER`` in the environment puts it there when the library is loaded,
        for programs that cannot be told.

        Parameters
        ----------
        state : str or int
            "ready", as it is at first; "missing": its version is 0, calls answer 35
            (InsufficientDriver); "old": its version is a major behind the runtime's, the
            runtime's calls answer 35, the driver's own work; "stub": a stub library in the
            driver's place, 34 (StubLibrary) from calls and from the driver's version; "lost": a
            device that met an illegal address, 700 from calls and from every later
            cudaGetLastError; "uninitialised": 3 (InitializationError) from calls. Or the code
            that calls answer, such as 802 (SystemNotReady), 804 (CompatNotSupportedOnDevice) or
            807 (MpsServerNotReady). The runtime's version and the texts of errors can be asked
            for in every state.

        Raises
        ------
        ValueError
            There is no such state.
        """
        if self._ask("set_state", str(state).encode()):
            raise ValueError(
                f"the emulated driver has no state {state!r}: there are ready, missing, old, stub, "
                "lost, uninitialised, and the error code that calls are to answer, 1 to 999"
            )

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
            "calls" (of any function), "unknown" (of functions that the registry has and the
            emulated runtime does not know: they answer 801, NotSupported), "operations"
            (finished by queues), "copies" and "bytes" (made), "batches" (accepted), "launches"
            (of kernels, done), or "dropped" (recorded calls that were not kept).
        """
        value = int(self._ask("counter", name.encode()))
        if value < 0:
            raise ValueError(
                f"no counter {name!r}: there are calls, operations, copies, bytes, batches, "
                "launches, unknown, dropped"
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

    def mark_device(self, pointer: int, size: int, device: int = 0) -> None:
        """Let a range of host memory count as one allocation of device memory.

        Copies that leave the range, or run into it from outside, are refused as CUDA refuses
        them (1, InvalidValue), and cuPointerGetAttribute answers the range. Ranges may touch:
        that is a seam between two allocations.

        Parameters
        ----------
        pointer : int
            Address of the first byte.
        size : int
            Bytes.
        device : int, default 0
            The device that the memory is said to be on.

        Raises
        ------
        RuntimeError
            The range is empty (error 1), or a part of it is marked, allocated or registered
            already (error 712).
        """
        self._check("mark", pointer, size, 0, device)

    def mark_host(self, pointer: int, size: int, device: int = 0) -> None:
        """Let a range count as one chunk of registered (pinned) host memory.

        As `mark_device`, but ``reset`` forgets it, where it keeps what cudaHostRegister has
        registered. A pool that is registered in chunks, or in part, is marked chunk by chunk.
        """
        self._check("mark", pointer, size, 1, device)

    def unmark(self, pointer: int) -> None:
        """Take back `mark_device` or `mark_host` for the range that begins here."""
        self._check("unmark", pointer)

    def unmark_device(self, pointer: int) -> None:
        """Take back `mark_device`."""
        self._check("unmark", pointer)

    def reset(self) -> None:
        """Forget faults, states, stubs, delays, records and marks; release and drain queues.

        Versions stay as they are, since kvsig has bound itself by them.

        Raises
        ------
        RuntimeError
            A queue did not run dry within ten seconds.
        """
        self._check("reset")


class Stream:
    """An emulated stream, where a program with a GPU would have a `torch.cuda.Stream`.

    It is handed over as ``stream=`` wherever kvsig takes a stream. Work is queued and done by a
    thread of the stream's own, so bytes are there only after `synchronize`, or after a ``with``
    block, which waits at its end: a check made earlier may see the old ones, as with CUDA.

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

    Raises
    ------
    RuntimeError
        This process was forked from one that had used the emulated runtime: as with CUDA, it
        cannot use it then.

    Examples
    --------
    Pages go to the host on a machine without a GPU (``KVSIG_CUDART=emulated:13.0``), the stream
    of kvsig's choice being replaced by one that can be waited for:

    >>> import torch, kvsig
    >>> from kvsig.emulated import Stream
    >>> source = torch.arange(4)
    >>> target = torch.zeros_like(source)
    >>> with Stream() as stream:
    ...     report = kvsig.copy_batch(
    ...         [target.data_ptr()], [source.data_ptr()], source.nbytes, stream=stream
    ...     )
    ...     stream.synchronize()
    ...     target.tolist()
    [0, 1, 2, 3]
    """

    def __init__(
        self, library: Control | Path | str | int | None = None, *, blocking: bool = False
    ) -> None:
        if library is None:
            library = str(import_module("kvsig._core").info()["library"])
        self.control = library if isinstance(library, Control) else Control(library)
        handle = self.control._ask("stream_create", 0 if blocking else 1)
        if handle is None:
            raise RuntimeError(
                "no emulated stream in a forked child: its parent had used the emulated CUDA "
                "runtime before the fork; start the child by spawn instead"
            )
        self.cuda_stream: int = handle

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
