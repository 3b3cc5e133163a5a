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
    BATCH, KEEP_GIL, LONGEST_PITCH, LONGEST_RUN, OFFLOAD, PLAIN, STACK, STRIDED, STRIDED_BATCH,
    Costs, Form, Group, Kind, Layout, Plan, Scan, Use, form_of, next_run, use_of
)

# Words of a strided copy, as kvsig._core.copy_strided takes it.
cdef Py_ssize_t WORDS = 9
# Forced strided copies of one row need a pitch as well, so wider rows are cut.
cdef uint64_t LONGEST_LINE = 0x40000000
# Operations aimed at in the first piece and in the others. The first is short, so that the copy
# engine starts early.
cdef Py_ssize_t FIRST_PIECE = 1024
DEFAULT_PIECE = 8192


cdef class Packer:
    """An iterator over the packed pieces of a plan; for one thread at a time."""

    def __cinit__(self, Plan plan not None):
        self.plan = plan
        self.p = &plan.geometry.layout
        self.mode, self.direction = plan.mode, plan.pages.direction
        self.scan.device, self.scan.host = plan.pages.device, plan.pages.host
        self.scan.count = plan.pages.count
        self.scan.unit, self.scan.step = plan.unit, plan.step
        self.room = FIRST_PIECE

    def __dealloc__(self):
        free(self.copies.dst)
        free(self.copies.src)
        free(self.copies.size)
        free(self.op)
        free(self.block.device)

    cdef bint next(self, Piece *piece) except -1:
        """Pack the next piece; False where there is none."""
        cdef Py_ssize_t weight = self.p.weight[self.direction][self.mode]
        self.settle()
        if self.plain_waits:
            self.plain_waits = False
            self.give(piece)
            if piece.count:
                return True
        while self.scan.position < self.scan.count:
            self.ops = 0
            if self.scan.count * weight < KEEP_GIL:
                self.fill()
            else:
                with nogil:
                    self.fill()
            self.room = DEFAULT_PIECE
            if self.ops:
                self.plain_waits = self.copies.used > 0
                piece.path, piece.ops, piece.count = PATH_STRIDED, self.op, self.ops
                return True
            self.give(piece)
            if piece.count:
                return True
        return False

    cdef void give(self, Piece *piece) noexcept nogil:
        # Whole batch calls, until the end; the rest waits for the next pages.
        cdef bint batched = self.mode == BATCH or self.mode == STRIDED_BATCH
        self.given = self.copies.used
        if batched and self.scan.position < self.scan.count:
            self.given -= self.given % self.plan.batch_size
        piece.path = PATH_BATCH if batched else PATH_LOOP
        piece.dsts, piece.srcs, piece.same = self.copies.dst, self.copies.src, self.plan.same_size
        piece.sizes = NULL if self.plan.same_size else self.copies.size
        piece.count = self.given

    cdef void settle(self) noexcept nogil:
        # The copies that were given are made; what is left of them moves to the front.
        cdef Columns *c = &self.copies
        cdef Py_ssize_t rest = c.used - self.given
        if self.given and rest:
            memmove(c.dst, c.dst + self.given, rest * sizeof(uint64_t))
            memmove(c.src, c.src + self.given, rest * sizeof(uint64_t))
            memmove(c.size, c.size + self.given, rest * sizeof(uint64_t))
        c.used = rest
        self.given = 0

    # --- Memory

    cdef int grow_copies(self, Py_ssize_t more) except -1 nogil:
        cdef Columns *c = &self.copies
        cdef Py_ssize_t room = max(c.used + more, 2 * c.room)
        if (
            resize(&c.dst, room) or resize(&c.src, room)
            or resize(&c.size, room)
        ):
            no_memory(room)
        c.room = room
        return 0

    cdef int grow_ops(self, Py_ssize_t more) except -1 nogil:
        cdef Py_ssize_t room = max(self.ops + more, 2 * self.op_room)
        if resize(&self.op, WORDS * room):
            no_memory(room)
        self.op_room = room
        return 0

    cdef int make_block(self, Py_ssize_t room) except -1 nogil:
        cdef Block *b = &self.block
        cdef int64_t *memory
        if room <= b.room:
            return 0
        memory = <int64_t *>realloc(b.device, 5 * room * sizeof(int64_t))
        if memory == NULL:
            no_memory(room)
        b.device, b.host, b.pages = memory, memory + room, memory + 2 * room
        b.device_step, b.host_step, b.room = memory + 3 * room, memory + 4 * room, room
        return 0

    # --- Pages of a piece

    cdef int fill(self) except -1 nogil:
        cdef Py_ssize_t room = self.room // max(self.p.weight[self.direction][self.mode], 1)
        cdef Py_ssize_t n = 0
        cdef bint single = True
        cdef Scan *s = &self.scan
        room = min(max(room, 1), s.count - s.position)
        if s.unit > LONGEST_RUN and s.step > LONGEST_RUN:
            # No run is of use: the pages are the block.
            n, s.position = s.position, s.position + room
            return self.emit_pages(s.device + n, s.host + n, room)
        self.make_block(room)
        while n < room and s.position < s.count:
            single &= self.take(n)
            n += 1
        if single:
            return self.emit_pages(self.block.device, self.block.host, n)
        return self.emit_runs(n)

    cdef bint take(self, Py_ssize_t n) noexcept nogil:
        # The next page or run goes into the block; whether it is a page.
        cdef Scan *s = &self.scan
        cdef Block *b = &self.block
        cdef int64_t a = 1, c = 1
        cdef Py_ssize_t r = next_run(s, &a, &c)
        # Downwards on both sides is upwards from the other end.
        cdef Py_ssize_t lowest = s.position + (r - 1 if r > 1 and a < 0 else 0)
        b.pages[n] = r
        b.device[n], b.host[n] = s.device[lowest], s.host[lowest]
        b.device_step[n] = -a if a < 0 else a
        b.host_step[n] = -c if a < 0 else c
        s.position += r
        return r == 1

    cdef int emit_pages(self, const int64_t *device, const int64_t *host,
                        Py_ssize_t n) except -1 nogil:
        """Every page by itself."""
        cdef const Group *g
        cdef Form form
        cdef Py_ssize_t i, j
        for j in range(self.p.groups):
            g = &self.p.group[j]
            form = use_of(self.p, self.direction, self.mode, g.kind).form
            if form == PLAIN and not g.seamed:
                self.emit_plain(g, device, host, n)
                continue
            for i in range(n):
                self.put(g, form, device[i], host[i], g.width)
        return 0

    cdef int emit_plain(self, const Group *g, const int64_t *device, const int64_t *host,
                        Py_ssize_t n) except -1 nogil:
        # The loops that most copies come from: no branch, and several at a time by the compiler.
        cdef Py_ssize_t i, q
        cdef uint64_t *near
        cdef uint64_t *far
        cdef uint64_t *size
        cdef uint64_t device_base, host_base
        cdef uint64_t device_pitch = g.device_pitch, host_pitch = g.host_pitch, width = g.width
        if self.copies.used + n * g.planes > self.copies.room:
            self.grow_copies(n * g.planes)
        for q in range(g.first, g.first + g.planes):
            near = (self.copies.src if self.direction == OFFLOAD else self.copies.dst)
            far = (self.copies.dst if self.direction == OFFLOAD else self.copies.src)
            near += self.copies.used
            far += self.copies.used
            size = self.copies.size + self.copies.used
            device_base, host_base = self.p.device_base[q], self.p.host_base[q]
            for i in range(n):
                near[i] = device_base + <uint64_t>device[i] * device_pitch
                far[i] = host_base + <uint64_t>host[i] * host_pitch
            if not self.plan.same_size:
                for i in range(n):
                    size[i] = width
            self.copies.used += n
        return 0

    cdef int emit_runs(self, Py_ssize_t n) except -1 nogil:
        cdef const Group *g
        cdef Py_ssize_t i, j
        for j in range(self.p.groups):
            g = &self.p.group[j]
            for i in range(n):
                self.put_run(g, i)
        return 0

    cdef int put_run(self, const Group *g, Py_ssize_t i) except -1 nogil:
        """Pages of the block that go together, in every plane of a group."""
        cdef const Layout *p = self.p
        cdef const Kind *kind = &p.kind[g.kind]
        cdef const Use *use = use_of(p, self.direction, self.mode, g.kind)
        cdef const Costs *c = &p.cost[self.direction]
        cdef Block *b = &self.block
        cdef int64_t pages = b.pages[i], x
        cdef uint64_t device_step = b.device_step[i], host_step = b.host_step[i], size
        cdef Py_ssize_t q
        if pages == 1:
            return self.put(g, use.form, b.device[i], b.host[i], g.width)
        if kind.merges and device_step == 1 and host_step == 1:
            size = <uint64_t>pages * g.width
            return self.put(
                g, form_of(c, kind, self.mode, <double>size), b.device[i], b.host[i], size
            )
        if pages >= use.slab and self.put_slabs(g, i):
            return 0
        if (
            pages >= use.shortest
            and device_step <= LONGEST_PITCH // g.device_pitch
            and host_step <= LONGEST_PITCH // g.host_pitch
        ):
            for q in range(g.first, g.first + g.planes):
                self.put_rows(
                    g.seamed,
                    p.device_base[q] + b.device[i] * g.device_pitch, device_step * g.device_pitch,
                    p.host_base[q] + b.host[i] * g.host_pitch, host_step * g.host_pitch,
                    g.width, pages,
                )
            return 0
        for x in range(pages):
            self.put(
                g, use.form, b.device[i] + x * <int64_t>device_step,
                b.host[i] + x * <int64_t>host_step, g.width,
            )
        return 0

    cdef int put(self, const Group *g, int form, int64_t device, int64_t host,
                 uint64_t size) except -1 nogil:
        """One page (or a merged run from its lowest page) of every plane of a group."""
        cdef const Layout *p = self.p
        cdef uint64_t near = <uint64_t>device * g.device_pitch
        cdef uint64_t far = <uint64_t>host * g.host_pitch
        cdef Py_ssize_t q, part, each = g.planes // g.depth
        if form == STACK and size <= g.device_step and size <= g.host_step:
            q = g.first
            if not self.meets_seam(
                g, p.device_base[q] + near, p.host_base[q] + far,
                ((g.depth - 1) * g.device_rows + each - 1) * g.device_step + size,
                ((g.depth - 1) * g.host_rows + each - 1) * g.host_step + size,
            ):
                return self.push(
                    p.device_base[q] + near, g.device_step, g.device_rows, p.host_base[q] + far,
                    g.host_step, g.host_rows, size, each, g.depth,
                )
            for part in range(g.depth):
                q = g.first + part * each
                self.put_rows(
                    g.seamed, p.device_base[q] + near, g.device_step, p.host_base[q] + far,
                    g.host_step, size, each,
                )
            return 0
        for q in range(g.first, g.first + g.planes):
            self.put_copy(g.seamed, p.device_base[q] + near, p.host_base[q] + far, size)
        return 0

    cdef bint put_slabs(self, const Group *g, Py_ssize_t i) except -1 nogil:
        """A run whose pages are the rows, and the planes of a slice the slices; False if not."""
        cdef const Layout *p = self.p
        cdef Block *b = &self.block
        cdef uint64_t device_pitch, host_pitch, device_rows, host_rows, each = g.planes // g.depth
        cdef uint64_t pages = b.pages[i], near, far
        cdef Py_ssize_t part, q
        if <uint64_t>b.device_step[i] > LONGEST_PITCH // g.device_pitch:
            return False
        if <uint64_t>b.host_step[i] > LONGEST_PITCH // g.host_pitch:
            return False
        device_pitch = b.device_step[i] * g.device_pitch
        host_pitch = b.host_step[i] * g.host_pitch
        device_rows, host_rows = g.device_step // device_pitch, g.host_step // host_pitch
        if (
            g.device_step % device_pitch or g.host_step % host_pitch
            or device_rows < pages or host_rows < pages
        ):
            return False
        near, far = b.device[i] * g.device_pitch, b.host[i] * g.host_pitch
        for part in range(g.depth):
            q = g.first + part * each
            if self.meets_seam(
                g, p.device_base[q] + near, p.host_base[q] + far,
                (each - 1) * g.device_step + (pages - 1) * device_pitch + g.width,
                (each - 1) * g.host_step + (pages - 1) * host_pitch + g.width,
            ):
                return False
        for part in range(g.depth):
            q = g.first + part * each
            self.push(
                p.device_base[q] + near, device_pitch, device_rows, p.host_base[q] + far,
                host_pitch, host_rows, g.width, pages, each,
            )
        return True

    # --- Copies, cut at seams

    cdef bint meets_seam(self, const Group *g, uint64_t device, uint64_t host,
                         uint64_t device_extent, uint64_t host_extent) noexcept nogil:
        return g.seamed and (
            self.device_room(device) < device_extent or self.host_room(host) < host_extent
        )

    cdef inline uint64_t device_room(self, uint64_t address) noexcept nogil:
        return room_after(self.p.device_seam, self.p.device_seams, address)

    cdef inline uint64_t host_room(self, uint64_t address) noexcept nogil:
        return room_after(self.p.host_seam, self.p.host_seams, address)

    cdef int put_copy(self, bint seamed, uint64_t device, uint64_t host,
                      uint64_t size) except -1 nogil:
        cdef Columns *c = &self.copies
        cdef uint64_t part
        while size:
            part = size
            if seamed:
                part = min(part, min(self.device_room(device), self.host_room(host)))
            if self.mode == STRIDED:
                part = min(part, LONGEST_LINE)
                self.push(device, part, 1, host, part, 1, part, 1, 1)
            else:
                if c.used == c.room:
                    self.grow_copies(256)
                c.dst[c.used] = host if self.direction == OFFLOAD else device
                c.src[c.used] = device if self.direction == OFFLOAD else host
                c.size[c.used] = part
                c.used += 1
            device += part
            host += part
            size -= part
        return 0

    cdef int put_rows(self, bint seamed, uint64_t device, uint64_t device_pitch, uint64_t host,
                      uint64_t host_pitch, uint64_t width, uint64_t rows) except -1 nogil:
        cdef uint64_t fit
        if not seamed:
            return self.push(device, device_pitch, rows, host, host_pitch, rows, width, rows, 1)
        while rows:
            fit = min(
                rows_within(self.device_room(device), device_pitch, width),
                rows_within(self.host_room(host), host_pitch, width),
            )
            fit = min(fit, rows)
            if fit > 1:
                self.push(device, device_pitch, fit, host, host_pitch, fit, width, fit, 1)
            else:
                # A row across the seam, or alone before it.
                fit = 1
                self.put_copy(True, device, host, width)
            device += fit * device_pitch
            host += fit * host_pitch
            rows -= fit
        return 0

    cdef int push(self, uint64_t device, uint64_t device_pitch, uint64_t device_rows,
                  uint64_t host, uint64_t host_pitch, uint64_t host_rows, uint64_t width,
                  uint64_t height, uint64_t depth) except -1 nogil:
        """One strided copy."""
        cdef bint up = self.direction == OFFLOAD
        cdef uint64_t *op
        if self.ops == self.op_room:
            self.grow_ops(64)
        op = self.op + WORDS * self.ops
        op[0], op[1], op[2] = (
            (host, host_pitch, host_rows) if up else (device, device_pitch, device_rows)
        )
        op[3], op[4], op[5] = (
            (device, device_pitch, device_rows) if up else (host, host_pitch, host_rows)
        )
        op[6], op[7], op[8] = width, height, depth
        self.ops += 1
        return 0


