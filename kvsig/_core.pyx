# cython: language_level=3, initializedcheck=False
"""Finds the CUDA runtime that is really loaded, binds functions to prototypes, and calls them.

Knows no tensors and no pages. Every CUDA prototype comes from ``signatures.toml`` through the
generated text that is included below.
"""

import os
import sys
import threading
import warnings

from . import registry as _registry
from . import runtime as _runtime
from ._errors import BindError, CudaError
from ._loader import address_file
from .binding import Binding

from cpython.exc cimport PyErr_CheckSignals
from cython cimport view
from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport free, malloc
from posix.time cimport clock_gettime, timespec

cdef extern from * nogil:
    """
    #include <dirent.h>
    #include <string.h>
    #include <unistd.h>

    /* Files that a process has open once the driver is initialised: on PCs, in WSL, on Tegra; and
       one more that may be given. */
    static const char *kvsig_devices[] = {
        "/dev/nvidia", "/dev/dxg", "/dev/nvhost", "/dev/nvmap", "/dev/nvgpu", NULL, NULL};

    static int kvsig_devices_open(void)
    {
        char target[256];
        int found = 0;
        struct dirent *entry;
        DIR *folder = opendir("/proc/self/fd");
        while (folder && !found && (entry = readdir(folder))) {
            ssize_t length = readlinkat(dirfd(folder), entry->d_name, target, sizeof(target) - 1);
            target[length > 0 ? length : 0] = 0;
            for (const char **one = kvsig_devices; *one; one++)
                found |= strncmp(target, *one, strlen(*one)) == 0;
        }
        if (folder)
            closedir(folder);
        return found;
    }
    """
    const char *kvsig_devices[7]
    bint kvsig_devices_open()

cdef extern from "unistd.h" nogil:
    int getppid()

cdef extern from "pthread.h" nogil:
    int pthread_atfork(
        void (*prepare)() noexcept nogil, void (*parent)() noexcept nogil,
        void (*child)() noexcept nogil,
    )

cdef extern from "time.h" nogil:
    int CLOCK_MONOTONIC_COARSE

include "_generated.pxi"

__all__ = [
    "BindError",
    "CudaError",
    "Report",
    "address_file",
    "batch_refusal",
    "bind",
    "copy_batch",
    "copy_strided",
    "info",
    "is_emulated",
    "memory_range",
    "rebind",
    "runtime_version",
    "driver_version",
    "strided_bound",
]

if _registry.digest() != DIGEST:
    raise ImportError(
        f"{_registry.PATH} is not the registry that this extension was built from;"
        " rebuild with: python setup.py build_ext --inplace"
        " (or, for an installed package: pip install --force-reinstall --no-deps .)",
        name=__name__,
    )

DEF_BATCH = 256
LEGACY = "the stream is the legacy default stream, which batches refuse"
ROUTES = ("none", "runtime", "driver")

cdef enum:
    ROUTE_NONE = 0
    ROUTE_RUNTIME = 1
    ROUTE_DRIVER = 2
    STACK_COPIES = 1024
    OP_WORDS = 9
    # Signals are looked for between pieces of so long; copies between two looks at the clock.
    PIECE_NS = 20_000_000
    LOOKS_AT_CLOCK = 16
    # Flags of the headers that are macros there.
    STREAM_NON_BLOCKING = 1
    EVENT_DISABLE_TIMING = 2


# --- Binding ----------------------------------------------------------------------------------


cdef object _lock = threading.RLock()
cdef object _bound = None
cdef bint _ready = False
cdef int _route = ROUTE_NONE
# Why batches can never be used, once CUDA has said so.
cdef object _remembered = None
cdef object _spec = None
cdef bint _spec_given = False


def fill_slot(row):
    """Let the generated callers call what a row is bound to."""
    cdef int slot = FUNCTIONS.index(row.function.name)
    cdef size_t address = row.address
    slots[slot].address = <void *>address
    slots[slot].variant = row.function.variants.index(row.variant) if address else UNBOUND


def set_emulated_version(size_t setter, int version, int newest):
    """Set what an emulated runtime tells of itself and of its driver."""
    (<void (*)(int, int) noexcept nogil>setter)(version, newest)


def ask_version(row):
    """Error code and version that a library's version function answers."""
    cdef int[2] version
    cdef size_t out = <size_t>&version[0]
    cdef int slot = FUNCTIONS.index(row.function.name)
    version[0] = version[1] = 0
    if len(row.variant.params) == 1:
        return invoke(slot, (out,)), version[0]
    code = invoke(slot, (out, out + sizeof(int)))
    return code, 1000 * version[0] + 10 * version[1]


def proc_address(str name, int version):
    """Address, error code and status of the driver's lookup."""
    cdef void *address = NULL
    cdef int status = 0
    cdef bytes text = name.encode()
    cdef int code = cuGetProcAddress(
        symbol=text, pfn=&address, cudaVersion=version, symbolStatus=<int *>&status
    )
    if code != CUDA_SUCCESS or status != CU_GET_PROC_ADDRESS_SUCCESS:
        address = NULL
    return <size_t>address, code, status


