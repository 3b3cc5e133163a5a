# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False
"""Addresses: the copies of a plan, packed piece by piece.

A `Packer` goes through the pages of one plan once. Its memory is its own, so that many may work at
a time, and holds one piece: a transfer of any length takes no more. Strided copies come before the
plain ones of the same pages, because the copy engine can work on them while the host still submits
the others.
"""

from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport free, realloc
from libc.string cimport memmove

import numpy as np

from kvsig._path cimport PATH_BATCH, PATH_LOOP, PATH_STRIDED
from kvsig.planning._plan cimport (
    BATCH, DEVICE, HOST, KEEP_GIL, KERNEL, LONGEST_PITCH, STRIDED, STRIDED_BATCH,
    Group, Plan, Run, Scan, Spacing, Use, next_run, no_memory, stacks
)

# Forced strided copies of one row need a pitch as well, so wider rows are cut.
cdef uint64_t LONGEST_LINE = 0x40000000
# Operations aimed at in the first piece and in the others. The first is short, so that the copy
# engine starts early.
cdef Py_ssize_t FIRST_PIECE = 1024
cdef Py_ssize_t NEXT_PIECES = 8192


cdef class Packer:
    """An iterator over the packed pieces of a plan; for one thread at a time."""

    def __cinit__(self, Plan plan not None):
        self.plan, self.way = plan, plan.way
        self.layout = &plan.geometry.layout
        self.side[0], self.side[1] = plan.pages.direction, 1 - plan.pages.direction
        self.scan.pages[DEVICE], self.scan.pages[HOST] = plan.pages.number
        self.scan.count = plan.pages.count
        self.scan.unit, self.scan.step = plan.way.unit, plan.way.step
        self.room = FIRST_PIECE

    def __dealloc__(self):
        cdef int i
        for i in range(3):
            free(self.copy[i])
        free(self.op)
        free(self.run)

    cdef bint next(self, Piece *piece) except -1:
        """Pack the next piece; False where there is none."""
        while True:
            if self.ops:
                piece.path, piece.ops, piece.count = PATH_STRIDED, <uint64_t *>self.op, self.ops
                self.ops = 0
                return True
            if give(self, piece):
                return True
            if self.scan.position == self.scan.count:
                return False
            if self.scan.count * self.way.operations < KEEP_GIL:
                fill(self)
            else:
                with nogil:
                    fill(self)


cdef bint give(Packer p, Piece *piece) noexcept nogil:
    """Give plain copies away, in whole batch calls until the end; False where there are none.

    Those that were given before are made; what is left of them moves to the front.
    """
    cdef bint batched = p.way.mode == BATCH or p.way.mode == STRIDED_BATCH
    cdef int i
    p.used -= p.given
    for i in range(3 if p.given and p.used else 0):
        memmove(p.copy[i], p.copy[i] + p.given, p.used * sizeof(uint64_t))
    p.given = p.used
    if batched and p.scan.position < p.scan.count:
        p.given -= p.given % p.plan.batch_size
    piece.path = PATH_BATCH if batched else PATH_LOOP
    piece.dsts, piece.srcs, piece.same = p.copy[0], p.copy[1], p.plan.same_size
    piece.sizes = NULL if p.plan.same_size else p.copy[2]
    piece.count = p.given
    return p.given > 0


