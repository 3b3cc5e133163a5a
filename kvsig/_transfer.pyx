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

from kvsig import _core, tensors

from kvsig._core cimport batch_refusal_of, no_batch, run_copies, run_strided
from kvsig._path cimport PATH_STRIDED
from kvsig.planning._pack cimport Packer, Piece
from kvsig.planning._plan cimport OFFLOAD, Direction, Geometry, Pages, Plan

cdef object ndarray = np.ndarray
cdef object Tensor = torch.Tensor
cdef object int64 = torch.int64
cdef object Report = _core.Report
cdef object CudaError = _core.CudaError
cdef object data_ptr = torch.Tensor.data_ptr


cdef object as_array(object values, str name, int64_t limit):
    """Page numbers as an int64 array: what callers mostly give without a step of Python."""
    kind = type(values)
    if kind is ndarray:
        if values.dtype.char == "l" and values.ndim == 1 and values.flags.c_contiguous:
            return values
    elif kind is Tensor and values.dtype is int64 and values.is_cpu and values.dim() == 1:
        return np.ascontiguousarray(values.numpy())
    return tensors.page_numbers(values, name, limit)


def begin(Geometry geometry not None, device_pages, host_pages, Direction direction):
    """Read the page numbers of a request: once, into memory that nobody else can write to.

    Parameters
    ----------
    geometry : Geometry
        Of any layers of the cache: all have the same pages.
    device_pages, host_pages : sequence, array or tensor of int, shape (n,)
        Page numbers, as the caller gave them.
    direction : Direction

    Returns
    -------
    Pages

    Raises
    ------
    TypeError, ValueError
        If they are no page numbers, out of range, or a destination comes twice.
    """
    near = as_array(device_pages, "device_pages", geometry.layout.device_pages)
    far = as_array(host_pages, "host_pages", geometry.layout.host_pages)
    return Pages(near, far, geometry.layout.device_pages, geometry.layout.host_pages, direction)


def choose(Geometry geometry not None, Pages pages not None, uint64_t stream, path):
    """Plan what `run` would do; nothing is queued.

    Parameters
    ----------
    geometry : Geometry
    pages : Pages
    stream : int
        Handle of the stream.
    path : {"auto", "batch", "strided", "loop"}

    Returns
    -------
    Plan
    """
    refusal = batch_refusal_of(stream) if path == "auto" else None
    return geometry.plan_pages(pages, path, refusal is None, _core.strided_bound())


def run(Geometry geometry not None, Pages pages not None, uint64_t stream, path):
    """Plan a request and queue its copies.

    Parameters
    ----------
    geometry : Geometry
        Of the layers to move.
    pages : Pages
    stream : int
        Handle of the stream.
    path : {"auto", "batch", "strided", "loop"}

    Returns
    -------
    Report

    Raises
    ------
    BindError
        If the path cannot be taken, before anything is queued.
    CudaError
        If CUDA refuses a copy; ``addresses`` are its destination and source where the error is
        about one copy.
    """
    cdef object refusal = None
    if path == "auto" or path == "batch":
        refusal = batch_refusal_of(stream)
        if refusal is not None and path == "batch" and pages.count:
            raise no_batch(refusal, stream)
    return submit(
        geometry.plan_pages(pages, path, refusal is None, _core.strided_bound()), stream,
        path == "batch", refusal,
    )


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


def moved(tuple tensors_, list addresses):
    """Number of the first tensor whose memory is not where it was, or -1.

    Parameters
    ----------
    tensors_ : tuple of Tensor
    addresses : list of int
        Where each one was.
    """
    cdef Py_ssize_t i
    for i in range(len(tensors_)):
        if data_ptr(tensors_[i]) != addresses[i]:
            return i
    return -1


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
