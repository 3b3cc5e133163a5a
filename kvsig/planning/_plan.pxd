# What a plan is made of, for the packer and for who runs the copies.

from libc.stdint cimport int64_t, uint64_t

# Which way pages go; the value is an index of everything that is kept for both.
cpdef enum Direction:
    LOAD = 0        # host to device
    OFFLOAD = 1     # device to host

# How the planes of a group are moved: a plain copy each, as the rows and slices of one strided
# copy, or (where strided is insisted on) as a strided copy of one row each.
cdef enum Form:
    PLAIN = 0
    STACK = 1
    LINES = 2

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

cdef enum:
    BUCKETS = 64
    MOST_SIZES = 8

cdef struct Costs:
    # Microseconds; see costs.DirectionCosts.
    double byte, latency
    double loop_submit, loop_engine
    double call_submit, call_engine
    double copy_submit, copy_engine
    double strided_submit, strided_engine, strided_row
    double kernel_submit, kernel_latency, kernel_byte, kernel_block_byte, kernel_piece

cdef struct Kind:
    # Groups that cost the same.
    Py_ssize_t planes, depth
    uint64_t width
    bint merges             # neighbouring pages are one wider page
    bint rows               # a run of pages can be the rows of a strided copy
    bint slabs              # and the planes of a slice its slices
    Py_ssize_t groups

cdef struct Group:
    # Planes are in order of slices; a slice is `planes // depth` evenly spaced planes.
    Py_ssize_t first, planes, depth, kind
    uint64_t width
    uint64_t device_pitch, host_pitch       # from page to page
    uint64_t device_step, host_step         # from plane to plane of a slice
    uint64_t device_rows, host_rows         # from slice to slice, in such steps
    bint seamed                             # some copy of it may meet a seam

cdef struct Use:
    # How a mode moves the groups of a kind.
    Form form               # of a page that is in no run
    int64_t shortest        # pages from which a run of a plane is a strided copy
    int64_t slab            # pages from which a run of a slice is one

cdef struct Layout:
    # All that a plan reads of a geometry, so that no object is touched without the GIL.
    Py_ssize_t planes_in, planes, groups, kinds, sizes
    uint64_t *device_base
    uint64_t *host_base
    uint64_t *device_seam
    uint64_t *host_seam
    Py_ssize_t device_seams, host_seams
    Group *group
    Kind *kind
    Use *use                                # [direction][mode][kind], see use_of
    Costs cost[2]
    Py_ssize_t weight[2][6]                 # operations that a page in no run takes
    Py_ssize_t batch_size[8]
    int64_t device_pages, host_pages
    uint64_t page_bytes
    bint any_merges, any_seamed

cdef struct Runs:
    # Pages in no run, and runs by kind and length. The kinds are 1 for neighbours on both sides,
    # and 0 for any other constant step.
    double single
    uint64_t used[2]        # a bit for each bucket that has something in it
    double *count[2]        # runs in each bucket, and
    double *pages[2]        # their pages: one block of memory, made where there is a run

cdef struct Scan:
    # A walk over page numbers that finds the pages which go together.
    const int64_t *device
    const int64_t *host
    Py_ssize_t count
    Py_ssize_t position     # the next page
    Py_ssize_t known        # no run starts before this one
    Py_ssize_t unit         # shortest run of neighbours that is kept together
    Py_ssize_t step         # shortest run of any other constant step, at least 3

cdef struct Price:
    # Microseconds; NEVER where a mode was not considered. `work` is what remains of the time where
    # one transfer comes right behind another: the longer of the host's and the engine's.
    double time, host, work
    double copies, strided  # of the host's operations
    Py_ssize_t calls, batch_size

cdef Py_ssize_t LONGEST_RUN, KEEP_GIL
cdef uint64_t LONGEST_PITCH

cdef Use *use_of(const Layout *p, Py_ssize_t direction, Py_ssize_t mode,
                 Py_ssize_t kind) noexcept nogil
cdef Form form_of(const Costs *c, const Kind *kind, int mode, double size) noexcept nogil
cdef Py_ssize_t next_run(Scan *s, int64_t *device_step, int64_t *host_step) noexcept nogil

cdef class Geometry:
    cdef Layout layout
    cdef readonly object model, planes
    cdef readonly int sms
    cdef readonly tuple rates
    cdef Pages pages_now(self, object device_pages, object host_pages, Direction direction)
    cdef Plan plan_pages(self, Pages pages, object path, bint batch, bint strided,
                         bint kernel)

cdef class Pages:
    cdef int64_t *device    # page numbers of both sides in one piece of memory
    cdef int64_t *host
    cdef Py_ssize_t room    # numbers that it has room for
    cdef readonly Py_ssize_t count
    cdef readonly int direction
    cdef Runs runs
    cdef bint lone          # no page is in a run
    cdef int copy(self, const Py_buffer *near, const Py_buffer *far) except -1
    cdef int check(self, int64_t device_limit, int64_t host_limit) except -1
    cdef object beyond(self, Py_ssize_t first, int64_t device_limit, int64_t host_limit)
    cdef object repeated(self, const int64_t *to, Py_ssize_t last)
    cdef int find_runs(self) except -1 nogil
    cdef int make_buckets(self) except -1 nogil

cdef class Plan:
    cdef readonly Geometry geometry
    cdef readonly Pages pages
    cdef int mode
    cdef Price price[6]
    cdef Py_ssize_t unit, step
    cdef readonly uint64_t same_size
    cdef readonly Py_ssize_t batch_size
    cdef str name_of(self, int mode)
