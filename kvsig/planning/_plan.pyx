# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False
"""Runs, prices and the choice: what a transfer is to be made of.

`Geometry` holds all that does not depend on page numbers, `Pages` the page numbers of one request,
`Plan` what is to be done with them. A plan depends on nothing else: there is no clock here, no
CUDA, and no memory of what was planned before.
"""

from cpython.buffer cimport PyBUF_FORMAT, PyBUF_ND, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytearray cimport PyByteArray_AS_STRING
from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

import numpy as np

from kvsig._errors import page_out_of_range
from kvsig.planning import geometry as _geometry

PATHS = ("auto", "batch", "strided", "loop", "kernel")
METHODS = ("batch", "loop", "strided", "strided+batch", "strided+loop", "kernel")

LONGEST_PITCH = _geometry.LONGEST_PITCH
# A smaller number of copies per batch call must promise this much to be taken.
cdef double SMALLER_CALLS = 0.97
# The kernel must be this much faster than the copy engine, which costs a computing model nothing.
cdef double WORTH_KERNEL = 1.1
# Runs are cut here, so that one run never fills a buffer without bound.
LONGEST_RUN = 1 << 16
# Below this many pages or copies the loops take less time than giving the GIL away and back.
KEEP_GIL = 512
# Runs of fewer pages are counted by their length, longer ones together. Those of neighbours on both
# sides stand behind those of any other constant step.
cdef Py_ssize_t BUCKETS = 64
cdef double NEVER = 1e30
cdef int64_t NO_RUN = 0x7FFFFFFFFFFFFFFF


# --- Geometry ---------------------------------------------------------------------------------


cdef class Geometry:
    """A geometry with everything worked out that does not depend on page numbers.

    Parameters
    ----------
    planes : Planes
        Places of every layer's K and V on both sides.
    model : CostModel
        What each way of copying costs, in microseconds.
    host_seams, device_seams : array_like of uint64, optional
        Addresses that no single copy may have on both sides of it: where an allocation, or
        a block of host memory that was registered by itself, begins or ends.
    sms : int
        Multiprocessors that the page-copy kernel may take; 0: it is not to be used.
    rates : (float, float)
        Bytes a microsecond that the kernel is held to, of loads and of offloads; 0: none.

    Notes
    -----
    Nothing changes once it is made, so many threads may plan with it at a time.
    """

    def __cinit__(self, planes, model, host_seams=None, device_seams=None, int sms=0,
                  rates=(0.0, 0.0)):
        cdef Layout *p = &self.layout
        cdef Py_ssize_t i
        cdef double rate
        self.planes, self.model, self.memory = planes, model, []
        p.planes_in, p.page_bytes = len(planes), planes.width.sum()
        p.pages[DEVICE], p.pages[HOST] = planes.device_pages, planes.host_pages
        for i, (costs, rate) in enumerate(zip((model.load, model.offload), rates)):
            read_costs(&p.cost[i], costs, sms, rate)
        sizes = sorted(set(model.batch_sizes))
        p.sizes = len(sizes)
        for i in range(p.sizes):
            p.batch_size[i] = sizes[i]
        seams = _geometry.Seams(device_seams, host_seams, planes.device_pages, planes.host_pages)
        for i, (addresses, _) in enumerate(seams.sides):
            p.seam[i], p.seams[i] = words(self, addresses), len(addresses)
        store_groups(self, _geometry.grouped(planes, seams), seams)
        store_ways(self)

    cpdef Pages pages(self, device_pages, host_pages, Direction direction):
        """Copy and check the page numbers of a request.

        Parameters
        ----------
        device_pages, host_pages : ndarray of int64, shape (n,)
            Page numbers, one to one, contiguous.
        direction : Direction
            Says which side is the destination, where no page may come twice.

        Returns
        -------
        Pages

        Raises
        ------
        TypeError
            If they are no such arrays.
        ValueError
            If lengths differ, a number is out of range, or a destination comes twice; the message
            names the place and both values.
        """
        cdef Pages pages = Pages.__new__(Pages)
        cdef Py_buffer near, far
        look_at(device_pages, &near)
        try:
            look_at(host_pages, &far)
            try:
                copy(pages, &near, &far)
            finally:
                PyBuffer_Release(&far)
        finally:
            PyBuffer_Release(&near)
        pages.direction = direction
        check(pages, self.layout.pages)
        return pages

    cpdef Plan plan(self, Pages pages, path="auto", bint batch=True, bint strided=True,
                    bint kernel=False):
        """Choose how to move pages; nothing is packed.

        Parameters
        ----------
        pages : Pages
            Page numbers inside this geometry.
        path : {"auto", "batch", "strided", "loop", "kernel"}
            ``"auto"`` takes what is predicted to end first, but the kernel only where it is
            clearly faster; the others insist on one.
        batch, strided, kernel : bool
            Whether batch calls, strided copies and the page-copy kernel can be used: ``"auto"``
            plans around them.

        Returns
        -------
        Plan
        """
        cdef Plan plan = Plan.__new__(Plan)
        cdef int wanted = modes_of(path, batch, strided, kernel)
        plan.geometry, plan.pages = self, pages
        predict(&self.layout, pages, wanted, plan.price)
        plan.mode = cheapest(wanted, plan.price)
        plan.way = &self.layout.way[pages.direction][plan.mode]
        plan.batch_size = plan.price[plan.mode].batch_size
        plan.uses_runs = pages.runs != NULL and plan.mode != KERNEL and (
            plan.way.unit <= LONGEST_RUN or plan.way.step <= LONGEST_RUN
        )
        plan.same_size = 0 if plan.uses_runs else self.layout.same_size
        return plan