cdef int fill(Packer p) except -1 nogil:
    """Turn the next pages into copies."""
    cdef Scan *s = &p.scan
    cdef Py_ssize_t room = max(p.room // max(p.way.operations, 1), 1)
    cdef Py_ssize_t start = s.position, n = 0, i, k
    cdef bint lone = True
    cdef const Group *g
    cdef const Use *use
    cdef int64_t page[2]
    p.room = NEXT_PIECES
    if p.plan.uses_runs:
        grow(<void **>&p.run, &p.run_room, room, sizeof(Run))
        while n < room and s.position < s.count:
            p.run[n] = next_run(s)
            lone = lone and p.run[n].pages == 1
            n += 1
    else:
        n = min(room, s.count - start)
        s.position += n
    for k in range(p.layout.groups):
        g, use = &p.layout.group[k], &p.way.use[k]
        if lone and not use.stack and not g.seamed and p.way.mode != STRIDED:
            put_plain(p, g, start, n)
            continue
        for i in range(n):
            if lone:
                page[DEVICE], page[HOST] = s.pages[DEVICE][start + i], s.pages[HOST][start + i]
                put_page(p, g, use.stack, page, g.width)
            else:
                put_run(p, g, use, &p.run[i])
    return 0


# --- Pages


cdef int put_plain(Packer p, const Group *g, Py_ssize_t start, Py_ssize_t n) except -1 nogil:
    """Pages of which every plane is a copy by itself."""
    # The loops that most copies come from: no branch, and several at a time by the compiler.
    cdef Py_ssize_t i, q
    cdef uint64_t base, pitch, width = g.width
    cdef uint64_t *into
    cdef const int64_t *pages
    cdef int end, side
    reserve(p, n * g.planes)
    for q in range(g.first, g.first + g.planes):
        for end in range(2):
            side = p.side[end]
            base, pitch = p.layout.base[side][q], g.side[side].pitch
            into, pages = p.copy[end] + p.used, p.scan.pages[side] + start
            for i in range(n):
                into[i] = base + <uint64_t>pages[i] * pitch
        if not p.plan.same_size:
            into = p.copy[2] + p.used
            for i in range(n):
                into[i] = width
        p.used += n
    return 0


cdef int put_run(Packer p, const Group *g, const Use *use, const Run *run) except -1 nogil:
    """Pages that go together, in every plane of a group."""
    cdef uint64_t size = run.pages * g.width
    cdef bint stack, rows = True, slabs = run.pages >= use.slab
    cdef const Spacing *s
    cdef int64_t page[2]
    cdef Py_ssize_t side
    if g.merges and run.step[DEVICE] == 1 and run.step[HOST] == 1:
        stack = stacks(&p.layout.cost[p.side[0]], g, p.way, <double>size)
        return put_page(p, g, stack, run.page, size)
    for side in range(2):
        s = &g.side[side]
        rows = rows and <uint64_t>run.step[side] <= LONGEST_PITCH // s.pitch
        slabs = slabs and s.step % (run.step[side] * s.pitch) == 0
    if rows and slabs:
        return put_rows(p, g, run, g.planes // g.depth)
    if rows and run.pages >= use.shortest:
        return put_rows(p, g, run, 1)
    page[DEVICE], page[HOST] = run.page[DEVICE], run.page[HOST]
    for _ in range(run.pages):
        put_page(p, g, use.stack, page, g.width)
        page[DEVICE] += run.step[DEVICE]
        page[HOST] += run.step[HOST]
    return 0


cdef int put_page(Packer p, const Group *g, bint stack, const int64_t *page,
                  uint64_t size) except -1 nogil:
    """One page, or a merged run from its lowest page, of every plane of a group."""
    cdef Strided op
    cdef const Spacing *s
    cdef Py_ssize_t q
    cdef int end
    for end in range(2):
        s = &g.side[p.side[end]]
        op.end[end] = Rows(address(p, end, g, g.first, page), s.step, s.rows)
    if stack and size <= op.end[0].pitch and size <= op.end[1].pitch:
        op.width, op.height, op.depth = size, g.planes // g.depth, g.depth
        return put_strided(p, g.seamed, &op)
    for q in range(g.first, g.first + g.planes):
        put_copy(p, g.seamed, address(p, 0, g, q, page), address(p, 1, g, q, page), size)
    return 0


cdef int put_rows(Packer p, const Group *g, const Run *run, Py_ssize_t each) except -1 nogil:
    """A run whose pages are the rows, and `each` planes at a time the slices."""
    cdef Strided op
    cdef const Spacing *s
    cdef Rows *rows
    cdef Py_ssize_t i
    cdef int end
    op.width, op.height, op.depth = g.width, run.pages, each
    for i in range(g.planes // each):
        for end in range(2):
            s = &g.side[p.side[end]]
            rows = &op.end[end]
            rows.address = address(p, end, g, g.first + i * each, run.page)
            rows.pitch = run.step[p.side[end]] * s.pitch
            rows.step = s.step // rows.pitch if each > 1 else run.pages
        put_strided(p, g.seamed, &op)
    return 0


cdef inline uint64_t address(Packer p, int end, const Group *g, Py_ssize_t plane,
                             const int64_t *page) noexcept nogil:
    cdef int side = p.side[end]
    return p.layout.base[side][plane] + <uint64_t>page[side] * g.side[side].pitch


# --- Copies, cut at seams


cdef int put_strided(Packer p, bint seamed, const Strided *op) except -1 nogil:
    """A strided copy, or one for each stretch of rows between seams."""
    cdef Strided part = op[0]
    cdef uint64_t i, rows, fit
    cdef int end
    if not seamed or (
        free_bytes(p, 0, op.end[0].address) >= extent(op, 0)
        and free_bytes(p, 1, op.end[1].address) >= extent(op, 1)
    ):
        return push(p, op)
    part.depth = 1
    for i in range(op.depth):
        for end in range(2):
            part.end[end].address = op.end[end].address + i * op.end[end].step * op.end[end].pitch
        rows = op.height
        while rows:
            fit = rows
            for end in range(2):
                fit = min(fit, rows_within(
                    free_bytes(p, end, part.end[end].address), op.end[end].pitch, op.width
                ))
            if fit > 1:
                part.height = part.end[0].step = part.end[1].step = fit
                push(p, &part)
            else:
                # A row across the seam, or alone before it.
                fit = 1
                put_copy(p, True, part.end[0].address, part.end[1].address, op.width)
            for end in range(2):
                part.end[end].address += fit * op.end[end].pitch
            rows -= fit
    return 0


cdef int put_copy(Packer p, bint seamed, uint64_t to, uint64_t of, uint64_t size) except -1 nogil:
    cdef Strided op
    cdef uint64_t part
    while size:
        part = size
        if seamed:
            part = min(part, min(free_bytes(p, 0, to), free_bytes(p, 1, of)))
        if p.way.mode == STRIDED:
            part = min(part, LONGEST_LINE)
            op.end[0] = Rows(to, part, 1)
            op.end[1] = Rows(of, part, 1)
            op.width, op.height, op.depth = part, 1, 1
            push(p, &op)
        else:
            reserve(p, 1)
            p.copy[0][p.used], p.copy[1][p.used] = to, of
            p.copy[2][p.used] = part
            p.used += 1
        to += part
        of += part
        size -= part
    return 0


cdef int push(Packer p, const Strided *op) except -1 nogil:
    grow(<void **>&p.op, &p.op_room, p.ops + 1, sizeof(Strided))
    p.op[p.ops] = op[0]
    p.ops += 1
    return 0


cdef int reserve(Packer p, Py_ssize_t more) except -1 nogil:
    """Make room for plain copies."""
    cdef int i
    for i in range(3):
        grow(<void **>&p.copy[i], &p.copy_room[i], p.used + more, sizeof(uint64_t))
    return 0


cdef uint64_t free_bytes(Packer p, int end, uint64_t address) noexcept nogil:
    """Bytes from an address to the first seam above it."""
    cdef int side = p.side[end]
    cdef const uint64_t *seam = p.layout.seam[side]
    cdef Py_ssize_t low = 0, high = p.layout.seams[side], middle
    while low < high:
        middle = (low + high) >> 1
        if seam[middle] > address:
            high = middle
        else:
            low = middle + 1
    return (seam[low] if low < p.layout.seams[side] else <uint64_t>-1) - address


cdef uint64_t extent(const Strided *op, int end) noexcept nogil:
    cdef uint64_t last = (op.depth - 1) * op.end[end].step + op.height - 1
    return last * op.end[end].pitch + op.width


cdef uint64_t rows_within(uint64_t room, uint64_t pitch, uint64_t width) noexcept nogil:
    return (room - width) // pitch + 1 if room >= width else 0


cdef inline int grow(void **array, Py_ssize_t *room, Py_ssize_t items,
                     size_t size) except -1 nogil:
    """Make room for so many items; those that are there stay."""
    cdef void *memory
    if items <= room[0]:
        return 0
    items = max(items, 2 * room[0])
    memory = realloc(array[0], items * size)
    if memory == NULL:
        no_memory()
    array[0], room[0] = memory, items
    return 0


# --- For Python -------------------------------------------------------------------------------


def pieces(Plan plan not None):
    """Pack a whole plan.

    Parameters
    ----------
    plan : Plan

    Returns
    -------
    list of (str, arrays)
        In the order in which they are to be submitted: ``("strided", ops)`` with ``ops`` of
        shape (m, 9) and type uint64 (dst, dpitch, drows, src, spitch, srows, width, height,
        depth; drows and srows are the rows from one slice to the next), or ``("batch" |
        "loop", (dsts, srcs, sizes))``. Bytes, but for rows. Nothing for the kernel.
    """
    cdef Packer packer
    cdef Piece piece
    found = []
    if plan.mode == KERNEL:
        return found
    packer = Packer(plan)
    while packer.next(&piece):
        if piece.path == PATH_STRIDED:
            found.append(("strided", copied(piece.ops, 9 * piece.count).reshape(-1, 9)))
            continue
        sizes = (
            np.full(piece.count, piece.same, np.uint64) if piece.sizes == NULL
            else copied(piece.sizes, piece.count)
        )
        arrays = copied(piece.dsts, piece.count), copied(piece.srcs, piece.count), sizes
        found.append(("batch" if piece.path == PATH_BATCH else "loop", arrays))
    return found


cdef object copied(const uint64_t *words, Py_ssize_t count):
    return np.array(<uint64_t[:count]><uint64_t *>words)