def bind():
    """Find the CUDA runtime and bind every function of the registry to it.

    Called by everything that needs it; once, also with many threads starting at the same time.

    Raises
    ------
    BindError
        If there is no CUDA runtime, or ``KVSIG_CUDART`` or ``KVSIG_ROUTE`` is wrong.
    """
    global _bound, _ready, _remembered, _route
    _after_fork()
    with _lock:
        if _ready:
            return
        spec = _spec if _spec_given else os.environ.get("KVSIG_CUDART", "")
        bound = Binding(sys.modules[__name__], spec)
        if bound.path and not bound.runtime:
            # The query that failed left its error behind.
            _clear()
        _bound = bound
        _remembered = None
        _route = ROUTES.index(bound.route)
        _ready = True
        for text in bound.warnings_now():
            warnings.warn(text, RuntimeWarning, stacklevel=2)


def rebind(spec=None):
    """Forget the runtime that is bound, and take another at the next use.

    For tests and the demo: nothing may be in flight in another thread.

    Parameters
    ----------
    spec : str, optional
        As ``KVSIG_CUDART``: a path or ``emulated:VERSION``; None goes by the environment.
    """
    global _bound, _ready, _spec, _spec_given, _route, _used, _parent_used
    _after_fork()
    with _lock:
        _drop_forks()
        _ready = _used = _parent_used = False
        _bound = None
        _route = ROUTE_NONE
        _spec, _spec_given = spec, spec is not None


cdef object _look_again():
    """Look again for a driver that was not there before."""
    global _route
    with _lock:
        if _bound.look_again():
            _route = ROUTES.index(_bound.route)


def kernel_refusal():
    """Why the page-copy kernel cannot be built here, or None; NVRTC is opened for it."""
    _ensure()
    with _lock:
        return _bound.no_kernel()


def row_of(str function):
    """What a function of the registry is bound to; a library that is optional is opened for it."""
    _ensure()
    with _lock:
        return _bound.row(function)


# --- After a fork -----------------------------------------------------------------------------

# A child has none of its parent's threads, and no CUDA if its parent had used it. The fork itself
# only marks that, by what is true at that moment; the child's first call here sees the mark.
cdef bint _forked = False
cdef bint _used = False             # whether copies were queued in this process
cdef bint _parent_used = False
cdef bint _parent_devices = False   # whether the parent had the driver's devices open
cdef int _parent = 0


cdef void _mark_child() noexcept nogil:
    global _forked, _used, _parent, _parent_used, _parent_devices
    _forked = True
    _parent = getppid()
    _parent_used = _parent_used or _used
    _parent_devices = _parent_devices or kvsig_devices_open()
    _used = False


if pthread_atfork(NULL, NULL, _mark_child) != 0:
    raise MemoryError("no memory for a handler of forks")


cdef int _after_fork() except -1:
    """In a child: locks that another thread of the parent held are free again."""
    global _forked, _lock
    if _forked:
        _forked = False
        _lock = threading.RLock()
        _forks.clear()
    return 0


cdef bytes _watched = b""


def watch_devices(str prefix):
    """Count open files whose paths begin so as the driver's: for drivers that are not known."""
    global _watched
    _watched = os.fsencode(prefix)
    kvsig_devices[5] = <const char *>_watched if _watched else NULL


cdef object _child_refusal():
    """Why this process cannot use CUDA for being a child of one that has, or None."""
    if _parent_used or (_parent_devices and not _bound.emulated):
        return (
            f"process {os.getpid()} was forked from process {_parent}, which had used CUDA: CUDA"
            " does not work in such a child. Start it by the method 'spawn', or fork before CUDA is"
            " first used"
        )
    return None


cdef int _ensure_bound() except -1:
    """Bind, in whatever process this is: for what calls nothing that works."""
    if _forked:
        _after_fork()
    if not _ready:
        bind()
    return 0


cdef inline int _ensure() except -1:
    """Bind, and refuse where CUDA cannot be used: before every call of CUDA."""
    if _forked or not _ready:
        _ensure_bound()
    if _parent != 0:
        refusal = _child_refusal()
        if refusal is not None:
            raise BindError(refusal)
    return 0


# --- What is bound ----------------------------------------------------------------------------


def is_emulated():
    """Whether the runtime is an emulated one: device memory is host memory there."""
    _ensure_bound()
    return _bound.emulated


def runtime_version():
    """Version of the runtime, as CUDA counts: 12080 is 12.8; 0 where it is not known."""
    _ensure_bound()
    return _bound.runtime


def driver_version():
    """CUDA version that the driver serves; 0 where there is no driver."""
    _ensure_bound()
    return _bound.driver