cdef int read_costs(Costs *c, object costs, int sms, double rate) except -1:
    c.byte, c.latency = costs.byte, costs.latency
    c.loop_submit, c.loop_engine = costs.loop_submit, costs.loop_engine
    c.call_submit, c.call_engine = costs.call_submit, costs.call_engine
    c.copy_submit, c.copy_engine = costs.copy_submit, costs.copy_engine
    c.strided_submit, c.strided_engine = costs.strided_submit, costs.strided_engine
    c.strided_row, c.kernel_piece = costs.strided_row, costs.kernel_piece
    c.kernel_submit, c.kernel_latency = costs.kernel_submit, costs.kernel_latency
    c.kernel_byte, c.kernel_block_byte = costs.kernel_byte, costs.kernel_block_byte
    # Few blocks, or a rate that is kept, make a byte dearer.
    if sms > 0:
        c.kernel_byte = max(c.kernel_byte, c.kernel_block_byte / sms)
    if rate > 0:
        c.kernel_byte = max(c.kernel_byte, 1 / rate)
    return 0


cdef void *room(Geometry geometry, Py_ssize_t size) except NULL:
    """Memory of zeros that goes with the geometry."""
    array = bytearray(size + 1)
    geometry.memory.append(array)
    return PyByteArray_AS_STRING(array)


cdef const uint64_t *words(Geometry geometry, list values) except NULL:
    """Addresses in memory that goes with the geometry."""
    array = np.array([*values, 0], np.uint64)
    cdef const uint64_t[::1] view = array
    geometry.memory.append(array)
    return &view[0]


cdef int store_groups(Geometry geometry, list groups, object seams) except -1:
    cdef Layout *p = &geometry.layout
    cdef Group *g
    cdef Spacing *s
    cdef Py_ssize_t first = 0, k, side
    cdef bint plain = True
    p.groups = len(groups)
    p.group = <Group *>room(geometry, p.groups * sizeof(Group))
    rows = [row for slices in groups for part in slices for row in part]
    kinds = {}
    for k, slices in enumerate(groups):
        g = &p.group[k]
        one = slices[0]
        g.first, g.depth, g.planes, g.width = first, len(slices), len(one), one[0].width
        g.merges, g.slabs = True, g.planes > 1
        for side in range(2):
            s = &g.side[side]
            s.pitch = one[0][2 + side]
            s.step = one[1][side] - one[0][side] if g.planes > 1 else 0
            s.rows = (slices[1][0][side] - one[0][side]) // s.step if g.depth > 1 else g.planes
            g.merges = g.merges and s.pitch == g.width
            # Whole numbers of pages apart, and no plane begins within another one.
            g.slabs = g.slabs and not s.step % s.pitch and s.step >= s.pitch * p.pages[side]
        g.planes *= g.depth
        g.seamed = seams.touch(rows[first:first + g.planes])
        first += g.planes
        plain = plain and not g.seamed and g.width == p.group[0].width
        kind = g.planes, g.depth, g.width, g.merges, g.slabs
        p.group[kinds.setdefault(kind, k)].alike += 1
    p.base[DEVICE] = words(geometry, [row.device for row in rows])
    p.base[HOST] = words(geometry, [row.host for row in rows])
    p.same_size = p.group[0].width if plain and groups else 0
    return 0


