from libc.stdint cimport uint64_t

from kvsig._path cimport Path
from kvsig.planning._plan cimport Layout, Plan, Run, Scan, Way


cdef struct Piece:
    # Copies of one path, in memory that stays as it is until the next piece is asked for.
    Path path
    const uint64_t *dsts
    const uint64_t *srcs
    const uint64_t *sizes           # NULL where every copy has `same` bytes
    uint64_t same
    const uint64_t *ops             # strided copies, nine words each
    Py_ssize_t count


cdef struct Rows:
    # One side of a strided copy: the first row, bytes from row to row, rows from slice to slice.
    uint64_t address, pitch, step


cdef struct Strided:
    # The nine words of a strided copy, as kvsig._core.copy_strided takes them.
    Rows end[2]                     # destination and source
    uint64_t width, height, depth


cdef class Packer:
    cdef Plan plan
    cdef const Layout *layout
    cdef const Way *way
    cdef Scan scan
    cdef int side[2]                # of destinations and sources
    cdef Py_ssize_t room            # operations aimed at in the next piece
    cdef uint64_t *copy[3]          # destinations, sources and sizes of plain copies, of which
    cdef Py_ssize_t used, given     # so many are there, and were given away
    cdef Strided *op
    cdef Py_ssize_t ops
    cdef Run *run
    cdef Py_ssize_t copy_room[3]
    cdef Py_ssize_t op_room, run_room

    cdef bint next(self, Piece *piece) except -1
