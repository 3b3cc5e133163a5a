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