cdef int store_ways(Geometry geometry) except -1:
    cdef Layout *p = &geometry.layout
    cdef const Costs *c
    cdef Way *way
    cdef Use *use
    cdef Py_ssize_t direction, k
    cdef int mode
    for direction in range(2):
        c = &p.cost[direction]
        for mode in range(KERNEL):
            way = &p.way[direction][mode]
            way.mode, way.unit, way.step = mode, LONGEST_RUN + 1, LONGEST_RUN + 1
            way.use = <Use *>room(geometry, p.groups * sizeof(Use))
            way.submit, way.engine = c.loop_submit, c.loop_engine
            if batched(mode):
                way.submit, way.engine = c.copy_submit, c.copy_engine
            elif mode == STRIDED:
                # A row by itself is no cheaper than a copy by itself.
                way.submit = max(c.strided_submit, c.loop_submit)
                way.engine = max(c.strided_engine + c.strided_row, c.loop_engine)
            for k in range(p.groups):
                use = &way.use[k]
                use[0] = choose_use(c, &p.group[k], way)
                way.operations += 1 if use.stack else p.group[k].planes
                way.step = min(way.step, use.shortest, use.slab)
                way.unit = 2 if p.group[k].merges else min(way.unit, way.step)
            # Steps of one pair occur by chance among random pages.
            way.step = max(way.step, 3)
    return 0


# --- Page numbers -----------------------------------------------------------------------------


cdef int look_at(object array, Py_buffer *view) except -1:
    """Look at page numbers where they are."""
    try:
        PyObject_GetBuffer(array, view, PyBUF_ND | PyBUF_FORMAT)
    except (TypeError, BufferError, ValueError):
        raise no_numbers() from None
    if (
        view.ndim != 1 or view.itemsize != 8 or view.format == NULL
        or (view.format[0] != c"l" and view.format[0] != c"q")
    ):
        PyBuffer_Release(view)
        raise no_numbers()
    return 0


cdef object no_numbers():
    return TypeError("page numbers must be one-dimensional contiguous int64 arrays")


# Memory of page numbers that are no longer needed, kept for the next request: memory that is new
# to the process costs more than all that is done with the numbers in it. Whoever copies numbers
# takes it away meanwhile. More than so many numbers, 8 MiB, are given back.
cdef Py_ssize_t MOST_SPARE = 1 << 20
cdef int64_t *spare_numbers = NULL
cdef Py_ssize_t spare_count = 0


cdef int copy(Pages pages, const Py_buffer *near, const Py_buffer *far) except -1:
    """Copy page numbers, which nobody else can write to then."""
    global spare_numbers, spare_count
    cdef Py_ssize_t n = near.shape[0]
    if n != far.shape[0]:
        raise ValueError(
            f"device_pages has {n} page numbers and host_pages has {far.shape[0]}: "
            "give as many of each"
        )
    if spare_numbers != NULL and spare_count >= 2 * n:
        pages.number[DEVICE], pages.room = spare_numbers, spare_count
        spare_numbers = NULL
    else:
        pages.number[DEVICE] = <int64_t *>malloc(2 * n * sizeof(int64_t) + 1)
        if pages.number[DEVICE] == NULL:
            no_memory()
        pages.room = 2 * n
    pages.number[HOST], pages.count = pages.number[DEVICE] + n, n
    memcpy(pages.number[DEVICE], near.buf, n * sizeof(int64_t))
    memcpy(pages.number[HOST], far.buf, n * sizeof(int64_t))
    return 0


cdef int no_memory() except -1 nogil:
    with gil:
        raise MemoryError("no memory for the pages of a transfer")


# A bit for each page, all 0 between uses, kept for the next request that marks pages. Whoever marks
# takes it away meanwhile, so that no two threads share it.
cdef uint64_t *spare_marks = NULL
cdef int64_t spare_room = 0


