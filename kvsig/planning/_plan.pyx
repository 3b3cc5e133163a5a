# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False
"""Runs, prices and the choice: what a transfer is to be made of.

`Geometry` holds all that does not depend on page numbers, `Pages` the page numbers of one request,
`Plan` what is to be done with them. A plan depends on nothing else: there is no clock here, no
CUDA, and no memory of what was planned before.
"""

from cpython.buffer cimport PyBUF_FORMAT, PyBUF_ND, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from kvsig._errors import page_out_of_range
from kvsig.planning import geometry as _geometry

PATHS = ("auto", "batch", "strided", "loop", "kernel")
METHODS = ("batch", "loop", "strided", "strided+batch", "strided+loop", "kernel")

LONGEST_PITCH = _geometry.LONGEST_PITCH
# A smaller number of copies per batch call must promise this much to be taken.
cdef double SMALLER_CALLS = 0.97
# The kernel must be this much faster than the copy engine, which costs a computing model nothing.
cdef double WORTH_KERNEL = 1.1
# A batch call has no more copies, whatever the cost model says.
cdef Py_ssize_t LONGEST_CALL = 1 << 31
# Runs are cut here, so that one run never fills a buffer without bound.
LONGEST_RUN = 1 << 16
# Below this many pages or copies the loops take less time than giving the GIL away and back.
KEEP_GIL = 512
# Destinations up to this many are compared pairwise, which touches no memory but theirs.
cdef Py_ssize_t FEW = 24
# Run lengths below it have a bucket of their own, longer ones one per octave.
cdef Py_ssize_t EXACT = 36
cdef double NEVER = 1e30
cdef int64_t NO_RUN = 0x7FFFFFFFFFFFFFFF

cdef extern from *:
    int lowest_bit "__builtin_ctzll"(uint64_t bits) noexcept nogil


# --- Costs ------------------------------------------------------------------------------------


cdef inline double larger(double a, double b) noexcept nogil:
    return a if a > b else b


cdef inline bint batched(int mode) noexcept nogil:
    return mode == BATCH or mode == STRIDED_BATCH


cdef inline double plain_host(const Costs *c, int mode) noexcept nogil:
    return c.copy_submit if batched(mode) else c.loop_submit


cdef inline double plain_engine(const Costs *c, int mode, double size) noexcept nogil:
    return (c.copy_engine if batched(mode) else c.loop_engine) + size * c.byte


cdef inline double plain_cost(const Costs *c, int mode, double size) noexcept nogil:
    # Of one copy among many: its share of a full call counts.
    cdef double share = 1.0 / 256 if batched(mode) else 0
    return larger(
        plain_host(c, mode) + share * c.call_submit,
        plain_engine(c, mode, size) + share * c.call_engine,
    )


cdef inline double strided_cost(const Costs *c, double rows, double size) noexcept nogil:
    return larger(c.strided_submit, c.strided_engine + rows * (c.strided_row + size * c.byte))


cdef Form form_of(const Costs *c, const Kind *kind, int mode, double size) noexcept nogil:
    # How the planes of a group move `size` bytes each.
    if mode == BATCH or mode == LOOP:
        return PLAIN
    if mode == STRIDED:
        return STACK if kind.planes > 1 else LINES
    if kind.planes < 2:
        return PLAIN
    if strided_cost(c, kind.planes, size) < kind.planes * plain_cost(c, mode, size):
        return STACK
    return PLAIN


cdef inline int64_t shortest_run(double calls, double gain) noexcept nogil:
    # Pages at which a run saves more than the calls that it takes.
    if gain <= 0 or calls / gain >= 1e9:
        return NO_RUN
    return <int64_t>larger(2, <double>(<int64_t>(calls / gain) + 1))