def info():
    """What kvsig is bound to, and why, as plain values that JSON can hold.

    Returns
    -------
    dict
        ``library`` (path), ``found`` (how), ``emulated``, ``runtime_version``,
        ``driver_version``, ``driver_library``, ``driver_found`` (how, or why not), ``route``,
        ``batch`` (``path`` that copies take on an ordinary stream: batch, loop, or none where
        every copy would fail; and ``why``), ``kernel`` (``available``: whether the page-copy
        kernel can be built; and ``why`` not), ``functions`` (a list: name, library, symbol,
        variant, pinned, address, status, why), ``libraries`` (every libcudart of the process),
        ``warnings``.
    """
    _ensure_bound()
    refusal = _permanent_refusal()
    bound = _bound
    no_copies = _child_refusal() or bound.no_copies(refusal)
    cuda = bound.libraries["cuda"]
    with _lock:
        no_kernel = no_copies or bound.no_kernel()
    return {
        "library": bound.path or None,
        "found": bound.found,
        "emulated": bound.emulated,
        "runtime_version": bound.runtime,
        "driver_version": bound.driver,
        "driver_library": cuda.path or None,
        "driver_found": cuda.found,
        "route": bound.route,
        "batch": {
            "path": "none" if no_copies else "loop" if refusal else "batch",
            "why": no_copies or refusal or bound.why,
        },
        "kernel": {"available": not no_kernel, "why": no_kernel},
        "functions": [bound.rows[name].as_dict() for name in bound.registry.functions],
        "libraries": _runtime.loaded_cudarts(),
        "warnings": bound.warnings_now(),
    }


# --- Errors -----------------------------------------------------------------------------------


# Other codes tell a state of the process, of the device or of the stream, which no copy is to
# blame for.
BLAMES_A_COPY = (cudaErrorInvalidValue, cudaErrorInvalidPitchValue)


cdef str _text_of(const char *text):
    return "" if text == NULL else text.decode("utf-8", "replace")


def told(int code, str library):
    """Name and text of an error code, by the library that answered it.

    Codes of NVRTC are its own. Where the library does not say (a stub driver), the name is the
    registry's, as far as it has the constant.
    """
    cdef const char *name = NULL
    cdef const char *text = NULL
    if library == "nvrtc":
        name = nvrtcGetErrorString(result_=code)
    elif library == "cuda":
        cuGetErrorName(error=code, pStr=&name)
        cuGetErrorString(error=code, pStr=&text)
    else:
        name, text = cudaGetErrorName(error=code), cudaGetErrorString(error=code)
    label = _text_of(name)
    if not label:
        registry = _bound.registry if _bound is not None else _registry.load()
        returns = registry.functions[registry.libraries[library].version].returns.name
        codes = registry.enums[returns].constants
        label = next((key for key, number in codes.items() if number == code), "unknown")
    return label, _text_of(text) or "no text"


def _error(int code, name, index=None):
    """The exception for an error code, with the thread's last error cleared."""
    row = _bound.rows[name]
    library = row.function.library
    if library != "nvrtc":
        _clear()
    if code not in BLAMES_A_COPY:
        index = None
    variant = row.variant.label if row.variant else "none"
    return CudaError(code, *told(code, library), name, variant, _bound.file(library), index)


cdef void _clear() noexcept nogil:
    """Clear the thread's last error, which torch's next check would raise."""
    cudaGetLastError()


# --- Copies -----------------------------------------------------------------------------------


cdef class Report:
    """What a transfer did.

    Attributes
    ----------
    path : str
        ``"batch"``, ``"strided"``, ``"loop"``, several joined by ``"+"``, or ``"none"`` where
        there was nothing to do.
    reason : str or None
        Why pages were copied one by one although batches were allowed.
    copies : int
        Copies made.
    calls : int
        CUDA calls that made them.
    bytes : int
        Bytes moved.
    """

    def __init__(self, str path="none", reason=None, copies=0, calls=0, bytes=0):
        self.path, self.reason = path, reason
        self.copies, self.calls, self.bytes = copies, calls, bytes

    def __repr__(self):
        reason = f", reason={self.reason!r}" if self.reason else ""
        return (
            f"Report(path={self.path!r}, copies={self.copies}, calls={self.calls},"
            f" bytes={self.bytes}{reason})"
        )

    def __eq__(self, other):
        if not isinstance(other, Report):
            return NotImplemented
        return self.__reduce__() == other.__reduce__()

    def __hash__(self):
        return hash(self.__reduce__())

    def to_dict(self):
        """All attributes by name, as plain values that JSON can hold."""
        return {
            "path": self.path,
            "reason": self.reason,
            "copies": self.copies,
            "calls": self.calls,
            "bytes": self.bytes,
        }

    def __reduce__(self):
        return Report, (self.path, self.reason, self.copies, self.calls, self.bytes)

    def __add__(self, other):
        if not isinstance(other, Report):
            return NotImplemented
        if self.path == "none":
            return other
        if other.path == "none":
            return self
        paths = self.path.split("+")
        paths += [path for path in other.path.split("+") if path not in paths]
        return Report(
            "+".join(paths),
            self.reason or other.reason,
            self.copies + other.copies,
            self.calls + other.calls,
            self.bytes + other.bytes,
        )


# --- Submitting -------------------------------------------------------------------------------


cdef struct Copies:
    const uint64_t *dsts
    const uint64_t *srcs
    const uint64_t *sizes   # NULL where each copy has `same` bytes
    uint64_t same
    size_t count

cdef struct Progress:
    size_t done             # copies that are submitted
    size_t failed           # number of the copy that was refused, or SIZE_MAX where not known
    size_t rows             # rows of the strided copies that are submitted
    size_t calls
    uint64_t bytes


cdef void _begin(Progress *progress) noexcept nogil:
    memset(progress, 0, sizeof(progress[0]))
    progress.failed = <size_t>-1