cdef class Pages:
    """The page numbers of one request: copied, checked, and searched for runs.

    `Geometry.pages` makes it.

    Attributes
    ----------
    count : int
        Pages to move.
    direction : Direction
        Says which side is the destination, where no page may come twice.
    """

    def __init__(self):
        raise TypeError("page numbers are checked against a geometry: use Geometry.pages")

    def __dealloc__(self):
        global spare_numbers, spare_count
        free(self.runs)
        if self.room <= MOST_SPARE and (spare_numbers == NULL or spare_count < self.room):
            free(spare_numbers)
            spare_numbers, spare_count = self.number[DEVICE], self.room
        else:
            free(self.number[DEVICE])


cdef int check(Pages pages, const int64_t *limit) except -1:
    """Refuse page numbers that may not be, and find the runs of the others."""
    global spare_marks, spare_room
    cdef uint64_t *marks = spare_marks
    cdef int64_t room = spare_room
    cdef Py_ssize_t wrong
    spare_marks = NULL
    if marks == NULL or room < limit[pages.direction]:
        free(marks)
        room = limit[pages.direction]
        marks = <uint64_t *>calloc(room // 64 + 1, sizeof(uint64_t))
        if marks == NULL:
            no_memory()
    try:
        if pages.count < KEEP_GIL:
            wrong = first_wrong(pages, limit, marks)
        else:
            with nogil:
                wrong = first_wrong(pages, limit, marks)
    finally:
        if spare_marks == NULL:
            spare_marks, spare_room = marks, room
        else:
            free(marks)
    if wrong >= 0:
        raise refused(pages, wrong, limit)
    return 0


cdef Py_ssize_t first_wrong(Pages pages, const int64_t *limit, uint64_t *marks) except -2 nogil:
    cdef Py_ssize_t wrong = first_beyond(pages, limit)
    if wrong < 0:
        find_runs(pages)  # differences of numbers out of range may overflow
        wrong = first_repeated(
            pages.number[pages.direction], pages.count, marks, limit[pages.direction]
        )
    return wrong


cdef object refused(Pages pages, Py_ssize_t i, const int64_t *limit):
    cdef const int64_t *to = pages.number[pages.direction]
    cdef Py_ssize_t side, first = 0
    names = "device_pages", "host_pages"
    for side in range(2):
        if not 0 <= pages.number[side][i] < limit[side]:
            return page_out_of_range(names[side], i, pages.number[side][i], limit[side])
    while to[first] != to[i]:
        first += 1
    name = names[pages.direction]
    return ValueError(
        f"{name}[{i}] is page {to[i]} again, after {name}[{first}]: "
        "a destination page may be given once"
    )


cdef Py_ssize_t first_beyond(Pages pages, const int64_t *limit) noexcept nogil:
    # A negative number is a huge unsigned one: one comparison per side.
    cdef const int64_t *d = pages.number[DEVICE]
    cdef const int64_t *h = pages.number[HOST]
    cdef uint64_t device_limit = limit[DEVICE], host_limit = limit[HOST]
    cdef Py_ssize_t i
    for i in range(pages.count):
        if <uint64_t>d[i] >= device_limit or <uint64_t>h[i] >= host_limit:
            return i
    return -1


cdef Py_ssize_t first_repeated(const int64_t *pages, Py_ssize_t n, uint64_t *marks,
                               int64_t limit) noexcept nogil:
    # Bits, because what is accessed at random has to stay in the CPU's nearest caches.
    cdef Py_ssize_t i, found = -1
    cdef uint64_t bit
    cdef uint64_t *word
    for i in range(n):
        word = marks + (pages[i] >> 6)
        bit = <uint64_t>1 << (pages[i] & 63)
        if word[0] & bit:
            found = i
            break
        word[0] |= bit
    if n > limit // 64:
        memset(marks, 0, (limit + 63) // 64 * sizeof(uint64_t))
    else:
        for i in range(n if found < 0 else found):
            marks[pages[i] >> 6] = 0
    return found


# --- Runs -------------------------------------------------------------------------------------


cdef int find_runs(Pages pages) except -1 nogil:
    """Count the runs of a request by their length."""
    cdef Scan s
    cdef Run run
    cdef Bucket *bucket
    s.pages[DEVICE], s.pages[HOST], s.count = pages.number[DEVICE], pages.number[HOST], pages.count
    s.position = s.known = 0
    s.unit, s.step = 2, 3
    pages.lone.runs = pages.lone.pages = pages.count
    while s.position < s.count:
        skip_lone_pages(&s)
        run = next_run(&s)
        if run.pages == 1:
            continue
        if pages.runs == NULL:
            # Most requests have none.
            pages.runs = <Bucket *>calloc(2 * BUCKETS, sizeof(Bucket))
            if pages.runs == NULL:
                no_memory()
        bucket = pages.runs + min(run.pages, BUCKETS - 1)
        if run.step[DEVICE] == 1 and run.step[HOST] == 1:
            bucket += BUCKETS
        bucket.runs += 1
        bucket.pages += run.pages
        pages.lone.runs -= run.pages
        pages.lone.pages -= run.pages
    return 0


cdef Run next_run(Scan *s) noexcept nogil:
    # Pages from the position on that belong together; it moves behind them. A run has a constant
    # step on each side, both up or both down.
    cdef const int64_t *d = s.pages[DEVICE]
    cdef const int64_t *h = s.pages[HOST]
    cdef Py_ssize_t i = s.position, j = i + 1, last, need = 0
    cdef int64_t a = 1, b = 1
    cdef Run run
    if j < s.count and i >= s.known:
        a, b = d[j] - d[i], h[j] - h[i]
        # Among random pages each of these tests almost always fails, so the branches are cheap.
        if a == b and (a == 1 or a == -1):
            need = s.unit
        elif (
            j + 1 < s.count and d[j + 1] - d[j] == a and h[j + 1] - h[j] == b
            and ((a > 0 and b > 0) or (a < 0 and b < 0))
        ):
            need = s.step
    if need:
        last = min(s.count, i + LONGEST_RUN)
        j += 1
        while j < last and d[j] - d[j - 1] == a and h[j] - h[j - 1] == b:
            j += 1
        if j - i < need:
            # Every later start inside gives the same run, shorter still.
            s.known = j - 1
            j = i + 1
    s.position = j
    run.pages = j - i
    if run.pages == 1:
        a = b = 1
    # Downwards on both sides is upwards from the other end.
    j = i if a > 0 else j - 1
    run.page[DEVICE], run.page[HOST] = d[j], h[j]
    run.step[DEVICE], run.step[HOST] = (a, b) if a > 0 else (-a, -b)
    return run


cdef inline void skip_lone_pages(Scan *s) noexcept nogil:
    # What `next_run` says of most pages, many times faster: that they are in no run.
    cdef const int64_t *d = s.pages[DEVICE]
    cdef const int64_t *h = s.pages[HOST]
    cdef Py_ssize_t i = s.position, last = s.count - 2
    cdef int64_t a, b, c, e
    if i >= last:
        return
    a = d[i + 1] - d[i]
    b = h[i + 1] - h[i]
    while i < last:
        c = d[i + 2] - d[i + 1]
        e = h[i + 2] - h[i + 1]
        if (a == b) | (((a ^ c) | (b ^ e)) == 0):
            break
        a, b = c, e
        i += 1
    s.position = i


# --- Prices and the choice --------------------------------------------------------------------


cdef struct Tally:
    # What a mode takes, without the calls of its batches.
    double host, engine, copies, strided


cdef int modes_of(object path, bint batch, bint strided, bint kernel) except -1:
    """The modes that a path may choose from, a bit each."""
    if path == "auto":
        return (
            batch << BATCH | 1 << LOOP | (strided and batch) << STRIDED_BATCH
            | strided << STRIDED_LOOP | kernel << KERNEL
        )
    if path in PATHS:
        return 1 << METHODS.index(path)
    raise ValueError(f"path is {path!r}: it is one of {', '.join(PATHS)}")


cdef inline bint batched(int mode) noexcept nogil:
    return mode == BATCH or mode == STRIDED_BATCH


cdef double plain_cost(const Costs *c, const Way *way, double size) noexcept nogil:
    # Of one copy among many: its share of a full call counts.
    cdef double share = 1.0 / 256 if batched(way.mode) else 0
    return max(
        way.submit + share * c.call_submit, way.engine + size * c.byte + share * c.call_engine
    )


cdef double strided_cost(const Costs *c, double rows, double size) noexcept nogil:
    return max(c.strided_submit, c.strided_engine + rows * (c.strided_row + size * c.byte))


cdef bint stacks(const Costs *c, const Group *g, const Way *way, double size) noexcept nogil:
    # Whether `size` bytes of each plane of a group are moved by one strided copy.
    if g.planes < 2 or way.mode == BATCH or way.mode == LOOP:
        return False
    return way.mode == STRIDED or (
        strided_cost(c, g.planes, size) < g.planes * plain_cost(c, way, size)
    )


cdef Use choose_use(const Costs *c, const Group *g, const Way *way) noexcept nogil:
    cdef Use use
    cdef double page, gain
    use.stack = stacks(c, g, way, <double>g.width)
    use.shortest = use.slab = NO_RUN
    if way.mode == BATCH or way.mode == LOOP:
        return use
    page = g.planes * plain_cost(c, way, <double>g.width)
    if use.stack:
        page = strided_cost(c, g.planes, <double>g.width)
    gain = page - g.planes * (c.strided_row + g.width * c.byte)
    use.shortest = shortest_run(g.planes * c.strided_engine, gain)
    if g.slabs:
        use.slab = shortest_run(g.depth * c.strided_engine, gain)
    return use


cdef int64_t shortest_run(double calls, double gain) noexcept nogil:
    # Pages at which a run saves more than the calls that it takes.
    if gain <= 0 or calls / gain >= 1e9:
        return NO_RUN
    return max(2, <int64_t>(calls / gain) + 1)


cdef void count_pages(Tally *t, const Costs *c, const Group *g, const Way *way, bint stack,
                      double pages, double size) noexcept nogil:
    """Count pages, or merged runs, of `size` bytes each."""
    if stack:
        count_strided(t, c, pages * g.alike, g.planes, size)
        return
    pages *= g.alike * g.planes
    t.copies += pages
    t.host += pages * way.submit
    t.engine += pages * (way.engine + size * c.byte)


cdef void count_strided(Tally *t, const Costs *c, double copies, double rows,
                        double size) noexcept nogil:
    t.strided += copies
    t.host += copies * c.strided_submit
    t.engine += copies * (c.strided_engine + rows * (c.strided_row + size * c.byte))


cdef void count_runs(Tally *t, const Costs *c, const Group *g, const Way *way, const Use *use,
                     double runs, double pages, bint unit) noexcept nogil:
    """Count runs of about one length, of neighbours (`unit`) or not, in groups that are alike."""
    cdef double length = pages / runs, width = <double>g.width
    cdef bint slabs = unit and length >= use.slab
    if unit and g.merges:
        width *= length
        count_pages(t, c, g, way, stacks(c, g, way, width), runs, width)
    elif slabs or length >= use.shortest:
        runs *= g.depth if slabs else g.planes
        pages *= g.planes
        count_strided(t, c, runs * g.alike, pages / runs, width)
    else:
        count_pages(t, c, g, way, use.stack, pages, width)


cdef void predict(const Layout *p, Pages pages, int wanted, Price *price) noexcept nogil:
    """Price the modes that are wanted."""
    cdef const Costs *c = &p.cost[pages.direction]
    cdef Tally tally[6]
    cdef Py_ssize_t i
    cdef int m
    memset(tally, 0, sizeof(tally))
    count_bucket(tally, p, pages.direction, wanted, &pages.lone, False)
    for i in range(2 * BUCKETS if pages.runs != NULL else 0):
        count_bucket(tally, p, pages.direction, wanted, &pages.runs[i], i >= BUCKETS)
    for m in range(MODES):
        price[m].time, price[m].method = NEVER, m
        if wanted >> m & 1 and m == KERNEL:
            price_kernel(
                c, <double>pages.count * p.page_bytes, <double>pages.count * p.planes_in, &price[m]
            )
        elif wanted >> m & 1:
            price_calls(p, c, &p.way[pages.direction][m], &tally[m], &price[m])


cdef inline void count_bucket(Tally *tally, const Layout *p, int direction, int wanted,
                              const Bucket *bucket, bint unit) noexcept nogil:
    cdef const Way *way
    cdef Py_ssize_t k
    cdef int m
    if bucket.runs == 0:
        return
    for m in range(KERNEL):
        way = &p.way[direction][m]
        for k in range(p.groups if wanted >> m & 1 else 0):
            if p.group[k].alike:
                count_runs(
                    &tally[m], &p.cost[direction], &p.group[k], way, &way.use[k],
                    bucket.runs, bucket.pages, unit,
                )


cdef void price_calls(const Layout *p, const Costs *c, const Way *way, Tally *t,
                      Price *price) noexcept nogil:
    # Longest calls first: shorter ones cost the host more.
    cdef Py_ssize_t i, calls, size
    cdef double host, engine, time
    if way.mode > STRIDED and (t.copies == 0 or t.strided == 0):
        price.method = STRIDED if t.copies == 0 else way.mode - STRIDED_BATCH
    if batched(way.mode) and t.copies == 1:
        # A batch of one copy takes longer than the copy by itself.
        t.host += c.loop_submit
        t.engine += c.loop_engine
    for i in range(p.sizes - 1, -1, -1):
        size = p.batch_size[i]
        calls = <Py_ssize_t>t.copies
        host, engine = t.host, t.engine
        if batched(way.mode):
            calls = (calls + size - 1) // size
            host += calls * c.call_submit
            engine += calls * c.call_engine
        time = c.latency + time_of(host, engine, calls + t.strided)
        if time < price.time * SMALLER_CALLS:
            price.time, price.host, price.work = time, host, max(host, engine)
            price.batch_size = size
        if not batched(way.mode) or t.copies <= p.batch_size[0]:
            break


cdef double time_of(double host, double engine, double calls) noexcept nogil:
    # Host and copy engine work side by side; what neither hides is the first call, or the last one
    # where the host is the slower.
    return max(host, engine) + (min(host, engine) / calls if calls > 0 else 0)


cdef void price_kernel(const Costs *c, double size, double rows, Price *price) noexcept nogil:
    # One launch, of bytes or of rows, whichever takes longer.
    price.host, price.batch_size = c.kernel_submit, 1
    price.work = max(size * c.kernel_byte, rows * c.kernel_piece)
    price.time = c.kernel_submit + c.kernel_latency + price.work


cdef bint is_worth_it(const Price *kernel, const Price *engine) noexcept nogil:
    # By itself, and in a row of transfers, where what the first call keeps waiting is hidden.
    return (
        kernel.time * WORTH_KERNEL < engine.time and kernel.work * WORTH_KERNEL < engine.work
    )


def kernel_pays(costs, int sms, double copies, double strided, double rows, double size,
                double pieces, double batch_size=256):
    """Whether a launch of the kernel is to be preferred to copies that are known.

    Parameters
    ----------
    costs : DirectionCosts
        Of their direction.
    sms : int
        Multiprocessors that the kernel may take.
    copies, strided, rows : int
        Copies in batches; strided copies, and the rows of all of them.
    size : int
        Bytes of all.
    pieces : int
        Pages that the kernel would be given.
    batch_size : int, optional
        Copies in one call.

    Returns
    -------
    bool
        By the rule that requests of page numbers are planned by.
    """
    cdef Costs c
    cdef Price kernel, engine
    cdef double calls = (copies + batch_size - 1) // batch_size
    read_costs(&c, costs, sms, costs.kernel_rate)
    engine.host = copies * c.copy_submit + calls * c.call_submit + strided * c.strided_submit
    engine.work = (
        copies * c.copy_engine + calls * c.call_engine + strided * c.strided_engine
        + rows * c.strided_row + size * c.byte
    )
    engine.time = c.latency + time_of(engine.host, engine.work, calls + strided)
    engine.work = max(engine.host, engine.work)
    price_kernel(&c, size, pieces, &kernel)
    return is_worth_it(&kernel, &engine)


cdef int cheapest(int wanted, const Price *price) noexcept nogil:
    cdef int m, best = KERNEL
    for m in range(KERNEL):
        if price[m].time < NEVER and (best == KERNEL or price[m].time < price[best].time):
            best = m
    return KERNEL if is_worth_it(&price[KERNEL], &price[best]) else best


cdef class Plan:
    """What one request is to be made of. Nothing of it changes.

    Attributes
    ----------
    geometry : Geometry
    pages : Pages
    batch_size : int
        Copies per batch call.
    same_size : int
        Bytes of every plain copy; 0 where they may differ.
    """

    @property
    def method(self):
        """What moves the pages: ``"batch"``, ``"strided+loop"``, and so on."""
        return METHODS[self.price[self.mode].method]

    @property
    def predicted_us(self):
        """Predicted time until the last byte has arrived, in microseconds."""
        return self.price[self.mode].time

    @property
    def submit_us(self):
        """Predicted host time inside the CUDA calls, in microseconds."""
        return self.price[self.mode].host

    @property
    def candidates(self):
        """Predicted microseconds of each method that was considered."""
        cdef int m
        found = {}
        for m in range(MODES):
            if self.price[m].time < NEVER:
                found.setdefault(METHODS[self.price[m].method], self.price[m].time)
        return found
