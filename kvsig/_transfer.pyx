# cython: language_level=3, initializedcheck=False, boundscheck=False, wraparound=False
"""One request on its way: page numbers copied once, planned once, run piece by piece.

Engines load layer by layer, one transfer every few hundred microseconds, and what CUDA stages in
between empties the CPU's caches. Every step of Python costs a microsecond then where it costs a
tenth otherwise, so there is none here that the usual request needs.
"""

from cpython.exc cimport PyErr_CheckSignals
from libc.string cimport memset
from libc.stdint cimport int64_t, uint64_t

import numpy as np
import torch

from kvsig import _core, streams
from kvsig import numbers as _numbers
from kvsig._errors import page_out_of_range

from kvsig._core cimport (
    KernelCode, KernelLane, KernelPlanes, KernelRequest, Report, batch_refusal_of, no_batch,
    recorded_now, run_copies, run_strided, stream_number
)
from kvsig._path cimport PATH_STRIDED
from kvsig.planning._pack cimport Packer, Piece
from kvsig.planning._plan cimport DEVICE, HOST, KERNEL, LOAD, Direction, Geometry, Pages, Plan

cdef object ndarray = np.ndarray
cdef object Tensor = torch.Tensor
cdef object int64 = torch.int64
cdef object CudaStream = torch.cuda.Stream
cdef object HANDLES = 1 << 64
cdef object CudaError = _core.CudaError
cdef object BindError = _core.BindError
cdef object data_ptr = torch.Tensor.data_ptr
cdef object DENSE = torch.strided
cdef object untyped_storage = torch.Tensor.untyped_storage
cdef object storage_bytes = torch.UntypedStorage.nbytes


cdef object simple(object values):
    """What callers mostly give as an array, unchecked; anything else as None."""
    kind = type(values)
    if kind is ndarray:
        return values
    if kind is Tensor and values.dtype is int64 and values.is_cpu and values.layout is DENSE:
        array = values.numpy()
        # As `kvsig.memory.check_whole` asks; what is not contiguous goes the slow way in any case.
        end = 8 * values.storage_offset() + array.nbytes
        return array if end <= storage_bytes(untyped_storage(values)) else None
    if kind is list:
        try:
            return np.array(values)
        except ValueError:
            pass  # ragged: the slow way names the argument
    return None


cdef class DevicePages:
    """Page numbers of a request of which some are in device memory; the kernel checks those.

    Parameters
    ----------
    device_pages, host_pages : (int, int, int) or ndarray of int64
        Address, count and bytes of a number, in device memory; or numbers that have been checked.
    direction : Direction
    """

    cdef const void *lists[2]
    cdef unsigned int number[2]
    cdef readonly Py_ssize_t count
    cdef readonly int direction
    cdef object alive

    def __cinit__(self, device_pages, host_pages, Direction direction):
        cdef const int64_t[::1] near
        cdef Py_ssize_t counts[2]
        cdef int side
        self.direction = direction
        self.alive = device_pages, host_pages
        for side, pages in enumerate(self.alive):
            if type(pages) is tuple:
                self.lists[side] = <const void *><size_t>pages[0]
                counts[side], self.number[side] = pages[1], pages[2]
            else:
                near = pages
                self.lists[side] = &near[0] if near.shape[0] else NULL
                counts[side] = near.shape[0]
        if counts[0] != counts[1]:
            raise ValueError(
                f"device_pages has {counts[0]} page numbers and host_pages has {counts[1]}: "
                "give as many of each"
            )
        self.count = counts[0]


# Streams that a cache can launch on without getting memory for it first.
cdef int SPARE_LANES = 2