cdef int64_t _now() noexcept nogil:
    """Nanoseconds of a clock that is cheap to read, and exact to some milliseconds."""
    cdef timespec clock
    clock_gettime(CLOCK_MONOTONIC_COARSE, &clock)
    return <int64_t>clock.tv_sec * 1_000_000_000 + clock.tv_nsec


cdef int _call_batch(
    int route, const uint64_t *dsts, const uint64_t *srcs, size_t *sizes, size_t count,
    size_t *zeros, size_t *fail, void *stream,
) noexcept nogil:
    cdef cudaMemcpyAttributes attributes
    cdef CUmemcpyAttributes pinned
    if route == ROUTE_DRIVER:
        memset(&pinned, 0, sizeof(pinned))
        pinned.srcAccessOrder = CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
        return cuMemcpyBatchAsync(
            dsts=<unsigned long long *>dsts, srcs=<unsigned long long *>srcs, sizes=sizes,
            count=count, attrs=&pinned, attrsIdxs=zeros, numAttrs=1, failIdx=fail, hStream=stream,
        )
    memset(&attributes, 0, sizeof(attributes))
    attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream
    return cudaMemcpyBatchAsync(
        dsts=<void **>dsts, srcs=<void **>srcs, sizes=sizes, count=count, attrs=&attributes,
        attrsIdxs=zeros, numAttrs=1, failIdx=fail, stream=stream,
    )


cdef int _calls_of_batches(
    int route, const Copies *copies, size_t per_call, void *stream, size_t *zeros, size_t *same,
    Progress *progress,
) noexcept nogil:
    """Make calls of the batch function until all copies are made, one fails or time is up."""
    cdef int64_t until = _now() + PIECE_NS
    cdef size_t start, amount, fail, i
    cdef size_t *sizes
    cdef int code
    while progress.done < copies.count and _now() < until:
        start = progress.done
        amount = min(per_call, copies.count - start)
        sizes = same if copies.sizes == NULL else <size_t *>(copies.sizes + start)
        fail = <size_t>-1
        code = _call_batch(
            route, copies.dsts + start, copies.srcs + start, sizes, amount, zeros, &fail, stream
        )
        if code != 0:
            if fail < amount:
                progress.failed = start + fail
            return code
        progress.calls += 1
        progress.done += amount
        for i in range(amount):
            progress.bytes += sizes[i]
    return 0


cdef int _batch_piece(
    int route, const Copies *copies, size_t per_call, void *stream, Progress *progress
) noexcept nogil:
    """Submit the next copies in batches, for some milliseconds; CUDA's first error, or 0."""
    cdef size_t[STACK_COPIES] stack_zeros
    cdef size_t[STACK_COPIES] stack_same
    cdef size_t *zeros = stack_zeros
    cdef size_t *same = stack_same
    cdef size_t widest = min(per_call, copies.count - progress.done)
    cdef size_t i
    cdef int code = cudaErrorMemoryAllocation
    if widest > STACK_COPIES:
        zeros = <size_t *>malloc(widest * sizeof(size_t))
        same = <size_t *>malloc(widest * sizeof(size_t))
    if zeros != NULL and same != NULL:
        memset(zeros, 0, widest * sizeof(size_t))
        if copies.sizes == NULL:
            for i in range(widest):
                same[i] = copies.same
        code = _calls_of_batches(route, copies, per_call, stream, zeros, same, progress)
    if widest > STACK_COPIES:
        free(zeros)
        free(same)
    return code


cdef int _loop_piece(const Copies *copies, void *stream, Progress *progress) noexcept nogil:
    """Submit the next copies one by one, for some milliseconds; CUDA's first error, or 0."""
    cdef int64_t until = _now() + PIECE_NS
    cdef size_t i, size
    cdef int code
    for i in range(progress.done, copies.count):
        size = copies.same if copies.sizes == NULL else copies.sizes[i]
        code = cudaMemcpyAsync(
            dst=<void *>copies.dsts[i], src=<const void *>copies.srcs[i], count=size, stream=stream
        )
        if code != 0:
            progress.failed = i
            return code
        progress.calls += 1
        progress.bytes += size
        progress.done = i + 1
        if i % LOOKS_AT_CLOCK == 0 and _now() >= until:
            break
    return 0


cdef int _strided_piece(
    const uint64_t *ops, size_t count, void *stream, Progress *progress
) noexcept nogil:
    """Submit the next strided copies, for some milliseconds; CUDA's first error, or 0."""
    cdef int64_t until = _now() + PIECE_NS
    cdef cudaMemcpy3DParms parms
    cdef const uint64_t *op
    cdef size_t i
    cdef int code
    memset(&parms, 0, sizeof(parms))
    parms.kind = cudaMemcpyDefault
    for i in range(progress.done, count):
        op = ops + OP_WORDS * i
        parms.dstPtr.ptr, parms.dstPtr.pitch = <void *>op[0], op[1]
        parms.dstPtr.xsize, parms.dstPtr.ysize = op[6], op[2]
        parms.srcPtr.ptr, parms.srcPtr.pitch = <void *>op[3], op[4]
        parms.srcPtr.xsize, parms.srcPtr.ysize = op[6], op[5]
        parms.extent.width, parms.extent.height, parms.extent.depth = op[6], op[7], op[8]
        code = cudaMemcpy3DAsync(p=&parms, stream=stream)
        if code != 0:
            progress.failed = i
            return code
        progress.calls += 1
        progress.rows += op[7] * op[8]
        progress.bytes += op[6] * op[7] * op[8]
        progress.done = i + 1
        if i % LOOKS_AT_CLOCK == 0 and _now() >= until:
            break
    return 0


