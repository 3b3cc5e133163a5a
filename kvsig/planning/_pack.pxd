from libc.stdint cimport int64_t, uint64_t

from kvsig._path cimport Path
from kvsig.planning._plan cimport Group, Layout, Plan, Scan


cdef struct Piece:
    # Copies of one path, in memory that stays as it is until the next piece is asked for.
    Path path
    const uint64_t *dsts
    const uint64_t *srcs
    const uint64_t *sizes           # NULL where every copy has `same` bytes
    uint64_t same
    const uint64_t *ops             # strided copies, nine words each
    Py_ssize_t count


cdef struct Columns:
    # Memory for copies that grows; `used` of `room` are there.
    uint64_t *dst
    uint64_t *src
    uint64_t *size
    Py_ssize_t used, room


cdef struct Block:
    # Runs of pages that are packed together: lowest page on each side, pages, steps of pages.
    int64_t *device
    int64_t *host
    int64_t *pages
    int64_t *device_step
    int64_t *host_step
    Py_ssize_t room


cdef class Packer:
    cdef Plan plan
    cdef const Layout *p
    cdef Scan scan
    cdef int mode
    cdef int direction
    cdef Py_ssize_t room, given
    cdef Columns copies
    cdef uint64_t *op
    cdef Py_ssize_t ops, op_room
    cdef Block block
    cdef bint plain_waits

    cdef bint next(self, Piece *piece) except -1
    cdef void give(self, Piece *piece) noexcept nogil
    cdef void settle(self) noexcept nogil
    cdef int fill(self) except -1 nogil
    cdef int grow_copies(self, Py_ssize_t more) except -1 nogil
    cdef int grow_ops(self, Py_ssize_t more) except -1 nogil
    cdef int make_block(self, Py_ssize_t room) except -1 nogil
    cdef bint take(self, Py_ssize_t n) noexcept nogil
    cdef int emit_pages(self, const int64_t *device, const int64_t *host,
                        Py_ssize_t n) except -1 nogil
    cdef int emit_plain(self, const Group *g, const int64_t *device, const int64_t *host,
                        Py_ssize_t n) except -1 nogil
    cdef int emit_runs(self, Py_ssize_t n) except -1 nogil
    cdef int put_run(self, const Group *g, Py_ssize_t i) except -1 nogil
    cdef int put(self, const Group *g, int form, int64_t device, int64_t host,
                 uint64_t size) except -1 nogil
    cdef bint put_slabs(self, const Group *g, Py_ssize_t i) except -1 nogil
    cdef bint meets_seam(self, const Group *g, uint64_t device, uint64_t host,
                         uint64_t device_extent, uint64_t host_extent) noexcept nogil
    cdef uint64_t device_room(self, uint64_t address) noexcept nogil
    cdef uint64_t host_room(self, uint64_t address) noexcept nogil
    cdef int put_copy(self, bint seamed, uint64_t device, uint64_t host,
                      uint64_t size) except -1 nogil
    cdef int put_rows(self, bint seamed, uint64_t device, uint64_t device_pitch, uint64_t host,
                      uint64_t host_pitch, uint64_t width, uint64_t rows) except -1 nogil
    cdef int push(self, uint64_t device, uint64_t device_pitch, uint64_t device_rows,
                  uint64_t host, uint64_t host_pitch, uint64_t host_rows, uint64_t width,
                  uint64_t height, uint64_t depth) except -1 nogil