cdef class Launches:
    """What the launches of one cache have in common.

    Parameters
    ----------
    code : KernelCode
    planes : KernelPlanes
        All planes of the cache.
    layers : int
        Layers of it.
    limits : (int, int)
        Pages on the device and on the host.
    sms : int
        Multiprocessors of a long transfer.
    rates : (float, float)
        Bytes a microsecond that long loads and offloads are held to; 0: not held.
    window_pitch : int
        Host bytes from page to page to order pages by; 0: as they come.
    locked : list of (int, int)
        The page-locked blocks that hold the host pool, by address and size.
    """

    cdef readonly KernelCode code
    cdef readonly KernelPlanes planes
    cdef readonly unsigned int layers, sms
    cdef uint64_t limits[2]
    cdef double rates[2]
    cdef uint64_t window_pitch
    cdef dict lanes             # by numbers of streams, of which each stream has its own
    cdef dict latest            # by handles, which come again
    cdef list spare             # lanes that no stream has yet
    cdef list locked

    def __init__(self, KernelCode code not None, KernelPlanes planes not None, layers, limits,
                 sms, rates, window_pitch, list locked not None):
        self.locked = locked
        self.code, self.planes, self.layers, self.sms = code, planes, layers, sms
        self.limits[0], self.limits[1] = limits
        self.rates[0], self.rates[1] = rates
        self.window_pitch = window_pitch
        self.lanes, self.latest = {}, {}
        # Made with the cache: memory takes longer to get than most transfers.
        self.spare = [KernelLane(self.layers, 0) for _ in range(SPARE_LANES)]

    cpdef bint ready(self, uint64_t stream) except -1:
        """Whether a launch on a stream needs no memory that cannot be had while it is captured."""
        return bool(self.spare) or stream in self.latest or not recorded_now(stream)

    cpdef KernelLane lane_of(self, uint64_t stream):
        """Return what the launches on a stream share, made at its first one."""
        cdef KernelLane lane
        cdef object key
        if recorded_now(stream):
            # Nothing that a capture may refuse is asked of the stream then.
            lane = self.latest.get(stream)
            return self.adopt(stream, stream) if lane is None else lane
        key = stream_number(stream)
        lane = self.lanes.get(key)
        if lane is None:
            lane = self.adopt(stream, key)
        return lane

    cdef KernelLane adopt(self, uint64_t stream, object key):
        cdef KernelLane lane
        try:
            lane = self.spare.pop()
        except IndexError:
            lane = KernelLane(self.layers, stream)
        lane.stream = stream
        lane = self.lanes.setdefault(key, lane)
        self.latest[stream] = lane
        return lane

    def copy(self, const int64_t[::1] device_pages not None,
             const int64_t[::1] host_pages not None, Direction direction, uint64_t stream):
        """Move pages of all layers, by page numbers in host memory that are known to be good.

        Parameters
        ----------
        device_pages, host_pages : ndarray of int64, shape (n,)
            At least one.
        direction : Direction
        stream : int
            Handle of one that is `ready`.

        Returns
        -------
        Report
        """
        cdef KernelRequest request
        self.check_locked()
        self.describe(&request, direction, device_pages.shape[0], True)
        request.pages[0], request.pages[1] = &device_pages[0], &host_pages[0]
        request.layers, request.recorded = self.layers, recorded_now(stream)
        return self.code.launch(self.planes, self.lane_of(stream), &request)

    def check(self):
        """Raise a ValueError for a number that a launch has found wrong since the last time."""
        self.check_now()

    cdef int check_now(self) except -1:
        cdef KernelLane lane
        for lane in self.lanes.values():
            found = lane.take_wrong()
            if found is not None:
                side, position, page = found
                name = "host_pages" if side else "device_pages"
                error = page_out_of_range(name, position, page, self.limits[side])
                error.add_note("the numbers were on the GPU: nothing of that transfer has moved")
                raise error
        return 0

    cdef int check_locked(self) except -1:
        """Refuse memory that is page-locked no more: a fault of the kernel ends the context."""
        for block in self.locked:
            if _core.memory_range(block[0]) != block:
                raise ValueError(
                    f"the host pool's {block[1]} bytes at {block[0]:#x} were page-locked when the "
                    "cache was made, and are not any more: the kernel cannot reach them. Make the "
                    "cache anew, or use path='batch' with page numbers in host memory"
                )
        return 0

    cdef void describe(self, KernelRequest *request, int direction, Py_ssize_t count,
                       bint listed) noexcept:
        memset(request, 0, sizeof(request[0]))
        request.limit[0], request.limit[1] = self.limits[0], self.limits[1]
        request.count = count
        request.source = 1 if direction == LOAD else 0
        request.sms = self.sms
        request.rate = self.rates[direction] / 1e3
        request.window_pitch = self.window_pitch if listed else 0