cdef int _look_for_signals(size_t done, size_t count) except -1:
    """Let Python handle what came in; what its handler raises ends the transfer."""
    try:
        PyErr_CheckSignals()
    except BaseException as error:
        error.add_note(
            f"kvsig stopped here: the first {done} of {count} copies are queued and will be made"
            " in the order of the stream, the others not"
        )
        raise
    return 0


cdef int _submit(
    int route, const Copies *copies, size_t per_call, uint64_t stream, Progress *progress
) except -1:
    """Submit what is left, by a route of batches or, for ROUTE_NONE, one by one; 0 or an error."""
    cdef int code
    while True:
        with nogil:
            if route == ROUTE_NONE:
                code = _loop_piece(copies, <void *>stream, progress)
            else:
                code = _batch_piece(route, copies, per_call, <void *>stream, progress)
        if code != 0 or progress.done == copies.count:
            return code
        _look_for_signals(progress.done, copies.count)


# --- The way around the legacy default stream -------------------------------------------------


# Batches from the legacy default stream run on a stream of kvsig's own, one for each device,
# tied to it by two events. Sharing the events between threads only makes a wait cover more.
cdef class _Fork:
    cdef uint64_t stream, before, after

    def __init__(self):
        cdef void *handle = NULL
        cdef int code
        code = cudaStreamCreateWithFlags(pStream=&handle, flags=STREAM_NON_BLOCKING)
        self._created(code, "cudaStreamCreateWithFlags")
        self.stream = <uint64_t>handle
        code = cudaEventCreateWithFlags(event=&handle, flags=EVENT_DISABLE_TIMING)
        self._created(code, "cudaEventCreateWithFlags")
        self.before = <uint64_t>handle
        code = cudaEventCreateWithFlags(event=&handle, flags=EVENT_DISABLE_TIMING)
        self._created(code, "cudaEventCreateWithFlags")
        self.after = <uint64_t>handle

    cdef _created(self, int code, str function):
        if code != 0:
            error = _error(code, function)
            self.destroy()
            raise error

    cdef destroy(self):
        if self.stream:
            with nogil:
                cudaStreamSynchronize(stream=<void *>self.stream)
        if self.before:
            cudaEventDestroy(event=<void *>self.before)
        if self.after:
            cudaEventDestroy(event=<void *>self.after)
        if self.stream:
            cudaStreamDestroy(stream=<void *>self.stream)
        self.stream = self.before = self.after = 0


cdef dict _forks = {}


cdef _drop_forks():
    """Destroy the streams and events of the runtime that is bound."""
    cdef _Fork fork
    for fork in _forks.values():
        fork.destroy()
    _forks.clear()


cdef _Fork _fork_of_device():
    """The stream beside the legacy one on the current device."""
    cdef int device = 0
    cdef int code = cudaGetDevice(device=&device)
    if code != 0:
        raise _error(code, "cudaGetDevice")
    found = _forks.get(device)
    if found is None:
        with _lock:
            found = _forks.get(device)
            if found is None:
                found = _forks[device] = _Fork()
    return found


def _try_fork():
    """A stream for what the legacy default stream refuses, or the reason why there is none."""
    needed = (
        "cudaGetDevice", "cudaStreamCreateWithFlags", "cudaEventCreateWithFlags",
        "cudaEventRecord", "cudaStreamWaitEvent",
    )
    for name in needed:
        if not _bound.rows[name].address:
            return None, f"{LEGACY}, and {name} is not bound for a way around"
    try:
        return _fork_of_device(), None
    except CudaError as error:
        return None, f"{LEGACY}, and there is no way around: {error}"


cdef object _tie(uint64_t first, uint64_t then, uint64_t event):
    """Make stream `then` wait for what is in stream `first` now; the error, or None."""
    cdef bint waits = False
    cdef int code
    with nogil:
        code = cudaEventRecord(event=<void *>event, stream=<void *>first)
        if code == 0:
            waits = True
            code = cudaStreamWaitEvent(stream=<void *>then, event=<void *>event)
    if code == 0:
        return None
    return _error(code, "cudaStreamWaitEvent" if waits else "cudaEventRecord")


# --- Batches and single copies ----------------------------------------------------------------


cdef object _missing_batch():
    """The error for a batch function that should be there, or None."""
    row = _bound.rows["cudaMemcpyBatchAsync"]
    if row.status == "missing" and _bound.wanted_route != "driver":
        return BindError(
            f"cudaMemcpyBatchAsync is missing: {row.why}. The library is damaged or is not"
            " what it says; set KVSIG_CUDART to a good one, or use path='loop'"
        )
    return None


cdef object _permanent_refusal():
    """Why no stream of this process can take batches, or None."""
    if _remembered is not None:
        return _remembered
    if _route == ROUTE_NONE:
        if not _bound.libraries["cuda"].handle:
            _look_again()
        return _bound.why_not or None
    return None


