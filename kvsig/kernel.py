"""The page-copy kernel: compiled once per process, device and unit, by NVRTC and the driver.

Nothing is kept on disk. What is missing for it is said in one sentence, and everything else works
without it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvsig import _core
from kvsig._core import BindError, CudaError
from kvsig.call import call

__all__ = ["UNITS", "Kernel", "build", "compile_source", "refusal", "table", "unit_of"]

#: Bytes that one thread may move at a time, widest first.
UNITS = (16, 8, 4, 2, 1)

#: The driver's form of the wait that works everywhere came with this version.
WAITS_SINCE = 12000


@dataclass(frozen=True, slots=True)
class Kernel:
    """The compiled kernel, ready to be launched on one device.

    Parameters
    ----------
    unit : int
        Bytes of which every address, pitch and width must be a multiple: 16, 8, 4, 2 or 1.
    wide, thin : int
        Handles of the two kernels: blocks of many warps, and blocks of one.
    multiprocessors : int
        Of the device.
    clusters : bool
        Whether blocks can be launched as one cluster: from compute capability 9 on.
    waits : bool
        Whether a stream can wait for a word of memory, and so for the flag of a layer.
    architecture : str
        What it was compiled for, such as ``"sm_90"``; ``"compute_.."`` where the driver had to
        finish the work, because NVRTC does not know the device.
    """

    unit: int
    wide: int
    thin: int
    multiprocessors: int
    clusters: bool
    waits: bool
    architecture: str


_built: dict[tuple[str, int, int], Kernel] = {}
_lock = threading.Lock()


def unit_of(*arrays: npt.ArrayLike) -> int:
    """Find the widest unit that divides all addresses, pitches and widths.

    Parameters
    ----------
    *arrays : array_like of uint64
        Addresses, pitches and widths in bytes.

    Returns
    -------
    int
        One of `UNITS`.
    """
    bits = 0
    for values in arrays:
        flat = np.asarray(values, dtype=np.uint64).ravel()
        bits |= int(np.bitwise_or.reduce(flat)) if flat.size else 0
    return next(unit for unit in UNITS if bits % unit == 0)


def refusal() -> str | None:
    """Say why the kernel cannot be built here, or None; NVRTC is opened, and nothing is compiled.

    Returns
    -------
    str or None
        One sentence, for ``info``.
    """
    return _core.kernel_refusal()


def build(unit: int) -> Kernel:
    """Compile and load the kernel for the current device, if that has not been done yet.

    Parameters
    ----------
    unit : int
        One of `UNITS`; see `unit_of`.

    Returns
    -------
    Kernel

    Raises
    ------
    BindError
        If it cannot be had here; the message is one sentence that says why.

    Notes
    -----
    A device must be current, with a context: call it where tensors on it have been looked at.
    Compiling takes some tenths of a second, loading less than one millisecond. Lazy loading would
    leave part of it to the first launch, which then can hold the context's lock until the GPU has
    drained, so both kernels are launched here, for no page.
    """
    if unit not in UNITS:
        raise ValueError(f"unit must be one of {UNITS}, not {unit!r}")
    try:
        device = int(call("cudaGetDevice"))
        key = (str(_core.info()["library"]), device, unit)
        with _lock:
            if key not in _built:
                _built[key] = _load(device, unit)
            return _built[key]
    except CudaError as error:
        raise BindError(f"the page-copy kernel cannot be loaded: {error}") from error


def _load(device: int, unit: int) -> Kernel:
    def attribute(name: str) -> int:
        return int(call("cudaDeviceGetAttribute", attr=name, device=device))

    if not attribute("cudaDevAttrCanMapHostMemory"):
        raise BindError("the device cannot map host memory, which the page-copy kernel reads")
    major = attribute("cudaDevAttrComputeCapabilityMajor")
    minor = attribute("cudaDevAttrComputeCapabilityMinor")
    image, architecture = compile_source(10 * major + minor, unit)
    # A module belongs to the current context; a call of libcudart makes the device's own current.
    call("cudaFree", devPtr=None)
    module = call("cuModuleLoadData", image=image)
    handles = []
    for name in ("kvsig_copy_wide", "kvsig_copy_thin"):
        function = call("cuModuleGetFunction", hmod=module, name=name)
        call("cuFuncGetAttribute", attrib="CU_FUNC_ATTRIBUTE_NUM_REGS", hfunc=function)
        handles.append(int(function))
    _core.launch_nothing(*handles)
    return Kernel(
        unit, handles[0], handles[1], attribute("cudaDevAttrMultiProcessorCount"),
        major >= 9, _core.driver_version() >= WAITS_SINCE, architecture,
    )  # fmt: skip


def compile_source(capability: int, unit: int) -> tuple[npt.NDArray[np.uint8], str]:
    """Compile the kernel by NVRTC.

    Parameters
    ----------
    capability : int
        Of the device: 90 is 9.0.
    unit : int
        One of `UNITS`.

    Returns
    -------
    (image, architecture)
        What ``cuModuleLoadData`` takes, and what it was compiled for. Machine code where NVRTC
        knows the device, else PTX of the newest architecture below that it knows.

    Raises
    ------
    BindError
        If NVRTC knows nothing that the device can run, or refuses the program.
    """
    known = np.zeros(int(call("nvrtcGetNumSupportedArchs")), dtype=np.int32)
    call("nvrtcGetSupportedArchs", supportedArchs=known)
    fitting = [int(number) for number in known if number <= capability]
    if not fitting:
        raise BindError(
            f"NVRTC has no architecture for compute capability {capability // 10}."
            f"{capability % 10}: its oldest is {min(known, default=0)}"
        )
    exact = max(fitting) == capability
    architecture = f"{'sm' if exact else 'compute'}_{max(fitting)}"
    options = (
        f"--gpu-architecture={architecture}", "--std=c++17", "--maxrregcount=32",
        f"-DKVSIG_UNIT={unit}",
    )  # fmt: skip
    program = np.array([call("nvrtcCreateProgram", src=_core.PAGE_COPY, name="page_copy.cu")],
                       dtype=np.uint64)  # fmt: skip
    try:
        return _compiled(int(program[0]), options, "CUBIN" if exact else "PTX"), architecture
    finally:
        call("nvrtcDestroyProgram", prog=program)


def _compiled(program: int, options: tuple[str, ...], form: str) -> npt.NDArray[np.uint8]:
    texts = [np.frombuffer(option.encode() + b"\0", dtype=np.uint8) for option in options]
    places = np.array([text.__array_interface__["data"][0] for text in texts], dtype=np.uint64)
    try:
        call("nvrtcCompileProgram", prog=program, numOptions=len(options), options=places)
    except CudaError as error:
        size = int(call("nvrtcGetProgramLogSize", prog=program))
        log = _filled(size, lambda buffer: call("nvrtcGetProgramLog", prog=program, log=buffer))
        said = log.tobytes().rstrip(b"\0").decode("utf-8", "replace").strip()
        first = said.splitlines()[0] if said else str(error)
        raise BindError(f"NVRTC cannot compile the page-copy kernel: {first}") from error
    key = form.lower()
    size = int(call(f"nvrtcGet{form}Size", prog=program))
    return _filled(size, lambda buffer: call(f"nvrtcGet{form}", **{"prog": program, key: buffer}))


def _filled(size: int, fill: Callable[[npt.NDArray[np.uint8]], Any]) -> npt.NDArray[np.uint8]:
    buffer = np.zeros(size, dtype=np.uint8)
    fill(buffer)
    return buffer


#: A plane as the kernel reads it: see ``struct kvsig_plane`` of csrc/page_copy.cu.
PLANE = np.dtype([
    ("base", "<u8", 2), ("pitch", "<u8", 2), ("row_pitch", "<u8", 2), ("inverse", "<u8"),
    ("units", "<u4"), ("rows", "<u4"),
])  # fmt: skip


def table(
    base: tuple[npt.ArrayLike, npt.ArrayLike],
    pitch: tuple[npt.ArrayLike, npt.ArrayLike],
    width: npt.ArrayLike,
    unit: int,
    rows: npt.ArrayLike = 1,
    row_pitch: tuple[npt.ArrayLike, npt.ArrayLike] = (0, 0),
) -> npt.NDArray[np.uint8]:
    """Describe planes as the kernel reads them.

    Parameters
    ----------
    base, pitch : pair of array_like of uint64, shape (planes,)
        Of the device and of the host, as the device sees it: address of page 0, and bytes from
        page to page. Planes are in order of layers, those of one layer side by side.
    width : array_like of uint64
        Bytes of a row, not 0.
    unit : int
        Divides all of these: see `unit_of`.
    rows : array_like of int, optional
        Rows of a page.
    row_pitch : pair of array_like of uint64, optional
        Bytes from row to row, on both sides.

    Returns
    -------
    ndarray of uint8, shape (planes, 64)
    """
    units = np.asarray(width, dtype=np.uint64) // np.uint64(unit)
    found = np.zeros(len(units), dtype=PLANE)
    for side in (0, 1):
        found["base"][:, side] = base[side]
        found["pitch"][:, side] = pitch[side]
        found["row_pitch"][:, side] = row_pitch[side]
    found["units"], found["rows"] = units, rows
    found["inverse"] = np.uint64(2**64 - 1) // units
    return found.view(np.uint8).reshape(len(units), PLANE.itemsize)
