from libc.stdint cimport int64_t, uint64_t


cdef object submit_copies(
    const uint64_t *dsts, const uint64_t *srcs, const uint64_t *sizes, uint64_t same, size_t count,
    uint64_t stream, str path, size_t batch_size, int threads, size_t first_size, bint give_up,
    int64_t *took,
)