cdef object _stream_refusal(uint64_t stream):
    """Why this stream cannot take batches now, or None."""
    cdef int status = 0
    cdef int code
    # From the legacy default stream batches are forked.
    if stream > 1 and slots[SLOT_cudaStreamIsCapturing].variant >= 0:
        code = cudaStreamIsCapturing(stream=<void *>stream, pCaptureStatus=<int *>&status)
        if code != 0:
            _clear()
        elif status != cudaStreamCaptureStatusNone:
            return "the stream is being captured, which batches refuse"
    return None


cdef object batch_refusal_of(uint64_t stream):
    _ensure()
    if _route == ROUTE_NONE:
        missing = _missing_batch()
        if missing is not None:
            raise missing
    refusal = _permanent_refusal()
    return _stream_refusal(stream) if refusal is None else refusal


def batch_refusal(uint64_t stream):
    """Why the batch path cannot be used on a stream now.

    Parameters
    ----------
    stream : int
        Handle.

    Returns
    -------
    str or None
        None if it can. The legacy default stream is no reason: batches are forked to a stream
        of kvsig's own there.
    """
    _ensure()
    return _permanent_refusal() or _stream_refusal(stream)


cdef object no_batch(object reason, uint64_t stream):
    if slots[SLOT_cudaMemcpyAsync].variant < 0:
        return _no_loop(reason, stream)
    return BindError(f"path='batch' is not possible: {reason}. Use path='auto' or 'loop'")


def _no_loop(reason, stream):
    """The error where not even single copies can be made: there is no libcudart."""
    parts = [f"no page copies: {_bound.rows['cudaMemcpyAsync'].why}"]
    if reason is not None:
        parts.append(f", and no batch: {reason}")
    if _permanent_refusal() is not None:
        parts.append(". Set KVSIG_CUDART to the path of a libcudart")
    elif reason is None:
        parts.append(". Use path='auto' or 'batch', or set KVSIG_CUDART to the path of a libcudart")
    elif stream <= 1:
        parts.append(
            ". Give a stream that is not the default one, or set KVSIG_CUDART to the path of a"
            " libcudart"
        )
    return BindError("".join(parts))


def _after_failure(int code, function):
    """The reason to fall back after an error of the batch function, or None to raise it."""
    global _remembered
    if code == cudaErrorNotSupported or code == cudaErrorCallRequiresNewerDriver:
        _clear()
        # It will answer so again: remember it.
        _remembered = f"{function} answered {code} ({_name(code, function)})"
        return _remembered
    if code == cudaErrorStreamCaptureUnsupported:
        _clear()
        return f"{function} answered {code} ({_name(code, function)}): the stream is being captured"
    return None


def _name(int code, str function):
    return told(code, _bound.rows[function].function.library)[0]


cdef object _failed_copy(
    const Copies *copies, size_t per_call, uint64_t stream, int route, int code,
    Progress *progress,
):
    """Number of the copy that a batch was refused for, or None.

    CUDA 13 does not say. The driver's own form still does, so the call that failed is made again
    through it: its copies are the same ones, in the same place of the stream.
    """
    cdef Copies again = copies[0]
    cdef Progress second
    cdef size_t start = progress.done
    if code not in BLAMES_A_COPY:
        return None
    if progress.failed != <size_t>-1:
        return progress.failed
    if route == ROUTE_DRIVER or slots[SLOT_cuMemcpyBatchAsync].variant < 0:
        return None
    again.count = min(per_call, copies.count - start)
    again.dsts, again.srcs = copies.dsts + start, copies.srcs + start
    if copies.sizes != NULL:
        again.sizes = copies.sizes + start
    _begin(&second)
    with nogil:
        code = _batch_piece(ROUTE_DRIVER, &again, again.count, <void *>stream, &second)
    if code == 0 or second.failed == <size_t>-1:
        return None
    return start + second.failed


cdef object _run_batches(
    const Copies *copies, size_t per_call, uint64_t stream, Progress *progress
):
    """Submit in batches; the reason why the rest must go one by one, or None."""
    cdef int route = _route
    cdef int code = _submit(route, copies, per_call, stream, progress)
    if code == 0:
        return None
    function = "cuMemcpyBatchAsync" if route == ROUTE_DRIVER else "cudaMemcpyBatchAsync"
    reason = _after_failure(code, function)
    if reason is None:
        _clear()
        index = _failed_copy(copies, per_call, stream, route, code, progress)
        raise _error(code, function, index)
    return reason


cdef object _run_forked(
    const Copies *copies, size_t per_call, uint64_t stream, Progress *progress
):
    """Submit in batches on the stream beside the legacy one; as `_run_batches`."""
    cdef _Fork fork
    fork, reason = _try_fork()
    if fork is None:
        return reason
    error = _tie(stream, fork.stream, fork.before)
    if error is not None:
        raise error
    try:
        reason = _run_batches(copies, per_call, fork.stream, progress)
    except BaseException:
        # What was submitted stays in the caller's order.
        _tie(fork.stream, stream, fork.after)
        raise
    error = _tie(fork.stream, stream, fork.after)
    if error is not None:
        raise error
    return reason


