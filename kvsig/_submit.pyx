# cython: language_level=3, initializedcheck=False
"""From page numbers to queued copies: what a cache does at each of its transfers.

Engines load layer by layer, one transfer every few hundred microseconds, and what CUDA stages in
between empties the CPU's caches. Every step of Python costs a microsecond then where it costs a
tenth otherwise, so there is none here that the usual transfer needs.
"""

from libc.stdint cimport int64_t, uint64_t

import numpy as np
import torch

from kvsig import _core, _torch

from kvsig._clock cimport clock_ns
from kvsig._core cimport (
    PATH_BATCH, PATH_LOOP, Path, batch_refusal_of, no_batch, run_copies, run_strided
)
from kvsig._pack cimport (
    COPIES, CUBES, END, ROWS, Copies, Step, arrays_of, begin_transfer, choose_now, next_step
)

PATHS = ("auto", "batch", "strided", "loop")

cdef object ndarray = np.ndarray
cdef object Tensor = torch.Tensor
cdef object int64 = torch.int64
cdef object CudaStream = torch.cuda.Stream
cdef object HANDLES = 1 << 64
cdef object Report = _core.Report
cdef object CudaError = _core.CudaError


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


cdef class Submitter:
    """Base of `PagedKVCache`: what its transfers need, and the transfers.

    Attributes
    ----------
    _all : _Selection
        All layers, ready to plan transfers of.
    _selections : dict
        Other choices of layers, by what the caller gave.
    _index : int or None
        Number of the GPU that the layers are on.
    _one_device : bool
        Whether no other GPU can be the current one.
    _rows : bool
        Whether strided copies are CUDA calls of their own.
    """

    cdef public object _all, _index
    cdef public dict _selections
    cdef public bint _one_device, _rows

    def _transfer(
        self, device_pages, host_pages, layers, stream, path, bint load, events=None
    ):
        """Queue a transfer, from the arguments as the caller gave them."""
        cdef object selection = self.chosen(layers, path)
        cdef object transfer
        cdef uint64_t handle
        if type(path) is not str:
            # Of an enumeration, say, whose members are strings.
            path = PATHS[PATHS.index(path)]
        transfer = begin_transfer(
            (<tuple>selection)[2], simple(device_pages), simple(host_pages), load
        )
        if transfer is None:
            transfer = self._converted(selection, device_pages, host_pages, load)
        if events is not None:
            return self._with_events(selection, device_pages, host_pages, stream, path, events)
        # What callers in a hurry give.
        if type(stream) is int and 0 <= stream < HANDLES:
            handle = stream
        elif type(stream) is CudaStream and stream.device_index == self._index:
            handle = stream.cuda_stream
        else:
            handle = _torch.stream_handle(stream, self.device)
        if self._one_device:
            return self.execute(selection, transfer, handle, path, load)
        with _torch.device_guard(self.device):
            return self.execute(selection, transfer, handle, path, load)

    def _chosen(self, layers, path):
        """Return the layers that the caller gave, ready to plan transfers of."""
        return self.chosen(layers, path)

    cdef object chosen(self, object layers, object path):
        cdef object selection = None
        if path not in PATHS:
            raise ValueError(f"path must be 'auto', 'batch', 'strided' or 'loop', not {path!r}")
        if layers is None:
            return self._all
        if type(layers) is int:
            selection = self._selections.get(layers)
        return self._selection(layers) if selection is None else selection

    def _execute(self, selection, transfer, uint64_t handle, str path, bint load):
        """Queue a checked request on the current device."""
        return self.execute(selection, transfer, handle, path, load)

    cdef object execute(
        self, object selection, object transfer, uint64_t handle, str path, bint load
    ):
        cdef bint mixed = choose_now(transfer, path, True, handle)
        cdef bint refused = False
        # Whether batches are refused is only asked where it matters: for a plan of batches alone
        # the first call says so, before anything moves.
        if path == "auto" and (mixed or not self._rows):
            refused = _core.batch_refusal(handle) is not None
            if not self._rows:
                # A runtime newer than every prototype: rows would be copied one by one anyway.
                choose_now(transfer, "loop" if refused else "batch", True, handle)
            elif refused:
                choose_now(transfer, "auto", False, handle)
        return self.queue(selection, transfer, handle, path, load, refused)

    cdef object queue(
        self, object selection, object transfer, uint64_t handle, str path, bint load,
        bint refused,
    ):
        """Queue a planned request piece by piece."""
        cdef object report = None
        cdef object done
        cdef Copies copies
        cdef Step step
        cdef str plain
        copies.took = 0
        while True:
            step = next_step(transfer, &copies)
            if step == END:
                break
            try:
                if step == COPIES:
                    # Where batches are refused, "auto" makes the same loop and says why.
                    plain = path if path != "strided" else "auto"
                    if plain == "auto" and not copies.batched and not refused:
                        plain = "loop"
                    done = self.copy(&copies, handle, plain, report is None)
                else:
                    done = self.rows(arrays_of(transfer, step), step, handle)
            except CudaError as error:
                kind = "strided" if step == ROWS else "strided3" if step == CUBES else "copies"
                self._explain(error, selection, kind, arrays_of(transfer, step), load)
                raise
            if done is None:
                # Batches are refused, and nothing is queued: there may be a better plan without.
                choose_now(transfer, "auto", False, handle)
                return self.queue(selection, transfer, handle, path, load, True)
            report = done if report is None else report + done
        return Report() if report is None else report

    cdef object copy(self, Copies *copies, uint64_t handle, str plain, bint first):
        """Submit plain copies; None where others may be better, for batches are refused."""
        cdef object reason = None
        cdef object done
        cdef Path way = PATH_LOOP
        cdef int64_t begin = clock_ns()
        if plain != "loop":
            reason = batch_refusal_of(handle)
            if reason is None:
                way = PATH_BATCH
            elif plain == "batch":
                raise no_batch(reason, handle)
            elif first and copies.batched:
                return None
        done = run_copies(
            copies.dsts, copies.srcs, copies.sizes, copies.same, copies.count, handle, way,
            plain == "batch", copies.batch_size, reason,
        )
        copies.took = clock_ns() - begin if done.path == "batch" else -1
        return done

    cdef object rows(self, object ops, Step step, uint64_t handle):
        """Submit strided copies."""
        cdef const uint64_t[:, ::1] words
        if step == ROWS:
            flat = ops
            ops = np.ones((len(flat), 9), np.uint64)
            ops[:, [0, 1, 3, 4, 6, 7]] = flat
            ops[:, 2] = ops[:, 5] = flat[:, 5]
        words = ops
        return run_strided(&words[0, 0], words.shape[0], handle)
