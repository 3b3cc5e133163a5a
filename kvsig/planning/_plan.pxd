# What a plan is made of, for the packer and for who runs the copies.

from libc.stdint cimport int64_t, uint64_t

# Which way pages go; the value is an index of everything that is kept for both, and the side that
# is written to.
cpdef enum Direction:
    LOAD = 0        # host to device
    OFFLOAD = 1     # device to host

# Sides, as indexes.
cdef enum:
    DEVICE = 0
    HOST = 1

# What a plan may consist of. The mixtures are strided copies where they are cheaper, and batches or
# single copies for the rest. The kernel moves all of a request in one launch, or nothing.
cdef enum:
    BATCH = 0
    LOOP = 1
    STRIDED = 2
    STRIDED_BATCH = 3
    STRIDED_LOOP = 4
    KERNEL = 5
    MODES = 6

cdef struct Costs:
    # Microseconds; see costs.DirectionCosts.
    double byte, latency
    double loop_submit, loop_engine
    double call_submit, call_engine
    double copy_submit, copy_engine
    double strided_submit, strided_engine, strided_row
    double kernel_submit, kernel_latency, kernel_byte, kernel_block_byte, kernel_piece

cdef struct Spacing:
    # Of a group, on one side: bytes from page to page, and from plane to plane of a slice; such
    # steps from slice to slice.
    uint64_t pitch, step, rows

cdef struct Group:
    # Planes are in order of slices; a slice is `planes // depth` evenly spaced planes.
    Py_ssize_t first, planes, depth
    uint64_t width
    Spacing side[2]
    bint merges             # neighbouring pages are one wider page
    bint slabs              # a run of pages can be rows whose slices are the planes of a slice
    bint seamed             # some copy of it may meet a seam
    Py_ssize_t alike        # groups that cost the same; 0 where an earlier one stands for this one

cdef struct Use:
    # How a mode moves a group.
    bint stack              # a page that is in no run is one strided copy of all planes
    int64_t shortest        # pages from which a run of a plane is a strided copy
    int64_t slab            # pages from which a run of a slice is one

cdef struct Way:
    # How a mode moves pages in one direction.
    int mode
    double submit, engine   # of a plain copy, bytes apart
    Py_ssize_t operations   # that a page in no run takes
    Py_ssize_t unit         # shortest run of neighbours that is kept together
    Py_ssize_t step         # shortest run of any other constant step, at least 3
    Use *use                # of each group

cdef struct Layout:
    # All that a plan reads of a geometry, so that no object is touched without the GIL.
    Py_ssize_t planes_in, groups, sizes
    const uint64_t *base[2]
    const uint64_t *seam[2]
    Py_ssize_t seams[2]
    Group *group
    Way way[2][6]                           # by direction and mode
    Costs cost[2]
    Py_ssize_t batch_size[8]
    int64_t pages[2]
    uint64_t page_bytes
    uint64_t same_size                      # of every copy that is one page; 0 where they differ

cdef struct Run:
    # Pages that go together: the lowest page on each side, steps of pages, number.
    int64_t page[2]
    int64_t step[2]
    Py_ssize_t pages

cdef struct Bucket:
    # Runs of about one length, and their pages.
    double runs, pages

cdef struct Scan:
    # A walk over page numbers that finds the pages which go together.
    const int64_t *pages[2]
    Py_ssize_t count
    Py_ssize_t position     # the next page
    Py_ssize_t known        # no run starts before this one
    Py_ssize_t unit, step   # see Way

cdef struct Price:
    # Microseconds; NEVER where a mode was not considered. `work` is what remains of the time where
    # one transfer comes right behind another: the longer of the host's and the engine's.
    double time, host, work
    Py_ssize_t batch_size
    int method              # the mode, or the plain one where a mixture has only one part

cdef Py_ssize_t LONGEST_RUN, KEEP_GIL
cdef uint64_t LONGEST_PITCH

cdef bint stacks(const Costs *c, const Group *g, const Way *way, double size) noexcept nogil
cdef Run next_run(Scan *s) noexcept nogil
cdef int no_memory() except -1 nogil

cdef class Geometry:
    cdef Layout layout
    cdef list memory        # that `layout` points to
    cdef readonly object model, planes
    cpdef Pages pages(self, device_pages, host_pages, Direction direction)
    cpdef Plan plan(self, Pages pages, path=*, bint batch=*, bint strided=*, bint kernel=*)

cdef class Pages:
    cdef int64_t *number[2]     # by side, in one piece of memory
    cdef Py_ssize_t room        # numbers that it has room for
    cdef readonly Py_ssize_t count
    cdef readonly int direction
    cdef Bucket lone            # pages that are in no run
    cdef Bucket *runs           # of each length; NULL where there are none

cdef class Plan:
    cdef readonly Geometry geometry
    cdef readonly Pages pages
    cdef int mode
    cdef Price price[6]
    cdef const Way *way
    cdef bint uses_runs         # some pages are kept together
    cdef readonly uint64_t same_size
    cdef readonly Py_ssize_t batch_size