cdef Use choose_use(const Costs *c, const Kind *kind, int mode) noexcept nogil:
    cdef Use use
    cdef double page, gain
    use.form = form_of(c, kind, mode, <double>kind.width)
    use.shortest = use.slab = NO_RUN
    if not kind.rows or mode == BATCH or mode == LOOP:
        return use
    if use.form == PLAIN:
        page = kind.planes * plain_cost(c, mode, <double>kind.width)
    elif use.form == STACK:
        page = strided_cost(c, kind.planes, <double>kind.width)
    else:
        page = kind.planes * strided_cost(c, 1, <double>kind.width)
    gain = page - kind.planes * (c.strided_row + kind.width * c.byte)
    use.shortest = shortest_run(kind.planes * c.strided_engine, gain)
    if kind.slabs:
        use.slab = shortest_run(kind.depth * c.strided_engine, gain)
    return use


cdef Use *use_of(const Layout *p, Py_ssize_t direction, Py_ssize_t mode,
                 Py_ssize_t kind) noexcept nogil:
    return &p.use[(direction * MODES + mode) * p.kinds + kind]


cdef int read_costs(Costs *into, object costs) except -1:
    into.byte = costs.byte
    into.latency = costs.latency
    into.loop_submit, into.loop_engine = costs.loop_submit, costs.loop_engine
    into.call_submit, into.call_engine = costs.call_submit, costs.call_engine
    into.copy_submit, into.copy_engine = costs.copy_submit, costs.copy_engine
    into.strided_submit, into.strided_engine = costs.strided_submit, costs.strided_engine
    into.strided_row = costs.strided_row
    into.kernel_submit, into.kernel_latency = costs.kernel_submit, costs.kernel_latency
    into.kernel_byte, into.kernel_block_byte = costs.kernel_byte, costs.kernel_block_byte
    into.kernel_piece = costs.kernel_piece
    return 0


cdef void hold_kernel(Costs *c, int sms, double rate) noexcept:
    # Few blocks, or a rate that is kept, make a byte dearer.
    if sms > 0:
        c.kernel_byte = larger(c.kernel_byte, c.kernel_block_byte / sms)
    if rate > 0:
        c.kernel_byte = larger(c.kernel_byte, 1 / rate)


# --- Geometry ---------------------------------------------------------------------------------


