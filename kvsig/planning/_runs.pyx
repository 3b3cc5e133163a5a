# cython: language_level=3, initializedcheck=False, boundscheck=False, wraparound=False
"""Whether a list of copies is worth a look: one pass over it, a nanosecond or two a copy."""

from libc.stdint cimport uint64_t


def neighbours(
    const uint64_t[::1] dsts not None, const uint64_t[::1] srcs not None,
    const uint64_t[::1] sizes, uint64_t same,
):
    """Count the copies that go on where the one before ends, and those that keep its step.

    Parameters
    ----------
    dsts, srcs : ndarray of uint64, shape (n,)
        Addresses.
    sizes : ndarray of uint64, shape (n,), or None
        Bytes of each.
    same : int
        Bytes of each, where `sizes` is None.

    Returns
    -------
    (joined, even) : tuple of int
        Copies that are one with the copy before them, ascending or descending; copies that are as
        far from the one before, on both sides, as that is from the one before it.
    """
    cdef Py_ssize_t i, joined = 0, even = 0
    cdef uint64_t size = same, before = same, near, far, last_near = 0, last_far = 0
    cdef bint listed = sizes is not None
    if listed and dsts.shape[0]:
        before = sizes[0]
    for i in range(1, dsts.shape[0]):
        if listed:
            size = sizes[i]
        far, near = dsts[i] - dsts[i - 1], srcs[i] - srcs[i - 1]
        # Descending, the lower one ends where the higher one begins; differences wrap around.
        joined += (far == before and near == before) or (far == -size and near == -size)
        even += far == last_far and near == last_near and size == before
        last_far, last_near, before = far, near, size
    return joined, even