cdef class Selection:
    """Some layers of a cache, ready to be moved.

    Parameters
    ----------
    layers : tuple of int
        Which ones, in order.
    geometry : Geometry
        Where their pages are.
    tensors : tuple of Tensor
        What holds them, on both sides.
    names : tuple of str
        What to call them in messages.
    places : list of Place
        Where each of them was when `geometry` was worked out.
    device : torch.device
        Where the layers are.
    launches : Launches or None
        Of the cache, where the kernel can be used.
    planes : KernelPlanes or None
        In which these layers are side by side.
    first_layer : int
        Which of its layers is the first of these.
    why_not : str
        Why the kernel cannot be used, where it cannot.

    Notes
    -----
    Nothing changes once it is made: many threads may move pages by it at a time.
    """

    cdef readonly tuple layers, tensors, names
    cdef readonly list places
    cdef readonly Geometry geometry
    cdef readonly object device
    cdef readonly Launches launches
    cdef readonly str why_not
    cdef KernelPlanes planes
    cdef unsigned int first_layer
    cdef list addresses, storages
    cdef object index
    cdef bint one_device, strided

    def __init__(
        self, tuple layers, Geometry geometry not None, tuple tensors, tuple names, list places,
        device, Launches launches=None, KernelPlanes planes=None, first_layer=0, str why_not="",
    ):
        self.layers, self.geometry, self.tensors = layers, geometry, tensors
        self.launches, self.planes, self.first_layer = launches, planes, first_layer
        self.why_not = why_not
        self.names, self.places = names, places
        self.addresses = [place.address for place in places]
        # Most tensors of a cache share their storage with others.
        self.storages = list({id(place.storage): place for place in places}.values())
        self.device = device
        self.index = device.index if device.type == "cuda" else None
        self.one_device = self.index is None or torch.cuda.device_count() == 1
        # Tensors were looked at, so the runtime is bound, and stays so.
        self.strided = _core.strided_bound()

    def move(self, device_pages, host_pages, stream, path, Direction direction):
        """Move pages, from the arguments as the caller gave them.

        What is the caller's code is run first, page numbers are copied then, and nothing of the
        caller's is looked at again.

        Parameters
        ----------
        device_pages, host_pages : sequence, array or tensor of int, shape (n,)
        stream : Stream
        path : {"auto", "batch", "strided", "loop"}
        direction : Direction

        Returns
        -------
        Report

        Raises
        ------
        TypeError, ValueError
            If the request is wrong; nothing has moved then.
        BindError
            If the path cannot be taken, before anything is queued.
        CudaError
            If CUDA refuses a copy; ``addresses`` are its destination and source where the error
            is about one copy.
        """
        cdef uint64_t handle = self.handle_of(stream)
        cdef object pages = self.read(device_pages, host_pages, path, direction)
        if self.one_device:
            return self.run(pages, handle, path)
        with streams.device_guard(self.device):
            return self.run(pages, handle, path)

    cpdef object read(self, device_pages, host_pages, path, Direction direction):
        """Read page numbers: as `begin`, or where they are, if that is on the GPU.

        Returns
        -------
        Pages or DevicePages
        """
        if self.launches is not None:
            self.launches.check_now()
            if path == "auto" or path == "kernel":
                lists = _numbers.device_numbers(device_pages, host_pages, self.device)
                if lists is not None:
                    pages = self.device_pages(lists, direction)
                    self.check_places()
                    return pages
        return self.begin(device_pages, host_pages, direction)

    def device_pages(self, tuple lists, Direction direction):
        """Check the list that is in host memory, if one is; see `_numbers.device_numbers`."""
        cdef Geometry g = self.geometry
        near, far = (
            pages if type(pages) is tuple
            else _numbers.checked_numbers(pages, name, limit, (direction == LOAD) == (side == 0))
            for side, (pages, name, limit) in enumerate((
                (lists[0], "device_pages", g.layout.pages[DEVICE]),
                (lists[1], "host_pages", g.layout.pages[HOST]),
            ))
        )
        return DevicePages(near, far, direction)

    cpdef uint64_t handle_of(self, stream) except? 0:
        """Handle of a stream that the caller gave."""
        # What callers in a hurry give.
        if type(stream) is int and 0 <= stream < HANDLES:
            return stream
        if type(stream) is CudaStream and stream.device_index == self.index:
            return stream.cuda_stream
        return streams.stream_handle(stream, self.device)

    cpdef Pages begin(self, device_pages, host_pages, Direction direction):
        """Read the page numbers of a request: once, into memory that nobody else can write to.

        Raises
        ------
        TypeError, ValueError
            If they are no page numbers, out of range, or a destination comes twice; or if a
            tensor has moved.
        """
        cdef Geometry g = self.geometry
        cdef object near, far
        cdef Pages pages = None
        # Elements of a list may be the caller's code, which could free a tensor's memory.
        if type(host_pages) is list:
            far, near = simple(host_pages), simple(device_pages)
        else:
            near, far = simple(device_pages), simple(host_pages)
        if near is not None and far is not None:
            try:
                pages = g.pages(near, far, direction)
            except TypeError:
                pass  # numbers of another type, or none: read with care
        if pages is None:
            near = _numbers.page_numbers(device_pages, "device_pages", g.layout.pages[DEVICE])
            far = _numbers.page_numbers(host_pages, "host_pages", g.layout.pages[HOST])
            pages = g.pages(near, far, direction)
        self.check_places()
        return pages

    cpdef int check_places(self) except -1:
        """Refuse tensors whose memory is not where it was, or not as long."""
        cdef Py_ssize_t i
        cdef object now
        for i in range(len(self.tensors)):
            now = data_ptr(self.tensors[i])
            if now != self.addresses[i]:
                raise self.moved(i, f"at {self.addresses[i]:#x}", f"at {now:#x}")
        for place in self.storages:
            now = storage_bytes(place.storage)
            if now != place.size:
                # Freed, and less of it taken again, which may begin at the same address.
                raise self.moved(
                    self.places.index(place), f"in a storage of {place.size} bytes",
                    f"in one of {now}",
                )
        return 0

    cdef object moved(self, Py_ssize_t index, str before, str now):
        return ValueError(
            f"{self.names[index]} was {before} when the cache was made, and is {now} now: "
            "a cache's tensors must stay where they are; make the cache anew"
        )

    def plan(self, Pages pages not None, uint64_t handle, path):
        """Plan what `run` would do; nothing is queued. Returns the `Plan`."""
        refusal = batch_refusal_of(handle) if path == "auto" else None
        return self.geometry.plan(
            pages, path, refusal is None, self.strided, self.launches is not None
        )

    def layered(self, pages, uint64_t handle, path):
        """Whether all layers are to be loaded by one launch that tells of each layer."""
        cdef Plan plan
        if self.launches is None or not self.launches.code.kernel.waits or recorded_now(handle):
            return False
        if path != "auto" and path != "kernel":
            return False
        if type(pages) is DevicePages:
            return True
        plan = self.plan(pages, handle, path)
        return plan.mode == KERNEL

    cpdef object run(self, pages, uint64_t handle, path):
        """Plan a request and queue its copies on a stream. Returns the `Report`."""
        cdef object refusal = None
        cdef Plan plan
        if type(pages) is DevicePages:
            return self.launch(pages, handle, False)[0] if pages.count else Report()
        cdef bint kernel = self.launches is not None and self.launches.ready(handle)
        if path == "kernel" and self.launches is not None and not kernel:
            raise BindError(
                "path='kernel' is not possible: the stream is being captured, and no memory can be "
                "got for it now. Use the kernel on this stream once before the capture"
            )
        if path == "kernel" and self.launches is None:
            raise BindError(
                f"path='kernel' is not possible: {self.why_not}. Use path='auto', or another one"
            )
        if path == "auto" or path == "batch":
            refusal = batch_refusal_of(handle)
            if refusal is not None and path == "batch" and pages.count:
                raise no_batch(refusal, handle)
        plan = self.geometry.plan(pages, path, refusal is None, self.strided, kernel)
        if plan.mode == KERNEL:
            return self.launch(pages, handle, False)[0] if pages.count else Report()
        return submit(plan, handle, path == "batch", refusal)

    def launch(self, pages, uint64_t handle, bint flags):
        """Move pages by one launch of the kernel.

        Parameters
        ----------
        pages : Pages or DevicePages
            At least one.
        handle : int
            Of the stream.
        flags : bool
            Whether each layer is to raise its flag.

        Returns
        -------
        (Report, KernelLane, int)
            And what a stream waits for, layer by layer: `KernelLane.wait`.
        """
        self.launches.check_locked()
        cdef KernelLane lane = self.launches.lane_of(handle)
        cdef KernelRequest request
        cdef Pages listed
        cdef DevicePages there
        cdef Report report
        if type(pages) is Pages:
            listed = pages
            self.launches.describe(&request, listed.direction, listed.count, True)
            request.pages[0], request.pages[1] = listed.number
        else:
            there = pages
            self.launches.describe(&request, there.direction, there.count, False)
            request.pages[0], request.pages[1] = there.lists[0], there.lists[1]
            request.number[0], request.number[1] = there.number[0], there.number[1]
        request.first_layer, request.layers = self.first_layer, <unsigned int>len(self.layers)
        request.flags, request.recorded = flags, recorded_now(handle)
        report = self.launches.code.launch(self.planes, lane, &request)
        return report, lane, lane.value


