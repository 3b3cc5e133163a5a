# cython: language_level=3, initializedcheck=False, boundscheck=False, wraparound=False
"""One request on its way: page numbers copied once, planned once, run piece by piece.

Engines load layer by layer, one transfer every few hundred microseconds, and what CUDA stages in
between empties the CPU's caches. Every step of Python costs a microsecond then where it costs a
tenth otherwise, so there is none here that the usual request needs.
"""

from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport int64_t, uint64_t

import numpy as np
import torch

from kvsig import _core, streams, tensors

from kvsig._core cimport batch_refusal_of, no_batch, run_copies, run_strided
from kvsig._path cimport PATH_STRIDED
from kvsig.planning._pack cimport Packer, Piece
from kvsig.planning._plan cimport Direction, Geometry, Pages, Plan

cdef object ndarray = np.ndarray
cdef object Tensor = torch.Tensor
cdef object int64 = torch.int64
cdef object CudaStream = torch.cuda.Stream
cdef object HANDLES = 1 << 64
cdef object Report = _core.Report
cdef object CudaError = _core.CudaError
cdef object data_ptr = torch.Tensor.data_ptr


class TensorMoved(ValueError):
    """A tensor's memory is not where it was: the tensor, and both addresses."""


cdef object simple(object values):
    """What callers mostly give as an array, unchecked; anything else as None."""
    kind = type(values)
    if kind is ndarray:
        return values
    if kind is Tensor and values.dtype is int64 and values.is_cpu:
        return values.numpy()
    if kind is list:
        try:
            return np.array(values)
        except ValueError:
            pass  # ragged: the slow way names the argument
    return None


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
    addresses : list of int
        Where each of them was when `geometry` was worked out.
    device : torch.device
        Where the layers are.

    Notes
    -----
    Nothing changes once it is made: many threads may move pages by it at a time.
    """

    cdef readonly tuple layers, tensors
    cdef readonly list addresses
    cdef readonly Geometry geometry
    cdef readonly object device
    cdef object index
    cdef bint one_device, strided

    def __init__(
        self, tuple layers, Geometry geometry not None, tuple tensors, list addresses, device
    ):
        self.layers, self.geometry, self.tensors = layers, geometry, tensors
        self.addresses = addresses
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
        cdef Pages pages = self.begin(device_pages, host_pages, direction)
        if self.one_device:
            return self.run(pages, handle, path)
        with streams.device_guard(self.device):
            return self.run(pages, handle, path)

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
        cdef object near = simple(device_pages), far = simple(host_pages)
        cdef Pages pages = None
        if near is not None and far is not None:
            pages = g.pages_now(near, far, direction)
        if pages is None:
            near = tensors.page_numbers(device_pages, "device_pages", g.layout.device_pages)
            far = tensors.page_numbers(host_pages, "host_pages", g.layout.host_pages)
            pages = g.pages_now(near, far, direction)
        self.check_places()
        return pages

    cpdef int check_places(self) except -1:
        """Refuse tensors whose memory is not where it was."""
        cdef Py_ssize_t i
        cdef object now
        for i in range(len(self.tensors)):
            now = data_ptr(self.tensors[i])
            if now != self.addresses[i]:
                raise TensorMoved(self.tensors[i], self.addresses[i], now)
        return 0

    def plan(self, Pages pages not None, uint64_t handle, path):
        """Plan what `run` would do; nothing is queued. Returns the `Plan`."""
        refusal = batch_refusal_of(handle) if path == "auto" else None
        return self.geometry.plan_pages(pages, path, refusal is None, self.strided, False)

    cpdef object run(self, Pages pages, uint64_t handle, path):
        """Plan a request and queue its copies on a stream. Returns the `Report`."""
        cdef object refusal = None
        cdef Plan plan
        if path == "auto" or path == "batch":
            refusal = batch_refusal_of(handle)
            if refusal is not None and path == "batch" and pages.count:
                raise no_batch(refusal, handle)
        plan = self.geometry.plan_pages(pages, path, refusal is None, self.strided, False)
        return submit(plan, handle, path == "batch", refusal)


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