cdef uint64_t *address_array(const uint64_t[::1] addresses) except? NULL:
    cdef Py_ssize_t i, n = addresses.shape[0]
    cdef uint64_t *array
    if n == 0:
        return NULL
    array = <uint64_t *>malloc(n * sizeof(uint64_t))
    if array == NULL:
        raise MemoryError("no memory for the seams")
    for i in range(n):
        array[i] = addresses[i]
    return array


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
        cdef Py_ssize_t i
        cdef double rate
        lengths = {
            len(array) for array in (
                planes.device_base, planes.device_pitch, planes.host_base, planes.host_pitch,
                planes.width,
            )
        }
        if len(lengths) != 1:
            raise ValueError("the arrays of planes differ in length")
        self.planes, self.model = planes, model
        self.layout.device_pages, self.layout.host_pages = planes.device_pages, planes.host_pages
        read_costs(&self.layout.cost[<int>LOAD], model.load)
        read_costs(&self.layout.cost[<int>OFFLOAD], model.offload)
        self.sms, self.rates = sms, rates
        for i in range(2):
            rate = rates[i]
            hold_kernel(&self.layout.cost[i], sms, rate)
        sizes = sorted({min(int(size), LONGEST_CALL) for size in model.batch_sizes})[:MOST_SIZES]
        if not sizes or sizes[0] < 1:
            raise ValueError(f"batch_sizes is {model.batch_sizes!r}: needs positive sizes")
        self.layout.sizes = len(sizes)
        for i in range(self.layout.sizes):
            self.layout.batch_size[i] = sizes[i]
        seams = _geometry.Seams(device_seams, host_seams, planes.device_pages, planes.host_pages)
        self.layout.device_seam = address_array(seams.device)
        self.layout.host_seam = address_array(seams.host)
        self.layout.device_seams, self.layout.host_seams = len(seams.device), len(seams.host)
        self.layout.planes_in = len(planes)
        self.layout.page_bytes = planes.width.sum()
        store_groups(&self.layout, _geometry.grouped(planes, seams), seams)

    def __dealloc__(self):
        free(self.layout.device_base)
        free(self.layout.host_base)
        free(self.layout.group)
        free(self.layout.kind)
        free(self.layout.use)
        free(self.layout.device_seam)
        free(self.layout.host_seam)

    @property
    def plane_groups(self):
        """Bytes of a page and number of planes of each group that moves together."""
        cdef Py_ssize_t g
        return [
            (self.layout.group[g].width, self.layout.group[g].planes)
            for g in range(self.layout.groups)
        ]

    @property
    def plane_slices(self):
        """Number of slices of each group; its planes are shared out among them."""
        cdef Py_ssize_t g
        return [self.layout.group[g].depth for g in range(self.layout.groups)]

    def pages(self, device_pages, host_pages, Direction direction):
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
        cdef Pages pages = self.pages_now(device_pages, host_pages, direction)
        if pages is None:
            raise TypeError("page numbers must be one-dimensional contiguous int64 arrays")
        return pages

    cdef Pages pages_now(self, object device_pages, object host_pages, Direction direction):
        return pages_of(
            device_pages, host_pages, self.layout.device_pages, self.layout.host_pages, direction
        )

    def plan(self, Pages pages not None, path="auto", *, bint batch=True, bint strided=True,
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
        return self.plan_pages(pages, path, batch, strided, kernel)

    cdef Plan plan_pages(self, Pages pages, object path, bint batch, bint strided, bint kernel):
        cdef Plan plan = Plan.__new__(Plan)
        cdef bint wanted[MODES]
        plan.geometry, plan.pages = self, pages
        want(wanted, path, batch, strided, kernel)
        predict(&self.layout, pages, wanted, plan.price)
        plan.mode = cheapest(wanted, plan.price)
        plan.batch_size = plan.price[plan.mode].batch_size
        keep_runs(&self.layout, pages, plan)
        if (
            (plan.mode == BATCH or plan.mode == LOOP) and self.layout.kinds == 1
            and not self.layout.any_seamed and not plan.uses_runs
        ):
            plan.same_size = self.layout.kind[0].width
        return plan


cdef int store_groups(Layout *p, list groups, object seams) except -1:
    cdef Py_ssize_t g, k, place = 0
    cdef Group *group
    cdef Kind *kind
    kinds = {}
    p.groups = len(groups)
    p.planes = sum(len(slices) * len(slices[0]) for slices in groups)
    # One more of each, for geometries without planes.
    p.device_base = <uint64_t *>calloc(p.planes + 1, sizeof(uint64_t))
    p.host_base = <uint64_t *>calloc(p.planes + 1, sizeof(uint64_t))
    p.group = <Group *>calloc(p.groups + 1, sizeof(Group))
    p.kind = <Kind *>calloc(p.groups + 1, sizeof(Kind))
    p.use = <Use *>calloc(2 * MODES * (p.groups + 1), sizeof(Use))
    if (p.device_base == NULL or p.host_base == NULL or p.group == NULL or p.kind == NULL
            or p.use == NULL):
        raise MemoryError("no memory for the planes")
    for g, slices in enumerate(groups):
        group = &p.group[g]
        group.first = place
        for row in (row for part in slices for row in part):
            p.device_base[place], p.host_base[place] = row.device, row.host
            place += 1
        k = store_group(group, slices, seams, kinds)
        kind = &p.kind[k]
        kind.groups += 1
        p.any_seamed = p.any_seamed or group.seamed
    p.kinds = len(kinds)
    for key, k in kinds.items():
        kind = &p.kind[k]
        kind.planes, kind.depth, kind.width, kind.merges, kind.rows, kind.slabs = key
        p.any_merges = p.any_merges or kind.merges
    store_uses(p)
    return 0


cdef Py_ssize_t store_group(Group *group, list slices, object seams, dict kinds) except -1:
    """Describe a group; the number of its kind."""
    first = slices[0]
    group.depth = len(slices)
    group.planes = group.depth * len(first)
    _, _, group.device_pitch, group.host_pitch, group.width = first[0]
    if len(first) > 1:
        group.device_step = first[1].device - first[0].device
        group.host_step = first[1].host - first[0].host
    group.device_rows = group.host_rows = len(first)
    if group.depth > 1:
        group.device_rows = (slices[1][0].device - first[0].device) // group.device_step
        group.host_rows = (slices[1][0].host - first[0].host) // group.host_step
    group.seamed = seams.touch(row for part in slices for row in part)
    merges = group.width == group.device_pitch == group.host_pitch
    rows = group.device_pitch >= group.width and group.host_pitch >= group.width
    slabs = (
        rows and len(first) > 1
        and group.device_step % group.device_pitch == 0
        and group.host_step % group.host_pitch == 0
    )
    key = (group.planes, group.depth, group.width, merges, rows, slabs)
    group.kind = kinds.setdefault(key, len(kinds))
    return group.kind


cdef void store_uses(Layout *p) noexcept:
    cdef Py_ssize_t direction, mode, k
    cdef Use *use
    for direction in range(2):
        for mode in range(MODES):
            for k in range(p.kinds):
                use = use_of(p, direction, mode, k)
                use[0] = choose_use(&p.cost[direction], &p.kind[k], <int>mode)
                p.weight[direction][mode] += p.kind[k].groups * (
                    1 if use.form == STACK else p.kind[k].planes
                )


# --- Page numbers -----------------------------------------------------------------------------


cdef bint viewed(object array, Py_buffer *view) except -1:
    """Look at page numbers where they are; 0 if they are none that can be copied as they stand."""
    try:
        PyObject_GetBuffer(array, view, PyBUF_ND | PyBUF_FORMAT)
    except (TypeError, BufferError, ValueError):
        return False
    if (
        view.ndim == 1 and view.itemsize == 8 and view.format != NULL
        and (view.format[0] == c"l" or view.format[0] == c"q")
    ):
        return True
    PyBuffer_Release(view)
    return False


cdef Pages pages_of(object device_pages, object host_pages, int64_t device_limit,
                    int64_t host_limit, Direction direction):
    """Copy and check page numbers; None where they are no contiguous int64 arrays."""
    cdef Pages pages = Pages.__new__(Pages)
    cdef Py_buffer near, far
    if not viewed(device_pages, &near):
        return None
    try:
        if not viewed(host_pages, &far):
            return None
        try:
            pages.copy(&near, &far)
        finally:
            PyBuffer_Release(&far)
    finally:
        PyBuffer_Release(&near)
    pages.direction = direction
    pages.check(device_limit, host_limit)
    return pages


# Memory of page numbers that are no longer needed, kept for the next request: memory that is new
# to the process costs more than all that is done with the numbers in it. Whoever copies numbers
# takes it away meanwhile. More than so many numbers, 8 MiB, are given back.
cdef Py_ssize_t MOST_SPARE = 1 << 20
cdef int64_t *spare_numbers = NULL
cdef Py_ssize_t spare_count = 0


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

    cdef int copy(self, const Py_buffer *near, const Py_buffer *far) except -1:
        """Copy page numbers, which nobody else can write to then."""
        global spare_numbers, spare_count
        cdef Py_ssize_t n = near.shape[0]
        if n != far.shape[0]:
            raise ValueError(
                f"device_pages has {n} page numbers and host_pages has {far.shape[0]}: "
                "give as many of each"
            )
        if spare_numbers != NULL and spare_count >= 2 * n:
            self.device, self.room = spare_numbers, spare_count
            spare_numbers = NULL
        else:
            self.device, self.room = <int64_t *>malloc(2 * n * sizeof(int64_t) + 1), 2 * n
            if self.device == NULL:
                raise MemoryError(f"no memory for {2 * n} page numbers")
        self.host, self.count = self.device + n, n
        memcpy(self.device, near.buf, n * sizeof(int64_t))
        memcpy(self.host, far.buf, n * sizeof(int64_t))
        return 0

    cdef int check(self, int64_t device_limit, int64_t host_limit) except -1:
        cdef Py_ssize_t n = self.count, first
        cdef const int64_t *to = self.device
        cdef int64_t limit = device_limit
        if self.direction == OFFLOAD:
            to, limit = self.host, host_limit
        if n < KEEP_GIL:
            first = first_beyond(self.device, self.host, n, device_limit, host_limit)
            if first < 0:
                self.find_runs()
        else:
            with nogil:
                first = first_beyond(self.device, self.host, n, device_limit, host_limit)
                if first < 0:
                    self.find_runs()  # differences of numbers out of range may overflow
        if first >= 0:
            raise self.beyond(first, device_limit, host_limit)
        first = first_repeated(to, n) if n <= FEW else first_marked(to, n, limit)
        if first >= 0:
            raise self.repeated(to, first)
        return 0

    def __dealloc__(self):
        global spare_numbers, spare_count
        free(self.runs.count[0])
        if self.room <= MOST_SPARE and (spare_numbers == NULL or spare_count < self.room):
            free(spare_numbers)
            spare_numbers, spare_count = self.device, self.room
        else:
            free(self.device)

    cdef object beyond(self, Py_ssize_t first, int64_t device_limit, int64_t host_limit):
        cdef int64_t page = self.device[first]
        if page < 0 or page >= device_limit:
            return page_out_of_range("device_pages", first, page, device_limit)
        return page_out_of_range("host_pages", first, self.host[first], host_limit)

    cdef object repeated(self, const int64_t *to, Py_ssize_t last):
        cdef Py_ssize_t i = 0
        while to[i] != to[last]:
            i += 1
        name = "device_pages" if self.direction == LOAD else "host_pages"
        return ValueError(
            f"{name}[{last}] is page {to[last]} again, after {name}[{i}]: "
            "a destination page may be given once"
        )

    cdef int find_runs(self) except -1 nogil:
        cdef Scan s
        cdef int64_t a = 0, b = 0
        cdef Py_ssize_t r, unit, q
        s.device, s.host, s.count = self.device, self.host, self.count
        s.position = s.known = 0
        s.unit, s.step = 2, 3
        while s.position < s.count:
            r = lone_pages(&s)
            s.position += r
            self.runs.single += r
            r = next_run(&s, &a, &b)
            s.position += r
            if r == 1:
                self.runs.single += 1
                continue
            if self.runs.count[0] == NULL:
                self.make_buckets()
            unit = 1 if a == b and (a == 1 or a == -1) else 0
            q = bucket_of(r)
            self.runs.used[unit] |= <uint64_t>1 << q
            self.runs.count[unit][q] += 1
            self.runs.pages[unit][q] += r
        self.lone = not (self.runs.used[0] | self.runs.used[1])
        return 0

    cdef int make_buckets(self) except -1 nogil:
        # Most requests have no run, and need none.
        cdef Py_ssize_t unit
        cdef double *block = <double *>calloc(4 * BUCKETS, sizeof(double))
        if block == NULL:
            with gil:
                raise MemoryError("no memory for the runs of a transfer")
        for unit in range(2):
            self.runs.count[unit] = block + unit * BUCKETS
            self.runs.pages[unit] = block + (2 + unit) * BUCKETS
        return 0


cdef Py_ssize_t first_beyond(const int64_t *d, const int64_t *h, Py_ssize_t n,
                             int64_t device_limit, int64_t host_limit) noexcept nogil:
    # A negative number is a huge unsigned one: one comparison per side.
    cdef Py_ssize_t i
    for i in range(n):
        if <uint64_t>d[i] >= <uint64_t>device_limit or <uint64_t>h[i] >= <uint64_t>host_limit:
            return i
    return -1


cdef Py_ssize_t first_repeated(const int64_t *pages, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i, j
    for i in range(1, n):
        for j in range(i):
            if pages[i] == pages[j]:
                return i
    return -1


# A bit for each page, all 0 between uses, kept for the next request that marks pages. Whoever marks
# takes it away meanwhile, so that no two threads share it.
cdef uint64_t *spare_marks = NULL
cdef int64_t spare_room = 0


cdef Py_ssize_t first_marked(const int64_t *pages, Py_ssize_t n, int64_t limit) except? -2:
    global spare_marks, spare_room
    cdef uint64_t *marks = spare_marks
    cdef int64_t room = spare_room
    cdef Py_ssize_t found
    spare_marks = NULL
    if marks == NULL or room < limit:
        free(marks)
        room = limit
        marks = <uint64_t *>calloc((limit + 63) // 64, sizeof(uint64_t))
        if marks == NULL:
            raise MemoryError(f"no memory to mark {limit} pages")
    if n < KEEP_GIL:
        found = mark_pages(pages, n, marks, limit)
    else:
        with nogil:
            found = mark_pages(pages, n, marks, limit)
    if spare_marks == NULL:
        spare_marks, spare_room = marks, room
    else:
        free(marks)
    return found


cdef Py_ssize_t mark_pages(const int64_t *pages, Py_ssize_t n, uint64_t *marks,
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


cdef inline int bucket_of(Py_ssize_t pages) noexcept nogil:
    cdef int bucket
    if pages < EXACT:
        return <int>pages
    bucket = <int>EXACT
    pages //= EXACT
    while pages > 1 and bucket < BUCKETS - 1:
        pages >>= 1
        bucket += 1
    return bucket


cdef Py_ssize_t next_run(Scan *s, int64_t *device_step, int64_t *host_step) noexcept nogil:
    # Pages from the position on that belong together; it is not moved. A run has a constant step
    # on each side, both up or both down.
    cdef Py_ssize_t i = s.position, j, last, need
    cdef int64_t a, b
    if i + 1 >= s.count or i < s.known:
        return 1
    a = s.device[i + 1] - s.device[i]
    b = s.host[i + 1] - s.host[i]
    # Among random pages each of these tests almost always fails, so the branches are cheap.
    if a == b and (a == 1 or a == -1):
        need = s.unit
    elif (
        i + 2 < s.count
        and s.device[i + 2] - s.device[i + 1] == a
        and s.host[i + 2] - s.host[i + 1] == b
        and ((a > 0 and b > 0) or (a < 0 and b < 0))
    ):
        need = s.step
    else:
        return 1
    last = s.count if s.count - i < LONGEST_RUN else i + LONGEST_RUN
    j = i + 2
    while j < last and s.device[j] - s.device[j - 1] == a and s.host[j] - s.host[j - 1] == b:
        j += 1
    if j - i < need:
        # Every later start inside gives the same run, shorter still.
        s.known = j - 1
        return 1
    device_step[0] = a
    host_step[0] = b
    return j - i


cdef inline Py_ssize_t lone_pages(const Scan *s) noexcept nogil:
    # Pages from the position on that are in no run: what `next_run` says of most pages, many times
    # faster.
    cdef const int64_t *d = s.device
    cdef const int64_t *h = s.host
    cdef Py_ssize_t i = s.position, last = s.count - 2
    cdef int64_t a, b, c, e
    if i >= last:
        return 0
    a = d[i + 1] - d[i]
    b = h[i + 1] - h[i]
    while i < last:
        c = d[i + 2] - d[i + 1]
        e = h[i + 2] - h[i + 1]
        if (a == b) | (((a ^ c) | (b ^ e)) == 0):
            break
        a, b = c, e
        i += 1
    return i - s.position


# --- Prices and the choice --------------------------------------------------------------------


cdef struct Tally:
    # What a mode takes, without the calls of its batches.
    double host, engine, copies, strided


cdef int want(bint *wanted, object path, bint batch, bint strided, bint kernel) except -1:
    """Which modes a path may choose from."""
    cdef Py_ssize_t m
    for m in range(MODES):
        wanted[m] = False
    if path == "auto":
        wanted[BATCH], wanted[LOOP] = batch, True
        wanted[STRIDED_BATCH], wanted[STRIDED_LOOP] = batch and strided, strided
        wanted[KERNEL] = kernel
    elif path in PATHS:
        wanted[METHODS.index(path)] = True
    else:
        raise ValueError(f"path is {path!r}: it is one of {', '.join(PATHS)}")
    return 0


cdef void count_page(Tally *t, const Costs *c, const Kind *kind, int mode, Form form,
                     double times, double size) noexcept nogil:
    cdef double many = times * kind.groups * kind.planes
    if form == PLAIN:
        t.copies += many
        t.host += many * plain_host(c, mode)
        t.engine += many * plain_engine(c, mode, size)
    elif form == STACK:
        t.strided += times * kind.groups
        t.host += times * kind.groups * c.strided_submit
        t.engine += times * kind.groups * c.strided_engine
        t.engine += many * (c.strided_row + size * c.byte)
    else:
        # A row by itself is no cheaper than a copy by itself.
        t.strided += many
        t.host += many * larger(c.strided_submit, c.loop_submit)
        t.engine += many * larger(c.strided_engine + c.strided_row + size * c.byte,
                                  c.loop_engine + size * c.byte)


cdef void count_rows(Tally *t, const Costs *c, const Kind *kind, double runs, double pages,
                     bint slabs) noexcept nogil:
    cdef double many = runs * kind.groups * (kind.depth if slabs else kind.planes)
    t.strided += many
    t.host += many * c.strided_submit
    t.engine += many * c.strided_engine
    t.engine += pages * kind.groups * kind.planes * (c.strided_row + kind.width * c.byte)


cdef void count_runs(Tally *t, const Costs *c, const Kind *kind, int mode, const Use *use,
                     const Runs *runs, int unit) noexcept nogil:
    cdef uint64_t bits = runs.used[unit]
    cdef double many, pages, length
    cdef int q
    while bits:
        q = lowest_bit(bits)
        bits &= bits - 1
        many, pages = runs.count[unit][q], runs.pages[unit][q]
        length = pages / many
        if unit and kind.merges:
            count_page(
                t, c, kind, mode, form_of(c, kind, mode, length * kind.width), many,
                length * kind.width,
            )
        elif unit and length >= use.slab:
            count_rows(t, c, kind, many, pages, True)
        elif length >= use.shortest:
            count_rows(t, c, kind, many, pages, False)
        else:
            count_page(t, c, kind, mode, use.form, pages, <double>kind.width)


cdef void predict(const Layout *p, Pages pages, const bint *wanted, Price *price) noexcept nogil:
    """Price the modes that are wanted."""
    cdef const Costs *c = &p.cost[pages.direction]
    cdef const Kind *kind
    cdef const Use *use
    cdef Tally t
    cdef Py_ssize_t k
    cdef int m
    for m in range(MODES):
        price[m].time = NEVER
        if not wanted[m]:
            continue
        if m == KERNEL:
            price_kernel(p, c, pages.count, &price[m])
            continue
        t.host = t.engine = t.copies = t.strided = 0
        for k in range(p.kinds):
            kind = &p.kind[k]
            use = use_of(p, pages.direction, m, k)
            count_page(&t, c, kind, m, use.form, pages.runs.single, <double>kind.width)
            count_runs(&t, c, kind, m, use, &pages.runs, 0)
            count_runs(&t, c, kind, m, use, &pages.runs, 1)
        price_mode(p, c, m, &t, &price[m])


cdef void price_mode(const Layout *p, const Costs *c, int mode, Tally *t,
                     Price *price) noexcept nogil:
    # Longest calls first: shorter ones cost the host more.
    cdef Py_ssize_t i, calls, size
    cdef double host, engine, time
    price.copies, price.strided = t.copies, t.strided
    if batched(mode) and t.copies == 1:
        # A batch of one copy takes longer than the copy by itself.
        t.host += c.loop_submit
        t.engine += c.loop_engine
    for i in range(p.sizes - 1, -1, -1):
        size = p.batch_size[i]
        calls = <Py_ssize_t>t.copies
        host, engine = t.host, t.engine
        if batched(mode):
            calls = (calls + size - 1) // size
            host += calls * c.call_submit
            engine += calls * c.call_engine
        time = c.latency + time_of(host, engine, calls + t.strided)
        if time < price.time * SMALLER_CALLS:
            price.time, price.host, price.work = time, host, larger(host, engine)
            price.calls, price.batch_size = calls + <Py_ssize_t>t.strided, size
        if not batched(mode) or t.copies <= p.batch_size[0]:
            break


cdef void price_kernel(const Layout *p, const Costs *c, Py_ssize_t pages,
                       Price *price) noexcept nogil:
    price_launch(c, <double>pages * p.page_bytes, <double>pages * p.planes_in, price)


cdef void price_launch(const Costs *c, double size, double rows, Price *price) noexcept nogil:
    # One launch, of bytes or of rows, whichever takes longer.
    price.host, price.calls, price.copies, price.strided = c.kernel_submit, 1, 0, 0
    price.batch_size = 1
    price.work = larger(size * c.kernel_byte, rows * c.kernel_piece)
    price.time = c.kernel_submit + c.kernel_latency + price.work


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
    read_costs(&c, costs)
    hold_kernel(&c, sms, costs.kernel_rate)
    engine.host = copies * c.copy_submit + calls * c.call_submit + strided * c.strided_submit
    engine.work = (
        copies * c.copy_engine + calls * c.call_engine + strided * c.strided_engine
        + rows * c.strided_row + size * c.byte
    )
    engine.time = c.latency + time_of(engine.host, engine.work, calls + strided)
    engine.work = larger(engine.host, engine.work)
    price_launch(&c, size, pieces, &kernel)
    return kernel_is_worth_it(&kernel, &engine)


cdef inline double time_of(double host, double engine, double calls) noexcept nogil:
    # Host and copy engine work side by side; what neither hides is the first call, or the last one
    # where the host is the slower.
    cdef double hidden = host if host < engine else engine
    return larger(host, engine) + (hidden / calls if calls > 0 else 0)


cdef int cheapest(const bint *wanted, const Price *price) noexcept nogil:
    cdef int m, best = -1
    for m in range(KERNEL):
        if wanted[m] and (best < 0 or price[m].time < price[best].time):
            best = m
    if wanted[KERNEL] and (best < 0 or kernel_is_worth_it(&price[KERNEL], &price[best])):
        return KERNEL
    return best


cdef bint kernel_is_worth_it(const Price *kernel, const Price *engine) noexcept nogil:
    # By itself, and in a row of transfers, where what the first call keeps waiting is hidden.
    return (
        kernel.time * WORTH_KERNEL < engine.time and kernel.work * WORTH_KERNEL < engine.work
    )


cdef void keep_runs(const Layout *p, Pages pages, Plan plan) noexcept:
    # Keep together only the runs that some group makes use of.
    cdef Py_ssize_t k
    cdef Use *use
    cdef int64_t shortest = LONGEST_RUN + 1
    plan.unit = plan.step = LONGEST_RUN + 1
    if pages.lone or plan.mode == KERNEL:
        return
    for k in range(p.kinds):
        use = use_of(p, pages.direction, plan.mode, k)
        shortest = min(shortest, use.shortest, use.slab)
    plan.unit = 2 if p.any_merges else shortest
    # Steps of one pair occur by chance among random pages.
    plan.step = max(shortest, 3)


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
    def uses_runs(self):
        """Whether some pages are kept together."""
        return self.unit <= LONGEST_RUN or self.step <= LONGEST_RUN

    @property
    def method(self):
        """What moves the pages: ``"batch"``, ``"strided+loop"``, and so on."""
        return self.name_of(self.mode)

    cdef str name_of(self, int mode):
        # A mixture in which one part is empty goes by the plain name.
        cdef const Price *price = &self.price[mode]
        if mode == STRIDED_BATCH or mode == STRIDED_LOOP:
            if price.copies == 0:
                return METHODS[STRIDED]
            if price.strided == 0:
                return METHODS[mode - STRIDED_BATCH]
        return METHODS[mode]

    @property
    def copies_in(self):
        """Copies of one page of one plane each that the request asks for."""
        return self.pages.count * self.geometry.layout.planes_in

    @property
    def bytes(self):
        """Bytes to be moved."""
        return self.pages.count * self.geometry.layout.page_bytes

    @property
    def predicted_us(self):
        """Predicted time until the last byte has arrived, in microseconds."""
        return self.price[self.mode].time

    @property
    def submit_us(self):
        """Predicted host time inside the CUDA calls, in microseconds."""
        return self.price[self.mode].host

    @property
    def predicted_calls(self):
        """Predicted number of CUDA calls; cuts at seams come on top."""
        return self.price[self.mode].calls

    @property
    def candidates(self):
        """Predicted microseconds of each method that was considered."""
        cdef int m
        found = {}
        for m in range(MODES):
            if self.price[m].time < NEVER:
                found.setdefault(self.name_of(m), self.price[m].time)
        return found