cdef int no_memory(Py_ssize_t room) except -1 nogil:
    with gil:
        raise MemoryError(f"no memory for {room} copies of a transfer")


cdef bint resize(uint64_t **array, Py_ssize_t room) noexcept nogil:
    # Whether there is no memory; the array is as it was then.
    cdef uint64_t *memory = <uint64_t *>realloc(array[0], room * sizeof(uint64_t))
    if memory != NULL:
        array[0] = memory
    return memory == NULL


cdef inline uint64_t room_after(const uint64_t *seam, Py_ssize_t seams,
                                uint64_t address) noexcept nogil:
    # Bytes from an address to the first seam above it.
    cdef Py_ssize_t low = 0, high = seams, middle
    while low < high:
        middle = (low + high) >> 1
        if seam[middle] > address:
            high = middle
        else:
            low = middle + 1
    return (seam[low] if low < seams else <uint64_t>-1) - address


cdef inline uint64_t rows_within(uint64_t room, uint64_t pitch, uint64_t width) noexcept nogil:
    return (room - width) // pitch + 1 if room >= width else 0


# --- For Python -------------------------------------------------------------------------------


cdef object array_of(const uint64_t *words, Py_ssize_t count):
    cdef uint64_t[::1] view
    cdef Py_ssize_t i
    array = np.empty(count, np.uint64)
    view = array
    for i in range(count):
        view[i] = words[i]
    return array


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
        "loop", (dsts, srcs, sizes))``. Bytes, but for rows.
    """
    cdef Packer packer = Packer(plan)
    cdef Piece piece
    found = []
    while packer.next(&piece):
        if piece.path == PATH_STRIDED:
            found.append(("strided", array_of(piece.ops, WORDS * piece.count).reshape(-1, WORDS)))
            continue
        sizes = (
            np.full(piece.count, piece.same, np.uint64) if piece.sizes == NULL
            else array_of(piece.sizes, piece.count)
        )
        name = "batch" if piece.path == PATH_BATCH else "loop"
        arrays = array_of(piece.dsts, piece.count), array_of(piece.srcs, piece.count), sizes
        found.append((name, arrays))
    return found