cdef object submit(Plan plan, uint64_t stream, bint strict, object refusal):
    cdef Packer packer = Packer(plan)
    cdef Piece piece
    cdef object report = None, done
    while packer.next(&piece):
        if report is not None:
            PyErr_CheckSignals()
        try:
            if piece.path == PATH_STRIDED:
                done = run_strided(piece.ops, piece.count, stream)
            else:
                done = run_copies(
                    piece.dsts, piece.srcs, piece.sizes, piece.same, piece.count, stream,
                    piece.path, strict, plan.batch_size, refusal,
                )
        except CudaError as error:
            locate(error, &piece)
            raise
        report = done if report is None else report + done
    return Report() if report is None else report


cdef locate(object error, const Piece *piece):
    """Say which addresses an error is about, where it is about one copy."""
    cdef Py_ssize_t index
    if error.index is None:
        return
    index = error.index
    if piece.path == PATH_STRIDED:
        error.addresses = piece.ops[9 * index], piece.ops[9 * index + 3]
    else:
        error.addresses = piece.dsts[index], piece.srcs[index]


def none_wrong(const uint64_t[::1] values not None, bint zeros):
    """Whether every number is below 2**63, and none is 0 unless `zeros` allows it."""
    cdef Py_ssize_t i
    cdef uint64_t bits = 0
    # No way out of the loop and no comparison in it: the compiler takes several at a time.
    if zeros:
        for i in range(values.shape[0]):
            bits |= values[i]
    else:
        for i in range(values.shape[0]):
            bits |= values[i] | (values[i] - 1)
    return bits >> 63 == 0