cdef Report _report(str path, object reason, size_t copies, const Progress *progress):
    cdef Report report = Report.__new__(Report)
    report.path, report.reason = path, reason
    report.copies, report.calls, report.bytes = copies, progress.calls, progress.bytes
    return report


cdef object run_copies(
    const uint64_t *dsts, const uint64_t *srcs, const uint64_t *sizes, uint64_t same, size_t count,
    uint64_t stream, Path path, bint strict, size_t batch_size, object reason,
):
    global _used
    cdef Copies copies
    cdef Progress progress
    cdef int code
    _ensure()
    copies.dsts, copies.srcs, copies.sizes = dsts, srcs, sizes
    copies.same, copies.count = same, count
    _begin(&progress)
    if path == PATH_BATCH:
        if stream <= 1:
            reason = _run_forked(&copies, batch_size, stream, &progress)
        else:
            reason = _run_batches(&copies, batch_size, stream, &progress)
        if reason is None:
            _used = True
            return _report("batch", None, count, &progress)
        if strict:
            raise no_batch(reason, stream)
    if slots[SLOT_cudaMemcpyAsync].variant < 0:
        raise _no_loop(reason, stream)
    code = _submit(ROUTE_NONE, &copies, 0, stream, &progress)
    if code != 0:
        raise _error(code, "cudaMemcpyAsync", progress.failed)
    _used = True
    return _report("loop", reason, count, &progress)


cdef size_t _first_bad(
    const uint64_t *dsts, const uint64_t *srcs, const uint64_t *sizes, size_t count
) noexcept nogil:
    cdef size_t i
    for i in range(count):
        if dsts[i] == 0 or srcs[i] == 0 or (sizes != NULL and sizes[i] == 0):
            return i
    return count


def copy_batch(
    const uint64_t[::1] dsts not None,
    const uint64_t[::1] srcs not None,
    sizes,
    uint64_t stream,
    str path="auto",
    size_t batch_size=DEF_BATCH,
):
    """Submit copies to a stream.

    Parameters
    ----------
    dsts, srcs : ndarray of uint64, shape (n,)
        Addresses, contiguous.
    sizes : ndarray of uint64, shape (n,), or int
        Bytes of each copy, or of every one.
    stream : int
        Handle of the stream. On the legacy default stream, batches are forked to a stream of
        kvsig's own and joined back.
    path : {"auto", "batch", "loop"}
        ``"auto"`` uses batches where they can be used, else one copy at a time.
    batch_size : int
        Copies in one call of the batch function, at most.

    Returns
    -------
    Report

    Raises
    ------
    BindError
        If ``path="batch"`` and batches cannot be used; the message says why.
    CudaError
        If CUDA refuses a copy. Copies before it may have been made.
    ValueError
        If lengths differ, or an address or a size is 0. Nothing has been copied.
    KeyboardInterrupt
        Or whatever the handler of a signal raises, between two calls; a note says how many
        copies are queued.
    """
    cdef size_t count = dsts.shape[0]
    cdef const uint64_t[::1] given
    cdef const uint64_t *size_list = NULL
    cdef uint64_t same = 0
    cdef size_t bad
    cdef Path way = PATH_LOOP
    if <size_t>srcs.shape[0] != count:
        raise ValueError(f"{count} destinations, but {srcs.shape[0]} sources; give one for each")
    if isinstance(sizes, int):
        if sizes <= 0:
            raise ValueError(f"size {sizes} is no number of bytes to copy; it must be above 0")
        same = sizes
    else:
        given = sizes
        if <size_t>given.shape[0] != count:
            raise ValueError(f"{count} destinations, but {given.shape[0]} sizes; give one for each")
        if count:
            size_list = &given[0]
    if path not in ("auto", "batch", "loop"):
        raise ValueError(f"path={path!r}: use 'auto', 'batch' or 'loop'")
    if batch_size == 0:
        raise ValueError("batch_size 0 copies nothing; it must be above 0")
    _ensure()
    if count == 0:
        return Report()
    bad = _first_bad(&dsts[0], &srcs[0], size_list, count)
    if bad < count:
        raise ValueError(
            f"copy {bad} is not possible: dst={dsts[bad]:#x}, src={srcs[bad]:#x},"
            f" size={same if size_list == NULL else size_list[bad]};"
            " addresses and sizes must not be 0"
        )
    reason = None
    if path != "loop":
        reason = batch_refusal_of(stream)
        if reason is None:
            way = PATH_BATCH
        elif path == "batch":
            raise no_batch(reason, stream)
    return run_copies(
        &dsts[0], &srcs[0], size_list, same, count, stream, way, path == "batch", batch_size,
        reason,
    )


# --- Strided copies ---------------------------------------------------------------------------


def strided_bound():
    """Whether strided copies are calls of their own here, and not rows copied one by one."""
    _ensure()
    return slots[SLOT_cudaMemcpy3DAsync].variant >= 0


