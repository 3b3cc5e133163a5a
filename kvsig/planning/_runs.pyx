# cython: language_level=3, initializedcheck=False, boundscheck=False, wraparound=False
"""Lists of copies, one pass at a time: whether they are worth a look, and what they come to."""

from libc.stdint cimport int64_t, uint64_t

import numpy as np

from kvsig.planning import geometry as _geometry

cdef uint64_t LONGEST_PITCH = _geometry.LONGEST_PITCH


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


cdef Py_ssize_t seams_up_to(const uint64_t[::1] seams, uint64_t address) noexcept nogil:
    """Count the seams that are not above an address."""
    cdef Py_ssize_t low = 0, high = seams.shape[0], middle
    while low < high:
        middle = (low + high) // 2
        if seams[middle] <= address:
            low = middle + 1
        else:
            high = middle
    return low


cdef bint on_seam(const uint64_t[::1] seams, uint64_t address) noexcept nogil:
    cdef Py_ssize_t count = seams_up_to(seams, address)
    return count > 0 and seams[count - 1] == address


cdef struct Block:
    # Memory between two seams.
    uint64_t low, high


cdef Block block_of(const uint64_t[::1] seams, uint64_t address) noexcept nogil:
    cdef Py_ssize_t count = seams_up_to(seams, address)
    cdef Block block
    block.low = seams[count - 1] if count else 0
    block.high = seams[count] if count < seams.shape[0] else <uint64_t>-1
    return block


cdef inline bint inside(const Block *block, uint64_t start, uint64_t size) noexcept nogil:
    return block.low <= start and start + size <= block.high


cdef Py_ssize_t merge(uint64_t[::1] dsts, uint64_t[::1] srcs, uint64_t[::1] sizes,
                      const uint64_t[::1] seams) noexcept nogil:
    """Make one copy of neighbours, in place, and leave out those of no bytes; how many remain."""
    cdef Py_ssize_t i, last = -1
    cdef uint64_t dst, src, size
    cdef int way = 0        # of the last copy: a run goes up or down, and what turns begins another
    for i in range(dsts.shape[0]):
        dst, src, size = dsts[i], srcs[i], sizes[i]
        if size == 0:
            continue
        if last >= 0:
            if (
                way >= 0 and srcs[last] + sizes[last] == src and dsts[last] + sizes[last] == dst
                and not on_seam(seams, src) and not on_seam(seams, dst)
            ):
                sizes[last] += size
                way = 1
                continue
            if (
                way <= 0 and src + size == srcs[last] and dst + size == dsts[last]
                and not on_seam(seams, srcs[last]) and not on_seam(seams, dsts[last])
            ):
                dsts[last], srcs[last] = dst, src
                sizes[last] += size
                way = -1
                continue
        last += 1
        dsts[last], srcs[last], sizes[last] = dst, src, size
        way = 0
    return last + 1


cdef Py_ssize_t last_row(const uint64_t[::1] dsts, const uint64_t[::1] srcs,
                         const uint64_t[::1] sizes, Py_ssize_t first, Py_ssize_t count,
                         const uint64_t[::1] seams, Py_ssize_t min_rows) noexcept nogil:
    """The last of the copies from `first` on that can be rows of one strided copy."""
    cdef Py_ssize_t i = first + 1
    cdef uint64_t size = sizes[first], far, near
    cdef Block to, origin
    # Most copies are no first rows, which is seen by the last row that there would have to be.
    if first + min_rows > count or dsts[first + min_rows - 1] - dsts[first] != (
        <uint64_t>(min_rows - 1) * (dsts[i] - dsts[first])
    ):
        return first
    far, near = dsts[i] - dsts[first], srcs[i] - srcs[first]
    if <int64_t>far < 0:    # all rows go up, or all go down
        far, near = -far, -near
    if far < size or near < size or far > LONGEST_PITCH or near > LONGEST_PITCH:
        return first
    far, near = dsts[i] - dsts[first], srcs[i] - srcs[first]
    to, origin = block_of(seams, dsts[first]), block_of(seams, srcs[first])
    # A copy that crosses a seam as it was given is no row: it is refused by itself.
    if not inside(&to, dsts[first], size) or not inside(&origin, srcs[first], size):
        return first
    while (
        i < count and sizes[i] == size and dsts[i] - dsts[i - 1] == far
        and srcs[i] - srcs[i - 1] == near and inside(&to, dsts[i], size)
        and inside(&origin, srcs[i], size)
    ):
        i += 1
    return i - 1


cdef (Py_ssize_t, Py_ssize_t) find_rows(
    uint64_t[::1] dsts, uint64_t[::1] srcs, uint64_t[::1] sizes, Py_ssize_t count,
    const uint64_t[::1] seams, Py_ssize_t min_rows, uint64_t[:, ::1] rows,
) noexcept nogil:
    """Take evenly spaced copies out, into `rows`; how many are left in place, and strided ones."""
    cdef Py_ssize_t i = 0, last, low, left = 0, made = 0
    cdef uint64_t height
    while i < count:
        last = last_row(dsts, srcs, sizes, i, count, seams, min_rows)
        height = last - i + 1
        if last - i + 1 >= min_rows:
            low = i if dsts[i] < dsts[last] else last
            rows[made, 0], rows[made, 3] = dsts[low], srcs[low]
            rows[made, 1] = (dsts[i + last - low] - dsts[low]) // (height - 1)
            rows[made, 4] = (srcs[i + last - low] - srcs[low]) // (height - 1)
            rows[made, 2] = rows[made, 5] = rows[made, 7] = height
            rows[made, 6], rows[made, 8] = sizes[i], 1
            made += 1
            i = last + 1
            continue
        # The last of them may be the first of others.
        last = max(last, i + 1)
        while i < last:
            dsts[left], srcs[left], sizes[left] = dsts[i], srcs[i], sizes[i]
            left += 1
            i += 1
    return left, made


def planned(dsts, srcs, sizes, const uint64_t[::1] seams not None, Py_ssize_t min_rows):
    """Merge neighbouring copies, and find those that are evenly spaced.

    Parameters
    ----------
    dsts, srcs, sizes, seams, min_rows
        As `kvsig.planning.descriptors.plan` takes them.

    Returns
    -------
    (dsts, srcs, sizes, rows) : tuple of ndarray of uint64
        Arrays of its own.
    """
    cdef uint64_t[::1] to, origin, width
    cdef uint64_t[:, ::1] rows
    cdef Py_ssize_t left, made = 0
    dsts, srcs, sizes = (np.array(given, np.uint64, order="C") for given in (dsts, srcs, sizes))
    to, origin, width = dsts, srcs, sizes
    with nogil:
        left = merge(to, origin, width, seams)
    strided = np.empty((left // min_rows, 9), np.uint64)
    if len(strided):
        rows = strided
        with nogil:
            left, made = find_rows(to, origin, width, left, seams, min_rows, rows)
    return dsts[:left], srcs[:left], sizes[:left], strided[:made]


def placed(const uint64_t[::1] offsets not None, const uint64_t[::1] bases not None):
    """Add each of some offsets to each of some bases, base by base; an ndarray of uint64."""
    cdef Py_ssize_t i, k, at = 0
    found = np.empty(offsets.shape[0] * bases.shape[0], np.uint64)
    cdef uint64_t[::1] into = found
    for k in range(bases.shape[0]):
        for i in range(offsets.shape[0]):
            into[at] = bases[k] + offsets[i]
            at += 1
    return found
