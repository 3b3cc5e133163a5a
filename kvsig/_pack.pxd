from libc.stdint cimport int64_t, uint64_t


# What comes next of a transfer: nothing, strided copies of rows, such of slices of rows, or plain
# copies.
cdef enum Step:
    END = 0
    ROWS
    CUBES
    COPIES

cdef struct Copies:
    # Plain copies, in buffers that stay as they are until the next step.
    const uint64_t *dsts
    const uint64_t *srcs
    const uint64_t *sizes           # NULL where every copy has `same` bytes
    uint64_t same
    Py_ssize_t count, batch_size, first_size
    int threads                     # that are to submit them
    bint batched                    # in batches, and not one by one
    int64_t took                    # nanoseconds that submitting took, or -1: for the next step

cdef object begin_transfer(object prepared, object device_pages, object host_pages, bint load)
cdef bint choose_now(object transfer, object method, bint batch, uint64_t stream) except -1
cdef Step next_step(object transfer, Copies *copies) except? END
cdef object arrays_of(object transfer, Step step)