cdef object _run_rows(const uint64_t *ops, size_t count, uint64_t stream):
    """The rows of strided copies as copies of their own, where no call takes whole ones."""
    cdef size_t total = 0, at = 0, i, slice_, row
    cdef const uint64_t *op
    cdef Path way = PATH_LOOP
    for i in range(count):
        total += ops[OP_WORDS * i + 7] * ops[OP_WORDS * i + 8]
    # Of each row: destination, source, width, and the strided copy that it belongs to.
    cdef uint64_t[:, ::1] rows = view.array((4, total), sizeof(uint64_t), "Q")
    for i in range(count):
        op = ops + OP_WORDS * i
        for slice_ in range(op[8]):
            for row in range(op[7]):
                rows[0, at] = op[0] + (slice_ * op[2] + row) * op[1]
                rows[1, at] = op[3] + (slice_ * op[5] + row) * op[4]
                rows[2, at], rows[3, at] = op[6], i
                at += 1
    if slots[SLOT_cudaMemcpyAsync].variant >= 0:
        reason = f"cudaMemcpy3DAsync is not bound: {_bound.rows['cudaMemcpy3DAsync'].why}"
    else:
        reason = batch_refusal_of(stream)
        way = PATH_BATCH if reason is None else PATH_LOOP
    try:
        return run_copies(
            &rows[0, 0], &rows[1, 0], &rows[2, 0], 0, total, stream, way, False, DEF_BATCH, reason
        )
    except CudaError as error:
        if error.index is None:
            raise
        fields = error.code, error.name, error.text, error.function, error.variant, error.library
        raise CudaError(*fields, rows[3, <Py_ssize_t>error.index]) from None


cdef object run_strided(const uint64_t *ops, size_t count, uint64_t stream):
    global _used
    cdef Progress progress
    cdef int code
    _ensure()
    if slots[SLOT_cudaMemcpy3DAsync].variant < 0:
        return _run_rows(ops, count, stream)
    _begin(&progress)
    while True:
        with nogil:
            code = _strided_piece(ops, count, <void *>stream, &progress)
        if code != 0:
            raise _error(code, "cudaMemcpy3DAsync", progress.failed)
        if progress.done == count:
            _used = True
            return _report("strided", None, progress.rows, &progress)
        _look_for_signals(progress.done, count)


def copy_strided(const uint64_t[:, ::1] ops not None, uint64_t stream):
    """Submit strided copies, slices of rows, to a stream, one call each.

    Parameters
    ----------
    ops : ndarray of uint64, shape (n, 9)
        Columns: dst, dpitch, drows, src, spitch, srows, width, height, depth. A slice begins
        `drows` (`srows`) rows behind the one before it; pitches and width in bytes, the others
        in rows and slices.
    stream : int
        Handle of the stream.

    Returns
    -------
    Report
        ``copies`` counts the rows.

    Raises
    ------
    CudaError
        If CUDA refuses a copy; ``index`` is its row in `ops`.
    ValueError
        If there are not nine columns, a value is 0, a pitch is below the width or slices overlap.
    KeyboardInterrupt
        As by `copy_batch`.
    """
    cdef size_t count = ops.shape[0]
    cdef size_t i
    cdef const uint64_t *op
    if ops.shape[1] != OP_WORDS:
        raise ValueError(f"{ops.shape[1]} columns; strided copies have {OP_WORDS}")
    _ensure()
    if count == 0:
        return Report()
    for i in range(count):
        op = &ops[i, 0]
        if (
            op[0] == 0 or op[3] == 0 or op[6] == 0 or op[7] == 0 or op[8] == 0
            or op[1] < op[6] or op[4] < op[6]
            or (op[8] > 1 and (op[2] < op[7] or op[5] < op[7]))
        ):
            raise ValueError(
                f"strided copy {i} is not possible: dst={op[0]:#x}, dpitch={op[1]},"
                f" drows={op[2]}, src={op[3]:#x}, spitch={op[4]}, srows={op[5]}, width={op[6]},"
                f" height={op[7]}, depth={op[8]}; nothing may be 0, pitches not below the width,"
                " and rows from slice to slice not below the height"
            )
    return run_strided(&ops[0, 0], count, stream)


def memory_range(uint64_t address):
    """The allocation, or the registered block, that an address lies in.

    A copy must not leave it: CUDA refuses one whose rows lie in two, on either side.

    Parameters
    ----------
    address : int

    Returns
    -------
    tuple of int or None
        Its first address and its size in bytes; None where the driver knows none, as for
        pageable host memory, or where there is no driver to ask.
    """
    cdef uint64_t start = 0
    cdef size_t size = 0
    _ensure()
    if slots[SLOT_cuPointerGetAttribute].variant < 0:
        return None
    # The driver's calls leave no last error in the runtime.
    if cuPointerGetAttribute(
        data=&start, attribute=CU_POINTER_ATTRIBUTE_RANGE_START_ADDR, ptr=address
    ) != CUDA_SUCCESS:
        return None
    if cuPointerGetAttribute(
        data=&size, attribute=CU_POINTER_ATTRIBUTE_RANGE_SIZE, ptr=address
    ) != CUDA_SUCCESS or size == 0:
        return None
    return start, size


# --- Any function, by name --------------------------------------------------------------------


def registry_of():
    """The registry that is bound."""
    _ensure()
    return _bound.registry


def invoke_row(row, tuple values):
    """Call a bound function with one value for each parameter: numbers, and bytes for structs."""
    return invoke(FUNCTIONS.index(row.function.name), values)


def error_of(int code, str function):
    """The exception for what a function answered, with the thread's last error cleared."""
    return _error(code, function)


include "_kernel.pxi"
