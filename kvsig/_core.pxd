from libc.stdint cimport uint64_t

from kvsig._path cimport PATH_BATCH, PATH_KERNEL, PATH_LOOP, PATH_STRIDED, Path

# Why batches cannot be used on a stream now, or None. Asks CUDA once whether it is being captured.
# Raises where the library is damaged: it should have the batch function, and has not.
cdef object batch_refusal_of(uint64_t stream)

# The exception for path="batch" where batches are refused for a reason.
cdef object no_batch(object reason, uint64_t stream)

# Submits copies that are known to be good, at least one, by PATH_BATCH or PATH_LOOP; a Report.
# Sizes are NULL where each copy has `same` bytes. It does not ask again whether batches are
# refused. Where the call itself refuses, the rest is made one by one, unless `strict`: BindError.
# `reason` is what the report says of a loop that was not asked for.
cdef object run_copies(
    const uint64_t *dsts, const uint64_t *srcs, const uint64_t *sizes, uint64_t same, size_t count,
    uint64_t stream, Path path, bint strict, size_t batch_size, object reason,
)

# Submits strided copies that are known to be good, at least one, 9 words each; a Report.
cdef object run_strided(const uint64_t *ops, size_t count, uint64_t stream)

# What a transfer did, as callers get it.
cdef class Report:
    cdef readonly str path
    cdef readonly object reason
    cdef readonly size_t copies
    cdef readonly size_t calls
    cdef readonly uint64_t bytes

# What is asked of one launch of the page-copy kernel. A list of page numbers is an int64 array in
# host memory (`number` 0), or in device memory, 4 or 8 bytes a number. Side 0 is the device, 1 the
# host.
cdef struct KernelRequest:
    const void *pages[2]
    unsigned int number[2]
    uint64_t limit[2]       # pages of each side
    size_t count            # pages
    unsigned int first_layer, layers
    unsigned int source     # the side to read
    uint64_t window_pitch   # host bytes from page to page to order pages by; 0: as they come
    unsigned int sms        # of long transfers
    double rate             # bytes a nanosecond at most; 0: not held
    bint flags              # whether each layer raises its flag
    bint recorded           # the stream is being captured

# The planes of a cache in device memory, layer by layer.
cdef class KernelPlanes:
    cdef void *device
    cdef void *host
    cdef readonly unsigned int planes, layer_planes, unit
    cdef readonly bint regular
    cdef bint find_regular(self)
    cdef uint64_t page_bytes(self, unsigned int first, unsigned int layers) noexcept nogil

# What the launches of one cache on one stream share, in the order of that stream.
cdef class KernelLane:
    cdef unsigned int *counts
    cdef unsigned int *flags
    cdef void *wrong            # pinned, and the same memory as the device has it
    cdef void *device_wrong
    cdef int *narrow            # page numbers on their way, and where they lie for the kernel
    cdef int *numbers
    cdef size_t narrow_room, room
    cdef list outgrown
    cdef readonly unsigned int layers, value
    cdef public uint64_t stream
    cdef readonly object lock
    cdef reserve(self, size_t count, bint on_device)
    cpdef object take_wrong(self)
    cpdef object wait(self, unsigned int layer, unsigned int value, uint64_t stream)
    cpdef object tell(self, const uint64_t[::1] events, unsigned int value, uint64_t stream)

# The compiled kernel as launches need it.
cdef class KernelCode:
    cdef void *wide
    cdef void *thin
    cdef unsigned int multiprocessors
    cdef bint clusters
    cdef readonly object kernel
    cdef Report launch(self, KernelPlanes planes, KernelLane lane, const KernelRequest *request)

# Whether a stream is being captured, and a number that no other stream of the process ever has.
cdef bint recorded_now(uint64_t stream)
cdef uint64_t stream_number(uint64_t stream)
