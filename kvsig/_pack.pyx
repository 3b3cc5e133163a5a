# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False, freethreading_compatible=True
"""Pages in, packed copies out: the part of the planner that runs once per transfer.

`Prepared` holds what does not depend on the page numbers: the planes in groups that one
strided copy can take, and what each way of moving a page costs. `Prepared.transfer` finds
the runs among the page numbers, chooses the cheapest method, and hands the copies out in
pieces, packed into buffers that are reused. There is no CUDA and no torch here, and no
Python object per page.
"""

from cpython.buffer cimport PyBUF_FORMAT, PyBUF_ND, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memmove, memset

from bisect import bisect_right

import numpy as np

from kvsig._clock cimport clock_ns

from kvsig._threads import (
    ALONE, BEGINS_US, FEW_COPIES, FEWEST, SHARE, SLOWEST, WORTH, AlwaysTeam, look, together_us
)

# cudaDevAttrMaxPitch of every device so far: a strided copy takes no longer pitch.
cdef uint64_t LONGEST_PITCH = 0x7FFFFFFF
# Forced strided copies of one row need a pitch as well, so wider rows are cut.
cdef uint64_t LONGEST_LINE = 0x40000000
# A smaller number of copies per batch call must promise this much to be taken.
cdef double SMALLER_CALLS = 0.97
# Calls that grow are but three more.
cdef double GROWING_CALLS = 0.99
# What a transfer takes the host beyond its CUDA calls, in microseconds. Where transfers follow each
# other it is part of what each adds to the host's time, so methods of few calls gain from it.
cdef double TRANSFER_SUBMIT = 2
# A transfer follows another one if it comes before that should have ended, or so many nanoseconds
# later: layers are loaded in a loop, in which callers do a little more than call. Who waits for a
# stream takes longer to come back.
cdef int64_t FOLLOWS = 20_000
# A stream is never taken to have more work than that, in nanoseconds: a model that is wrong about a
# device would otherwise be wrong by more and more.
cdef int64_t MOST_QUEUED = 100_000_000
# Beside a CPU that needs twice as long for Python, the copies of a batch take twice as long, single
# and strided ones 1.65 times, and what the CPU stages 1.75 times in short transfers, 2.3 in long
# ones, as measured; a batch call by itself takes hardly longer.
cdef double SINGLE_SLOWS = 0.65
cdef double STAGED_SLOWS = 1.25
# From this many copies on, several threads may submit, where one needs so many times as long.
cdef Py_ssize_t TOGETHER_FROM = FEWEST
cdef Py_ssize_t TOGETHER_FEW = FEW_COPIES
cdef double TOGETHER_WORTH = WORTH
cdef double TOGETHER_BEGINS = BEGINS_US
cdef Py_ssize_t TOGETHER_SHARE = SHARE
# A batch call has no more copies, whatever the cost model says.
cdef Py_ssize_t LONGEST_CALL = 1 << 31
# Runs are cut here, so that one run never fills a buffer without bound.
cdef Py_ssize_t LONGEST_RUN = 1 << 16
# Below this many copies the loops take less time than giving the GIL away and back.
cdef Py_ssize_t KEEP_GIL = 512
# Runs kept in one block, and operations aimed at in the first piece and in the others.
# The first is short, so that the copy engine starts early.
cdef Py_ssize_t BLOCK_RUNS = 8192
cdef Py_ssize_t FIRST_PIECE = 1024
DEFAULT_PIECE = 8192
# A workspace that grew beyond this many copies is not kept.
cdef Py_ssize_t KEEP_COPIES = 1 << 18
cdef Py_ssize_t KEEP_WORKSPACES = 32
# Destinations up to this many are compared pairwise, which touches no scratch memory.
cdef Py_ssize_t FEW = 24

cdef enum Form:
    PLAIN = 0       # a plain copy per plane
    STACK = 1       # a strided copy whose rows are the planes of a group, slice by slice
    LINES = 2       # a strided copy of one row per plane (only where strided is forced)

cdef enum:
    BATCH = 0
    LOOP = 1
    STRIDED = 2
    STRIDED_BATCH = 3
    STRIDED_LOOP = 4
    MODES = 5

cdef enum:
    BUCKETS = 64
    EXACT = 36      # run lengths below it have a bucket of their own, longer ones one per octave

cdef enum Verdict:
    FINE = 0
    DEVICE_RANGE = 1
    HOST_RANGE = 2
    REPEATED = 3
    LENGTHS = 4
    NOT_PAGES = 5

CHECK_OK = FINE
CHECK_DEVICE_RANGE = DEVICE_RANGE
CHECK_HOST_RANGE = HOST_RANGE
CHECK_REPEATED = REPEATED
CHECK_LENGTHS = LENGTHS
CHECK_NOT_PAGES = NOT_PAGES

# Nanoseconds from one look at the CPU's speed to the next one, at least; and how long a look is
# believed where no choice between methods hangs on it, but predicted times. A look takes 3 us, or
# 20 with caches that copies have gone through.
cdef int64_t LOOK_AGAIN = 5_000_000
cdef int64_t LOOK_BELIEVED = 50_000_000
cdef int64_t looked = 0
cdef double slow_now = 1
cdef double SLOWEST_CPU = SLOWEST

# How many times as long as the model says the last transfers took to submit, by one thread and by
# several: to the device and to the host, of few copies, and the same of many. It says more than a
# look at the CPU: memory may be slow as well, and several threads slow down the cores that they
# share with the one that looks.
cdef enum:
    LATEST = 3
    SURE = 4

cdef struct Pace:
    double found[LATEST]    # the last one first
    int known               # how many there were one behind the other, up to SURE
    int64_t at              # when that was
    int since               # transfers the other way since the last one
    int again               # and how many there are to be before this way is tried again

cdef Pace[4][2] paces

# Behind those of several threads the first transfer of one thread took 420 to 500 us instead of
# 240, the second one as long or 240, and the third one 240 to 280; and several threads have to
# wake up. So one is tried three times and several are twice, and not often: not before the other
# has made so many transfers, at first and if it was in vain again and again, and so many
# nanoseconds have passed.
cdef int AGAIN = 16
cdef int[2] AGAIN_MOST = [64, 256]
cdef int64_t AGAIN_NS = 30_000_000
# Where neither has made a transfer for so long, one thread's CPU may be another one: a look at it
# says more. What several threads took hangs on locks of the driver more than on CPUs.
cdef int64_t[2] BELIEVED = [500_000_000, 1_000_000_000]
# What took longer counts as this: it was kept waiting by others.
cdef double PACE_MOST = 4
# Several threads took 0.8 to 1.3 times as long as the model says, as machines differ. They are
# tried where they would win if they took this.
cdef double HOPED = 0.9


cdef inline int64_t believed(const Pace *own, const Pace *other, bint team) noexcept nogil:
    # Until when what was found is believed: it goes on to be while the other way is taken.
    return other.at + BELIEVED[False] if own.since else own.at + BELIEVED[team]


cdef inline bint tried_now(const Pace *lane, bint team, int64_t now) noexcept nogil:
    # Whether to try one thread where several submit, or several where it is one: for the first
    # time, or once more. The third time is for one behind several.
    cdef const Pace *own = &lane[team]
    if own.since == 0:
        return now - own.at < BELIEVED[team] and (
            own.known == 1 or (own.known == 2 and not team and lane[True].known > 0)
        )
    return (
        own.since >= larger(own.again, AGAIN) and now - own.at >= AGAIN_NS
        and now - lane[not team].at < BELIEVED[False]
    )


cdef inline double pace_of(const Pace *lane, bint team, int64_t now) noexcept nogil:
    # The best of the last ones, since some may have been interrupted; 0 where it is not known.
    cdef const Pace *own = &lane[team]
    cdef double best = own.found[0]
    cdef int i
    if own.known == 0 or now >= believed(own, &lane[not team], team):
        return 0
    for i in range(1, own.known if own.known < LATEST else LATEST):
        best = own.found[i] if own.found[i] < best else best
    # One alone says nothing bad.
    return 0 if own.known == 1 and best > 1 else best


cdef inline void add_pace(Pace *pace, double found, int64_t now) noexcept nogil:
    cdef int i
    for i in range(LATEST - 1, 0, -1):
        pace.found[i] = pace.found[i - 1]
    # The rest may have taken less than predicted as well: 0 says that it is not known.
    pace.found[0] = PACE_MOST if found > PACE_MOST else larger(found, 0.01)
    pace.known += pace.known < SURE
    pace.at = now


cdef inline void try_later(Pace *pace, bint team) noexcept nogil:
    pace.again = AGAIN if pace.again == 0 else 2 * pace.again
    pace.again = pace.again if pace.again < AGAIN_MOST[team] else AGAIN_MOST[team]


cdef inline void keep_pace(Pace *lane, bint team, double found, int64_t begin,
                           int64_t now) noexcept nogil:
    # Of a transfer that began and has just ended. What was believed when it began goes on.
    cdef Pace *own = &lane[team]
    cdef Pace *other = &lane[not team]
    if begin >= believed(other, own, not team):
        # Too old by now, however soon the next transfer goes this way.
        other.known = 0
    elif other.since == 0 and (
        1 < other.known < SURE if team else 0 < other.known < LATEST
    ):
        # Tried in vain: several threads maybe but once, where that said enough.
        try_later(other, not team)
    other.since += other.since < AGAIN_MOST[not team]
    if own.since or begin >= believed(own, other, team):
        own.known = 0
    own.since = 0
    add_pace(own, found, now)
    if own.known == SURE:
        own.again = AGAIN


def forget():
    """Forget how long transfers took, and how fast the CPU was: for tests and benchmarks."""
    global looked, slow_now
    memset(paces, 0, sizeof(paces))
    looked, slow_now = 0, 1


METHODS = ("batch", "loop", "strided", "strided+batch", "strided+loop")

cdef double NEVER = 1e30

# Until when a stream should have work, in nanoseconds, for the streams that were used last. It is
# worked out from the model: a question to CUDA while another thread captures a graph can spoil the
# capture. Two streams that share a place make a choice a little worse, no more.
cdef enum:
    STREAMS = 61    # a prime: handles are multiples of powers of two

cdef struct Queue:
    uint64_t stream
    int64_t until

cdef Queue[STREAMS] queues


cdef inline Queue *queue_of(uint64_t stream) noexcept nogil:
    return &queues[stream % STREAMS]


cdef struct Costs:
    double byte
    double latency
    double loop_submit, loop_engine
    double call_submit, call_engine
    double copy_submit, copy_engine
    double staged_small, staged_large, inline_bytes
    double strided_submit, strided_engine, strided_row
    # Of a copy in a batch where several threads submit, in transfers of few and of many copies; 0
    # where none do.
    double together_few, together_many


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


cdef struct Choice:
    Form form               # of a page that is in no run
    int64_t shortest        # pages from which a run of a plane is a strided copy
    int64_t slab            # pages from which a run of a slice is one


cdef struct Layout:
    # What a transfer reads of a `Prepared`, in one place, so that no object is touched
    # without the GIL. Sides: 0 is load, 1 is offload.
    Py_ssize_t planes_in, planes, groups, kinds, sizes
    uint64_t *device_base
    uint64_t *host_base
    uint64_t *device_seam
    uint64_t *host_seam
    Py_ssize_t device_seams, host_seams
    Group *group
    Kind *kind
    Choice *choice                  # [side][mode][kind], see choice_of
    Costs cost[2]
    Py_ssize_t weight[2][5]         # operations that a page in no run takes
    Py_ssize_t batch_size[8]
    int64_t device_pages, host_pages
    uint64_t page_bytes
    bint any_merges, any_seamed


cdef inline Choice *choice_of(const Layout *p, Py_ssize_t side, Py_ssize_t mode,
                              Py_ssize_t kind) noexcept nogil:
    return &p.choice[(side * MODES + mode) * p.kinds + kind]


cdef struct Tally:
    double submit, engine, copies, strided
    double plain            # what plain copies take to submit
    # The same by the model alone, of one thread beside a CPU at full speed, and of several.
    double alone, together
    double staged           # what those take that the CPU stages
    bint shared             # whether several threads may be worth it, beside the slowest CPU


def slowness():
    """How many times as long as at its best the CPU needs, looked at now and then."""
    return slowness_at(clock_ns())


cdef double slowness_at(int64_t now) except -1:
    global looked, slow_now
    if now - looked > LOOK_AGAIN:
        # Noted first: other threads may come by while this one looks.
        looked = now
        slow_now = look()
    return slow_now


cdef inline double larger(double a, double b) noexcept nogil:
    return a if a > b else b


cdef inline double plain_submit(const Costs *c, int mode, double size) noexcept nogil:
    if mode == LOOP or mode == STRIDED_LOOP:
        return c.loop_submit
    if size <= c.inline_bytes:
        return c.staged_small + (c.staged_large - c.staged_small) * size / c.inline_bytes
    return c.copy_submit


cdef inline double plain_engine(const Costs *c, int mode, double size) noexcept nogil:
    if mode == LOOP or mode == STRIDED_LOOP:
        return c.loop_engine + size * c.byte
    return c.copy_engine + size * c.byte


cdef inline double plain_cost(const Costs *c, int mode, double size) noexcept nogil:
    cdef double share = 0
    cdef double submit = plain_submit(c, mode, size)
    if mode == BATCH or mode == STRIDED_BATCH:
        share = 1.0 / 256
        if 0 < c.together_many < submit:
            submit = c.together_many
    return larger(
        submit + share * c.call_submit,
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
        return 0x7FFFFFFFFFFFFFFF
    return <int64_t>larger(2, <double>(<int64_t>(calls / gain) + 1))


cdef Choice choose(const Costs *c, const Kind *kind, int mode) noexcept nogil:
    cdef Choice choice
    cdef double page, gain
    choice.form = form_of(c, kind, mode, <double>kind.width)
    choice.shortest = choice.slab = 0x7FFFFFFFFFFFFFFF
    if not kind.rows or mode == BATCH or mode == LOOP:
        return choice
    if choice.form == PLAIN:
        page = kind.planes * plain_cost(c, mode, <double>kind.width)
    elif choice.form == STACK:
        page = strided_cost(c, kind.planes, <double>kind.width)
    else:
        page = kind.planes * strided_cost(c, 1, <double>kind.width)
    gain = page - kind.planes * (c.strided_row + kind.width * c.byte)
    choice.shortest = shortest_run(kind.planes * c.strided_engine, gain)
    if kind.slabs:
        choice.slab = shortest_run(kind.depth * c.strided_engine, gain)
    return choice


cdef void count_page(Tally *t, const Costs *c, const Kind *kind, int mode, Form form,
                     double times, double size) noexcept nogil:
    cdef double many = times * kind.groups * kind.planes
    if form == PLAIN:
        t.copies += many
        if (mode == BATCH or mode == STRIDED_BATCH) and size <= c.inline_bytes:
            t.staged += many * plain_submit(c, mode, size)
        else:
            t.plain += many * plain_submit(c, mode, size)
        t.engine += many * plain_engine(c, mode, size)
    elif form == STACK:
        t.strided += times * kind.groups
        t.submit += times * kind.groups * c.strided_submit
        t.engine += times * kind.groups * c.strided_engine
        t.engine += many * (c.strided_row + size * c.byte)
    else:
        # A row by itself is no cheaper than a copy by itself.
        t.strided += many
        t.submit += many * larger(c.strided_submit, c.loop_submit)
        t.engine += many * larger(c.strided_engine + c.strided_row + size * c.byte,
                                  c.loop_engine + size * c.byte)


cdef void count_rows(Tally *t, const Costs *c, const Kind *kind, double runs, double pages,
                     bint slabs) noexcept nogil:
    cdef double many = runs * kind.groups * (kind.depth if slabs else kind.planes)
    t.strided += many
    t.submit += many * c.strided_submit
    t.engine += many * c.strided_engine
    t.engine += pages * kind.groups * kind.planes * (c.strided_row + kind.width * c.byte)


cdef struct Scan:
    const int64_t *device
    const int64_t *host
    Py_ssize_t count
    Py_ssize_t at           # the next page
    Py_ssize_t known        # no run starts before this one
    Py_ssize_t unit         # shortest run of neighbours that is kept together
    Py_ssize_t step         # shortest run of any other constant step, at least 3


cdef inline Py_ssize_t next_run(Scan *s, int64_t *device_step, int64_t *host_step) noexcept nogil:
    # Pages from s.at on that belong together; s.at is not moved. A run has a constant step
    # on each side, both up or both down.
    cdef Py_ssize_t i = s.at, j, last, need
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
    # Pages from s.at on that are in no run: what `next_run` says of most pages, many times faster.
    cdef const int64_t *d = s.device
    cdef const int64_t *h = s.host
    cdef Py_ssize_t i = s.at, last = s.count - 2
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
    return i - s.at


cdef struct Runs:
    # What a scan has found: pages in no run, and runs by kind and length. The kinds are 1 for
    # neighbours on both sides, and 0 for any other constant step.
    double single
    uint64_t used[2]        # a bit for each bucket that has something in it
    double *count[2]        # runs in each bucket, and
    double *pages[2]        # their pages: one block of memory, made where there is a run


cdef extern from *:
    int lowest_bit "__builtin_ctzll"(uint64_t bits) noexcept nogil


cdef inline int bucket_of(Py_ssize_t pages) noexcept nogil:
    cdef int bucket
    if pages < EXACT:
        return <int>pages
    bucket = EXACT
    pages //= EXACT
    while pages > 1 and bucket < BUCKETS - 1:
        pages >>= 1
        bucket += 1
    return bucket


cdef class Workspace:
    # Buffers of one transfer at a time. They are NumPy arrays, so that a piece that a caller
    # keeps stays valid memory when a buffer grows.
    cdef object dsts, srcs, sizes, ops, cubes, marks
    cdef uint64_t *dst
    cdef uint64_t *src
    cdef uint64_t *size
    cdef uint64_t *op
    cdef uint64_t *cube
    cdef uint64_t *mark             # a bit for each page; all are 0 between uses
    cdef Py_ssize_t copies, copy_room, strided, strided_room, cubic, cubic_room, mark_room
    cdef uint64_t alike             # what the first entries of sizes are, and how many
    cdef Py_ssize_t alike_count
    # runs of the block at hand: lowest page on each side, pages, and distance of pages
    cdef int64_t *run_device
    cdef int64_t *run_host
    cdef int64_t *run_pages
    cdef int64_t *run_device_step
    cdef int64_t *run_host_step

    def __cinit__(self):
        cdef Py_ssize_t each = BLOCK_RUNS * sizeof(int64_t)
        self.run_device = <int64_t *>malloc(5 * each)
        if self.run_device == NULL:
            raise MemoryError("no memory for the runs of a transfer")
        self.run_host = self.run_device + BLOCK_RUNS
        self.run_pages = self.run_host + BLOCK_RUNS
        self.run_device_step = self.run_pages + BLOCK_RUNS
        self.run_host_step = self.run_device_step + BLOCK_RUNS
        self.copies = self.copy_room = self.strided = self.strided_room = 0
        self.cubic = self.cubic_room = self.mark_room = 0
        self.alike = self.alike_count = 0
        self.grow_copies(256)
        self.grow_strided(64)

    def __dealloc__(self):
        free(self.run_device)

    cdef int grow_copies(self, Py_ssize_t more) except -1 with gil:
        cdef uint64_t[::1] view
        cdef Py_ssize_t room = self.copies + more
        if room < 2 * self.copy_room:
            room = 2 * self.copy_room
        dsts, srcs, sizes = (np.empty(room, np.uint64) for _ in range(3))
        if self.copies:
            dsts[: self.copies] = self.dsts[: self.copies]
            srcs[: self.copies] = self.srcs[: self.copies]
            sizes[: self.copies] = self.sizes[: self.copies]
        view = dsts
        self.dst = &view[0]
        view = srcs
        self.src = &view[0]
        view = sizes
        self.size = &view[0]
        self.dsts, self.srcs, self.sizes = dsts, srcs, sizes
        self.copy_room = room
        self.alike_count = 0
        return 0

    cdef int grow_strided(self, Py_ssize_t more) except -1 with gil:
        cdef uint64_t[:, ::1] view
        cdef Py_ssize_t room = self.strided + more
        if room < 2 * self.strided_room:
            room = 2 * self.strided_room
        ops = np.empty((room, 6), np.uint64)
        if self.strided:
            ops[: self.strided] = self.ops[: self.strided]
        view = ops
        self.op = &view[0, 0]
        self.ops = ops
        self.strided_room = room
        return 0

    cdef int grow_cubes(self, Py_ssize_t more) except -1 with gil:
        cdef uint64_t[:, ::1] view
        cdef Py_ssize_t room = self.cubic + more
        if room < 2 * self.cubic_room:
            room = 2 * self.cubic_room
        cubes = np.empty((room, 9), np.uint64)
        if self.cubic:
            cubes[: self.cubic] = self.cubes[: self.cubic]
        view = cubes
        self.cube = &view[0, 0]
        self.cubes = cubes
        self.cubic_room = room
        return 0

    cdef int grow_marks(self, Py_ssize_t pages) except -1:
        cdef uint64_t[::1] view
        if pages > self.mark_room:
            self.marks = np.zeros((pages + 63) // 64, np.uint64)
            view = self.marks
            self.mark = &view[0]
            self.mark_room = pages
        return 0


cdef list IDLE = []


cdef Workspace take_workspace():
    # Taken out of the list while in use, so that threads and nested transfers never share one.
    try:
        return <Workspace>IDLE.pop()
    except IndexError:
        return Workspace()


cdef int keep_workspace(Workspace workspace) except -1:
    if workspace.copy_room <= KEEP_COPIES and len(IDLE) < KEEP_WORKSPACES:
        IDLE.append(workspace)
    return 0


cdef int get_pages(object pages, Py_buffer *view) except -1:
    # 0: a contiguous one-dimensional int64 array is in view; 1: it is something else.
    if pages is None:
        return 1
    try:
        PyObject_GetBuffer(pages, view, PyBUF_ND | PyBUF_FORMAT)
    except (TypeError, BufferError, ValueError):
        return 1
    if (
        view.ndim != 1
        or view.itemsize != 8
        or view.format == NULL
        or (view.format[0] != c"l" and view.format[0] != c"q")
    ):
        PyBuffer_Release(view)
        return 1
    return 0


cdef int read_costs(Costs *into, object costs, object team) except -1:
    into.byte = costs.byte
    into.latency = costs.latency
    into.loop_submit = costs.loop_submit
    into.loop_engine = costs.loop_engine
    into.call_submit = costs.call_submit
    into.call_engine = costs.call_engine
    into.copy_submit = costs.copy_submit
    into.copy_engine = costs.copy_engine
    into.staged_small = costs.staged_small
    into.staged_large = costs.staged_large
    # Below 0 nothing is staged: a copy has at least one byte.
    into.inline_bytes = costs.inline_bytes if costs.inline_bytes > 0 else -1
    into.strided_submit = costs.strided_submit
    into.strided_engine = costs.strided_engine
    into.strided_row = costs.strided_row
    into.together_few = together_us(team.few)
    into.together_many = together_us(team.many)
    return 0


cdef inline bint offloads(object direction) except? -1:
    if direction == "offload":
        return True
    if direction == "load":
        return False
    raise ValueError(f"direction is {direction!r}: it is 'offload' or 'load'")


cdef object sorted_seams(object seams):
    return np.unique(np.asarray(() if seams is None else seams, dtype=np.uint64))


cdef uint64_t *seam_array(const uint64_t[::1] seams, Py_ssize_t *count) except? NULL:
    cdef Py_ssize_t i
    cdef uint64_t *array
    if seams.shape[0] == 0:
        return NULL
    array = <uint64_t *>malloc(seams.shape[0] * sizeof(uint64_t))
    if array == NULL:
        raise MemoryError("no memory for the seams")
    for i in range(seams.shape[0]):
        array[i] = seams[i]
    count[0] = seams.shape[0]
    return array


class Apart:
    # What seams keep apart, whatever the page numbers are. Planes are rows of `Prepared`.

    def __init__(self, device, host, device_pages, host_pages):
        self.sides = ((0, device, device_pages - 1), (1, host, host_pages - 1))

    def always(self, low, high):
        # A seam that lies between the two planes at every page.
        return any(
            self._within(seams, low[side] + last * low[2 + side], high[side] + high[4])
            for side, seams, last in self.sides
        )

    def anywhere(self, members):
        # A seam that some page, or some run of pages, may meet.
        return any(
            self._within(
                seams,
                min(row[side] for row in members),
                max(row[side] + last * row[2 + side] + row[4] for row in members),
            )
            for side, seams, last in self.sides
        )

    @staticmethod
    def _within(seams, start, end):
        index = bisect_right(seams, start)
        return index < len(seams) and seams[index] < end


cdef class Prepared:
    """A geometry with everything worked out that does not depend on page numbers.

    Parameters
    ----------
    planes : Planes
        Places of every layer's K and V on both sides.
    model : CostModel
        What each way of copying costs, in microseconds.
    host_seams, device_seams : ndarray of uint64, optional
        Addresses that no single copy may have on both sides of it: where an allocation, or
        a block of host memory that was registered by itself, begins or ends.
    team : Team, optional
        Threads that may submit the copies of a transfer, which several do from 256 copies on.

    Notes
    -----
    Safe to use from many threads at a time: nothing changes that a plan hangs on.
    """

    cdef Layout at
    # When one of its transfers last asked in vain whether its choice hangs on the CPU, and which.
    cdef int64_t asked
    cdef Py_ssize_t asked_count
    cdef int asked_how
    cdef int few, many              # threads that may submit few copies, and many
    cdef bint always                # and do, however long one would take
    cdef readonly object model
    """The cost model that it was made with."""

    def __cinit__(self, planes, model, host_seams=None, device_seams=None, team=ALONE):
        cdef const uint64_t[::1] device_base = planes.device_base
        cdef const uint64_t[::1] device_pitch = planes.device_pitch
        cdef const uint64_t[::1] host_base = planes.host_base
        cdef const uint64_t[::1] host_pitch = planes.host_pitch
        cdef const uint64_t[::1] width = planes.width
        cdef Py_ssize_t i, n = width.shape[0]
        if not (
            device_base.shape[0] == device_pitch.shape[0] == host_base.shape[0]
            == host_pitch.shape[0] == n
        ):
            raise ValueError("the arrays of planes differ in length")
        self.model = model
        self.at.device_pages = planes.device_pages
        self.at.host_pages = planes.host_pages
        self.few, self.many = team
        self.always = isinstance(team, AlwaysTeam)
        read_costs(&self.at.cost[0], model.load, team)
        read_costs(&self.at.cost[1], model.offload, team)
        sizes = sorted({int(size) for size in model.batch_sizes})[:8]
        if not sizes or min(sizes) < 1:
            raise ValueError(f"batch_sizes is {model.batch_sizes!r}: needs positive sizes")
        sizes = sorted({min(size, LONGEST_CALL) for size in sizes})
        self.at.sizes = len(sizes)
        for i in range(self.at.sizes):
            self.at.batch_size[i] = sizes[i]
        near, far = sorted_seams(device_seams), sorted_seams(host_seams)
        self.at.device_seam = seam_array(near, &self.at.device_seams)
        self.at.host_seam = seam_array(far, &self.at.host_seams)
        self.at.planes_in = n
        for i in range(n):
            self.at.page_bytes += width[i]
        table = self._fuse([
            (device_base[i], host_base[i], device_pitch[i], host_pitch[i], width[i])
            for i in range(n) if width[i]
        ])
        # K of each layer in turn is the usual order of one array; a list of tensors may lie
        # in memory in any order.
        apart = Apart(near, far, self.at.device_pages, self.at.host_pages)
        order = self._stack(self._split(table, apart), apart)
        other = self._stack(self._split(sorted(table), apart), apart)
        if len(other) < len(order):
            order = other
        self._store(order, apart)

    def __dealloc__(self):
        free(self.at.device_base)
        free(self.at.host_base)
        free(self.at.group)
        free(self.at.kind)
        free(self.at.choice)
        free(self.at.device_seam)
        free(self.at.host_seam)

    @staticmethod
    def _fuse(list table):
        # Planes that lie side by side on both sides are one wider plane.
        result = []
        for device, host, device_pitch, host_pitch, width in table:
            if result:
                d, h, dp, hp, w = result[len(result) - 1]
                if (
                    device == d + w and host == h + w
                    and device_pitch == dp and host_pitch == hp
                    and w + width <= min(dp, hp)
                ):
                    result[len(result) - 1] = (d, h, dp, hp, w + width)
                    continue
            result.append((device, host, device_pitch, host_pitch, width))
        return result

    @staticmethod
    def _split(list table, apart):
        # The fewest groups of planes, each evenly spaced on both sides in the same sense,
        # so that its planes can be the rows of a strided copy.
        groups = []
        at = 0
        while at < len(table):
            members = [table[at]]
            steps = None
            for row in table[at + 1:]:
                last = members[len(members) - 1]
                found = (row[0] - last[0], row[1] - last[1])
                if row[2:] != last[2:] or (steps is not None and found != steps):
                    break
                if (found[0] > 0) != (found[1] > 0):
                    break
                if apart.always(last, row):
                    break
                if not all(row[4] <= abs(step) <= LONGEST_PITCH for step in found):
                    break
                steps = found
                members.append(row)
            at += len(members)
            groups.append(members if steps is None or steps[0] > 0 else members[::-1])
        return groups

    @staticmethod
    def _stack(list groups, apart):
        # Groups that are alike become the slices of one, where their distance is a whole
        # number of its steps on both sides: K and V of all layers, mostly.
        found = []
        at = 0
        while at < len(groups):
            slices = [groups[at]]
            distance = None
            for members in groups[at + 1:]:
                last = slices[len(slices) - 1]
                if len(members) != len(last) or len(last) < 2 or members[0][2:] != last[0][2:]:
                    break
                step = [last[1][side] - last[0][side] for side in range(2)]
                if step != [members[1][side] - members[0][side] for side in range(2)]:
                    break
                way = [members[0][side] - last[0][side] for side in range(2)]
                if distance is not None and way != distance:
                    break
                if (way[0] > 0) != (way[1] > 0):
                    break
                if any(
                    abs(way[side]) % step[side] or abs(way[side]) < len(last) * step[side]
                    for side in range(2)
                ):
                    break
                low, high = (last, members) if way[0] > 0 else (members, last)
                if apart.always(low[0], high[len(high) - 1]):
                    break
                distance = way
                slices.append(members)
            at += len(slices)
            found.append(slices if distance is None or distance[0] > 0 else slices[::-1])
        return found

    def _store(self, list groups, apart):
        cdef Py_ssize_t g, k, at = 0, mode, side
        cdef Group *group
        cdef Kind *kind
        cdef Choice *choice
        self.at.groups = len(groups)
        self.at.planes = sum(len(slices) * len(slices[0]) for slices in groups)
        # calloc of one more: an empty geometry is no error here
        self.at.device_base = <uint64_t *>calloc(self.at.planes + 1, sizeof(uint64_t))
        self.at.host_base = <uint64_t *>calloc(self.at.planes + 1, sizeof(uint64_t))
        self.at.group = <Group *>calloc(self.at.groups + 1, sizeof(Group))
        self.at.kind = <Kind *>calloc(self.at.groups + 1, sizeof(Kind))
        self.at.choice = <Choice *>calloc(2 * MODES * (self.at.groups + 1), sizeof(Choice))
        if (
            self.at.device_base == NULL or self.at.host_base == NULL or self.at.group == NULL
            or self.at.kind == NULL or self.at.choice == NULL
        ):
            raise MemoryError("no memory for the planes")
        kinds = {}
        for g, slices in enumerate(groups):
            group = &self.at.group[g]
            members = [row for part in slices for row in part]
            group.first = at
            group.planes = len(members)
            group.depth = len(slices)
            _, _, group.device_pitch, group.host_pitch, group.width = members[0]
            if len(slices[0]) > 1:
                group.device_step = members[1][0] - members[0][0]
                group.host_step = members[1][1] - members[0][1]
            if group.depth > 1:
                group.device_rows = (slices[1][0][0] - slices[0][0][0]) // group.device_step
                group.host_rows = (slices[1][0][1] - slices[0][0][1]) // group.host_step
            for device, host, _, _, _ in members:
                self.at.device_base[at] = device
                self.at.host_base[at] = host
                at += 1
            group.seamed = apart.anywhere(members)
            self.at.any_seamed = self.at.any_seamed or group.seamed
            merges = group.width == group.device_pitch == group.host_pitch
            rows = group.device_pitch >= group.width and group.host_pitch >= group.width
            slabs = (
                rows and len(slices[0]) > 1
                and group.device_step % group.device_pitch == 0
                and group.host_step % group.host_pitch == 0
            )
            key = (group.planes, group.depth, group.width, merges, rows, slabs)
            k = kinds.setdefault(key, len(kinds))
            group.kind = k
            kind = &self.at.kind[k]
            kind.planes, kind.depth, kind.width, kind.merges, kind.rows, kind.slabs = key
            kind.groups += 1
            self.at.any_merges = self.at.any_merges or merges
        self.at.kinds = len(kinds)
        for side in range(2):
            for mode in range(MODES):
                for k in range(self.at.kinds):
                    kind = &self.at.kind[k]
                    choice = choice_of(&self.at, side, mode, k)
                    choice[0] = choose(&self.at.cost[side], kind, <int>mode)
                    self.at.weight[side][mode] += kind.groups * (
                        1 if choice.form == STACK else kind.planes
                    )

    @property
    def plane_groups(self):
        """Bytes of a page and number of planes of each group that moves together."""
        return [(self.at.group[g].width, self.at.group[g].planes) for g in range(self.at.groups)]

    @property
    def plane_slices(self):
        """Number of slices of each group; its planes are shared out among them."""
        return [self.at.group[g].depth for g in range(self.at.groups)]

    def transfer(self, device_pages, host_pages, direction, method="auto", *, batch=True):
        """Plan one transfer; nothing is packed before its pieces are asked for.

        Parameters
        ----------
        device_pages, host_pages : ndarray of int64
            Page numbers, one to one; inside the geometry (see `check`).
        direction : {"offload", "load"}
            From the device to the host, or back.
        method : {"auto", "batch", "strided", "loop"}
            ``"auto"`` takes what scores best (see `Transfer.scores`), the others force a method.
        batch : bool
            Whether the batch call can be used now; without it ``"auto"`` plans around it.

        Returns
        -------
        Transfer
            Iterate over it once for ``(kind, arrays)``.

        Raises
        ------
        ValueError
            If the arrays are no page numbers of equal count, or a name is unknown.
        """
        cdef Transfer t = Transfer.__new__(Transfer)
        cdef bint up = offloads(direction)
        cdef int wrong = self.view(t, device_pages, host_pages)
        if wrong:
            side = "device" if wrong == 1 else "host"
            raise ValueError(f"{side}_pages must be a one-dimensional contiguous int64 array")
        if t.device_view.shape[0] != t.host_view.shape[0]:
            raise ValueError(
                f"device_pages has {t.device_view.shape[0]} pages and host_pages has "
                f"{t.host_view.shape[0]}: they go together one to one"
            )
        self.start(t, up)
        t.decide(method, batch)
        return t

    def begin(self, device_pages, host_pages, bint load):
        """Check page numbers and view them for a transfer, in one step.

        Parameters
        ----------
        device_pages, host_pages : ndarray of int64
            Page numbers, one to one.
        load : bool
            From the host to the device; otherwise back.

        Returns
        -------
        Transfer or None
            To be asked by `decide` how to move them, before its pieces are; None where
            `check` finds anything wrong.
        """
        return self.begin_now(device_pages, host_pages, load)

    cdef object begin_now(self, object device_pages, object host_pages, bint load):
        cdef Transfer t = Transfer.__new__(Transfer)
        cdef Py_ssize_t position, other
        if self.view(t, device_pages, host_pages):
            return None
        if self.verdict(&t.device_view, &t.host_view, not load, &position, &other) != FINE:
            return None
        self.start(t, not load)
        return t

    cdef int view(self, Transfer t, object device_pages, object host_pages) except -1:
        # 1 or 2 where the pages of the device or of the host are no page numbers.
        if get_pages(device_pages, &t.device_view):
            return 1
        t.views = 1
        if get_pages(host_pages, &t.host_view):
            return 2
        t.views = 2
        return 0

    cdef int start(self, Transfer t, bint up) except -1:
        t.prepared = self
        t.p = &self.at
        t.side = 1 if up else 0
        t.piece = FIRST_PIECE
        t.scan.device = <const int64_t *>t.device_view.buf
        t.scan.host = <const int64_t *>t.host_view.buf
        t.scan.count = t.device_view.shape[0]
        # Nothing comes out before `decide`.
        t.ended = True
        return 0

    def check(self, device_pages, host_pages, direction):
        """Look over the page numbers of a transfer, cheaply and without raising.

        Parameters
        ----------
        device_pages, host_pages : ndarray of int64
            Page numbers, one to one.
        direction : {"offload", "load"}
            Says which side is the destination, where no page may come twice.

        Returns
        -------
        code : int
            ``CHECK_OK``, or the first trouble: ``CHECK_NOT_PAGES`` (no contiguous int64
            array), ``CHECK_LENGTHS``, ``CHECK_DEVICE_RANGE``, ``CHECK_HOST_RANGE``,
            ``CHECK_REPEATED``.
        position : int
            Where it is, or -1.
        other : int
            For a repeated destination its first position, otherwise -1.
        """
        cdef Py_buffer device, host
        cdef Py_ssize_t position = -1, other = -1
        cdef int found
        cdef bint up = offloads(direction)
        if get_pages(device_pages, &device):
            return NOT_PAGES, -1, -1
        if get_pages(host_pages, &host):
            PyBuffer_Release(&device)
            return NOT_PAGES, -1, -1
        try:
            found = self.verdict(&device, &host, up, &position, &other)
        finally:
            PyBuffer_Release(&device)
            PyBuffer_Release(&host)
        return found, position, other

    cdef int verdict(self, const Py_buffer *device, const Py_buffer *host, bint up,
                     Py_ssize_t *position, Py_ssize_t *other) except -1:
        cdef Workspace workspace
        cdef const int64_t *d = <const int64_t *>device.buf
        cdef const int64_t *h = <const int64_t *>host.buf
        cdef const int64_t *to = h if up else d
        cdef Py_ssize_t n = device.shape[0], i, j, first = -1
        cdef int64_t pages = self.at.host_pages if up else self.at.device_pages
        position[0] = other[0] = -1
        if host.shape[0] != n:
            return LENGTHS
        if n <= FEW:
            first = out_of_range(d, h, n, self.at.device_pages, self.at.host_pages)
            if first < 0:
                for i in range(1, n):
                    for j in range(i):
                        if to[i] == to[j]:
                            position[0], other[0] = i, j
                            return REPEATED
        else:
            with nogil:
                first = out_of_range(d, h, n, self.at.device_pages, self.at.host_pages)
        if first >= 0:
            position[0] = first
            if d[first] < 0 or d[first] >= self.at.device_pages:
                return DEVICE_RANGE
            return HOST_RANGE
        if n <= FEW:
            return FINE
        workspace = take_workspace()
        workspace.grow_marks(pages)
        with nogil:
            first = first_repeated(to, n, pages, workspace.mark)
            if first >= 0:
                other[0] = same_before(to, first)
                if other[0] < 0:
                    # A caller that writes to the array meanwhile, now or in a transfer before.
                    memset(workspace.mark, 0, (workspace.mark_room + 63) // 64 * sizeof(uint64_t))
                    first = first_repeated(to, n, pages, workspace.mark)
                    if first >= 0:
                        other[0] = same_before(to, first)
        keep_workspace(workspace)
        if first < 0:
            return FINE
        position[0] = first
        if other[0] < 0:
            return HOST_RANGE if up else DEVICE_RANGE
        return REPEATED


cdef Py_ssize_t out_of_range(const int64_t *d, const int64_t *h, Py_ssize_t n,
                             int64_t device_pages, int64_t host_pages) noexcept nogil:
    # A negative number is a huge unsigned one: one comparison per side.
    cdef Py_ssize_t i
    for i in range(n):
        if <uint64_t>d[i] >= <uint64_t>device_pages or <uint64_t>h[i] >= <uint64_t>host_pages:
            return i
    return -1


cdef Py_ssize_t same_before(const int64_t *pages, Py_ssize_t last) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(last):
        if pages[i] == pages[last]:
            return i
    return -1


cdef Py_ssize_t first_repeated(const int64_t *pages, Py_ssize_t n, int64_t limit,
                               uint64_t *mark) noexcept nogil:
    # Bits, because what is random access has to stay in the CPU's nearest caches: what a batch
    # call stages goes through them, and leaves nothing else there.
    cdef Py_ssize_t i, found = -1
    cdef uint64_t page, bit
    cdef uint64_t *word
    for i in range(n):
        # Looked at again: the array is the caller's, who may write to it.
        page = <uint64_t>pages[i]
        if page >= <uint64_t>limit:
            found = i
            break
        word = mark + (page >> 6)
        bit = <uint64_t>1 << (page & 63)
        if word[0] & bit:
            found = i
            break
        word[0] |= bit
    for i in range(n if found < 0 else found):
        page = <uint64_t>pages[i]
        if page < <uint64_t>limit:
            mark[page >> 6] = 0
    return found


cdef class Transfer:
    """One planned transfer, and an iterator over its packed pieces.

    Each piece is ``("strided", ops)`` with ``ops`` of shape (m, 6) and type uint64 (dst,
    dpitch, src, spitch, width, height), ``("strided3", ops)`` with shape (m, 9) (dst, dpitch,
    drows, src, spitch, srows, width, height, depth; drows and srows are the rows from one
    slice to the next), or ``("batch" | "loop", (dsts, srcs, sizes))``. The arrays are buffers
    that the next piece overwrites: use them before asking for it. Strided copies come before
    the plain ones of the same pages, because the copy engine can work on them while the host
    still submits the others.
    """

    cdef Prepared prepared          # keeps p alive
    cdef const Layout *p
    cdef Workspace workspace
    cdef Py_buffer device_view, host_view
    cdef int views
    cdef Scan scan
    cdef Py_ssize_t side, piece, given
    cdef int mode
    cdef bint cubes_wait, plain_waits, ended
    cdef Runs runs
    cdef bint surveyed              # they have been found
    cdef bint lone                  # no page is in a run
    cdef bint following             # it comes right behind another transfer of its stream
    cdef bint met                   # its stream has been looked at: by `decide_now`
    cdef int64_t begin, behind      # when that was, and until when the stream had work
    cdef Pace *lane                 # what is known of transfers like it
    # Times what the model says that one thread and several took just now; 0 where it is not known.
    cdef double pace, team_pace
    cdef bint tries                 # one thread is to be tried
    cdef bint hopes                 # several are
    cdef bint singly                # it is priced that way
    cdef double apart               # copies that one thread submitted in the place of several
    cdef int64_t took               # nanoseconds that submitting its copies took so far
    cdef bint untimed               # they say nothing: several threads were not there, or an error
    cdef uint64_t stream
    cdef double slow
    cdef double time[MODES]
    cdef double rank[MODES]         # what the choice goes by
    cdef Py_ssize_t size_of[MODES]
    cdef Py_ssize_t first_of[MODES]
    cdef Tally tally[MODES]
    cdef bint team_of[MODES]
    cdef readonly int threads
    """Threads that are to submit the plain copies, 1 where it is the caller's alone."""
    cdef readonly uint64_t same_size
    """Bytes of every plain copy, 0 where they may differ."""
    cdef readonly Py_ssize_t batch_size
    """Copies per batch call."""
    cdef readonly Py_ssize_t first_size
    """Copies of the first batch call, where calls grow; else 0, as where several threads submit.

    Each call then takes as many copies as are queued already, up to `batch_size`: the copy engine
    starts early, and is not kept waiting afterwards.
    """

    def __dealloc__(self):
        free(self.runs.count[0])
        if self.views > 0:
            PyBuffer_Release(&self.device_view)
        if self.views > 1:
            PyBuffer_Release(&self.host_view)

    @property
    def method(self):
        """What moves the pages: ``"batch"``, ``"strided+loop"``, and so on."""
        return METHODS[self.mode]

    @property
    def direction(self):
        """``"offload"`` or ``"load"``."""
        return "offload" if self.side else "load"

    @property
    def copies_in(self):
        """Copies of one page of one plane each that the request asks for."""
        return self.scan.count * self.p.planes_in

    @property
    def bytes(self):
        """Bytes to be moved."""
        return self.scan.count * self.p.page_bytes

    @property
    def predicted_us(self):
        """Predicted time until the last byte has arrived, in microseconds."""
        return self.time[self.mode]

    @property
    def submit_us(self):
        """Predicted host time inside the CUDA calls, in microseconds."""
        return self.tally[self.mode].submit

    @property
    def predicted_calls(self):
        """Predicted number of CUDA calls; cuts at seams come on top."""
        cdef Tally *t = &self.tally[self.mode]
        return round(t.strided + calls_of(t.copies, self.mode, self.batch_size, self.first_size))

    @property
    def scores(self):
        """What the choice goes by: the times of `candidates`, or of one that follows another."""
        return {name: self.rank[METHODS.index(name)] for name in self.candidates}

    @property
    def candidates(self):
        """Predicted microseconds of each method that was considered."""
        cdef Py_ssize_t m
        found = {}
        for m in range(MODES):
            if self.time[m] >= NEVER:
                continue
            # Nothing is mixed where one of the parts is empty.
            if m >= STRIDED_BATCH and (self.tally[m].copies == 0 or self.tally[m].strided == 0):
                continue
            found[METHODS[m]] = self.time[m]
        return found

    def decide_now(self, method, bint batch, uint64_t stream):
        """Choose for what the transfer meets: the CPU's speed, and what its stream has to do.

        Parameters
        ----------
        method, batch
            As in `decide`.
        stream : int
            Handle of the stream that it is about to be queued on. Noted, for the next one.

        Raises
        ------
        ValueError
            If the method is unknown.
        """
        self.choose(method, batch, stream)

    cdef int choose(self, object method, bint batch, uint64_t stream) except -1:
        cdef Queue *queue = queue_of(stream)
        cdef int64_t submitted, moved
        cdef bint following
        if not self.met:
            self.met = True
            self.stream = stream
            self.begin = clock_ns()
            self.behind = queue.until if queue.stream == stream else 0
        following = self.begin < self.behind + FOLLOWS
        self.lane = paces[self.side + 2 * (self.scan.count * self.p.planes_in > TOGETHER_FEW)]
        self.pace = pace_of(self.lane, False, self.begin)
        self.tries = tried_now(self.lane, False, self.begin)
        self.hopes = self.pace > 0 and tried_now(self.lane, True, self.begin)
        self.team_pace = HOPED if self.hopes else pace_of(self.lane, True, self.begin)
        if self.begin - looked > LOOK_AGAIN and (
            self.begin - looked > LOOK_BELIEVED or self.hangs(method, batch, following)
        ):
            slowness_at(self.begin)
        self.settle_on(method, batch, slow_now, following)
        submitted = self.begin + <int64_t>(1e3 * self.tally[self.mode].submit)
        moved = self.behind if self.behind > self.begin else self.begin
        moved += <int64_t>(1e3 * self.tally[self.mode].engine)
        queue.stream = stream
        if moved > self.begin + MOST_QUEUED:
            moved = self.begin + MOST_QUEUED
        queue.until = submitted if submitted > moved else moved
        return 0

    def decide(self, method, bint batch, double slow=1, bint following=False):
        """Choose how to move the pages; again, to choose anew and begin with the first piece.

        Parameters
        ----------
        method : {"auto", "batch", "strided", "loop"}
            ``"auto"`` takes what scores best (see `Transfer.scores`), the others force a method.
        batch : bool
            Whether the batch call can be used now; without it ``"auto"`` plans around it.
        slow : float
            How many times as long as in the cost model the CPU needs.
        following : bool
            Whether it comes right behind another transfer of its stream. What it adds to the time
            of both is then the longer of the host's time and the copy engine's; what its first
            call keeps waiting is hidden behind the one before.

        Raises
        ------
        ValueError
            If the method is unknown.
        """
        self.settle_on(method, batch, slow, following)

    cdef int settle_on(self, object method, bint batch, double slow, bint following) except -1:
        cdef bint wanted[MODES]
        cdef Py_ssize_t best, m
        cdef bint many
        want(wanted, method, batch)
        self.survey()
        best = self.best_of(wanted, slow, following)
        if self.tries and self.team_of[best] and not self.prepared.always:
            self.singly = True
            for m in range(MODES):
                wanted[m] = m == best
            best = self.best_of(wanted, slow, following)
            self.singly = False
        self.mode = <int>best
        self.batch_size = self.size_of[best]
        self.first_size = self.first_of[best]
        self.threads = 1
        if self.team_of[best]:
            many = self.tally[best].copies > TOGETHER_FEW
            self.threads = self.prepared.many if many else self.prepared.few
        self.rewind()
        self.same_size = 0
        if (
            (self.mode == BATCH or self.mode == LOOP)
            and self.p.kinds == 1 and not self.p.any_seamed and not self.uses_runs()
        ):
            self.same_size = self.p.kind[0].width
        self.ended = self.cubes_wait = self.plain_waits = False
        self.piece = FIRST_PIECE
        self.given = 0
        if self.workspace is not None:
            self.workspace.copies = 0
        return 0

    cdef bint hangs(self, object method, bint batch, bint following) except -1:
        # Whether the CPU's speed decides what is chosen.
        cdef bint wanted[MODES]
        cdef bint team
        cdef Py_ssize_t m, best, size, first
        cdef Prepared ready = self.prepared
        cdef int how = self.side + 2 * following
        cdef double slow
        want(wanted, method, batch)
        if not wanted[STRIDED_BATCH] and not wanted[STRIDED_LOOP] and (
            not wanted[BATCH]
            or self.scan.count * self.p.weight[self.side][BATCH] <= self.p.batch_size[0]
        ):
            # A method is forced, and is not cut into calls.
            return False
        for m in range(MODES):
            how += <int>wanted[m] << (2 + m)
        self.survey()
        if (
            self.lone and self.begin - ready.asked < LOOK_AGAIN
            and ready.asked_count == self.scan.count and ready.asked_how == how
        ):
            # The last transfer was like this one, and it did not.
            return False
        best = self.best_of(wanted, 1, following)
        size, first, team = self.size_of[best], self.first_of[best], self.team_of[best]
        for slow in (SLOWEST_CPU, (1 + SLOWEST_CPU) / 2):
            if (
                self.best_of(wanted, slow, following) != best
                or self.size_of[best] != size or self.first_of[best] != first
                or self.team_of[best] != team
            ):
                return True
        if self.lone:
            ready.asked, ready.asked_count, ready.asked_how = self.begin, self.scan.count, how
        return False

    cdef Py_ssize_t best_of(self, const bint *wanted, double slow,
                            bint following) noexcept nogil:
        # Price methods beside a CPU of some speed; the mode that is best.
        cdef Py_ssize_t m, best = -1
        self.slow, self.following = slow, following
        self.predict(wanted)
        for m in range(MODES):
            if wanted[m] and (best < 0 or self.rank[m] < self.rank[best]):
                best = m
        # A mixture in which one part is empty goes by the plain name.
        if best == STRIDED_BATCH or best == STRIDED_LOOP:
            if self.tally[best].copies == 0 and self.rank[STRIDED] <= self.rank[best]:
                best = STRIDED
            elif self.tally[best].strided == 0:
                best = BATCH if best == STRIDED_BATCH else LOOP
        return best

    cdef void rewind(self) noexcept nogil:
        # Keep together only the runs that some group makes use of.
        cdef Py_ssize_t k
        cdef Choice *choice
        cdef int64_t shortest = LONGEST_RUN + 1
        for k in range(self.p.kinds):
            choice = choice_of(self.p, self.side, self.mode, k)
            if choice.shortest < shortest:
                shortest = choice.shortest
            if choice.slab < shortest:
                shortest = choice.slab
        self.scan.at = self.scan.known = 0
        if self.lone:
            # Nobody needs to look for runs again.
            self.scan.unit = self.scan.step = LONGEST_RUN + 1
            return
        self.scan.unit = 2 if self.p.any_merges else shortest
        # Steps of one pair occur by chance among random pages.
        self.scan.step = shortest if shortest > 3 else 3

    cdef bint uses_runs(self) noexcept nogil:
        return self.scan.unit <= LONGEST_RUN or self.scan.step <= LONGEST_RUN

    cdef int survey(self) except -1:
        # Find the runs, once for all times that the transfer is decided on.
        if self.surveyed:
            return 0
        if self.scan.count < KEEP_GIL:
            self.find_runs()
        else:
            with nogil:
                self.find_runs()
        self.surveyed = True
        return 0

    cdef int find_runs(self) except -1 nogil:
        cdef Scan *s = &self.scan
        cdef Runs *found = &self.runs
        cdef int64_t a = 0, b = 0
        cdef Py_ssize_t r, unit, q
        found.single = 0
        found.used[0] = found.used[1] = 0
        s.at = s.known = 0
        s.unit = 2
        s.step = 3
        while s.at < s.count:
            r = lone_pages(s)
            s.at += r
            found.single += r
            r = next_run(s, &a, &b)
            s.at += r
            if r == 1:
                found.single += 1
                continue
            if found.count[0] == NULL:
                self.make_buckets()
            unit = 1 if a == b and (a == 1 or a == -1) else 0
            q = bucket_of(r)
            found.used[unit] |= <uint64_t>1 << q
            found.count[unit][q] += 1
            found.pages[unit][q] += r
        self.lone = not (found.used[0] | found.used[1])
        return 0

    cdef int make_buckets(self) except -1 with gil:
        # Most transfers have no run, and need none.
        cdef Py_ssize_t unit
        cdef double *block = <double *>calloc(4 * BUCKETS, sizeof(double))
        if block == NULL:
            raise MemoryError("no memory for the runs of a transfer")
        for unit in range(2):
            self.runs.count[unit] = block + unit * BUCKETS
            self.runs.pages[unit] = block + (2 + unit) * BUCKETS
        return 0

    cdef void predict(self, const bint *wanted) noexcept nogil:
        cdef const Layout *p = self.p
        cdef const Runs *found = &self.runs
        cdef const Costs *c = &p.cost[self.side]
        cdef double length, runs, pages
        cdef Py_ssize_t m, k, unit, q
        cdef uint64_t bits
        cdef const Kind *kind
        cdef const Choice *choice
        cdef Tally *t
        for m in range(MODES):
            self.time[m] = self.rank[m] = NEVER
            self.team_of[m] = False
            t = &self.tally[m]
            t.submit = t.engine = t.copies = t.strided = t.plain = t.staged = 0
            if not wanted[m]:
                continue
            if m >= STRIDED_BATCH and self.lone and p.kinds == 1:
                # One kind of pages, none in a run: a mixture is one method or the other.
                continue
            for k in range(p.kinds):
                kind = &p.kind[k]
                choice = choice_of(p, self.side, m, k)
                count_page(
                    t, c, kind, <int>m, choice.form, found.single, <double>kind.width
                )
                for unit in range(2):
                    bits = found.used[unit]
                    while bits:
                        q = lowest_bit(bits)
                        bits &= bits - 1
                        runs, pages = found.count[unit][q], found.pages[unit][q]
                        length = pages / runs
                        if unit and kind.merges:
                            count_page(
                                t, c, kind, <int>m,
                                form_of(c, kind, <int>m, length * kind.width),
                                runs, length * kind.width,
                            )
                        elif unit and length >= choice.slab:
                            count_rows(t, c, kind, runs, pages, True)
                        elif length >= choice.shortest:
                            count_rows(t, c, kind, runs, pages, False)
                        else:
                            count_page(
                                t, c, kind, <int>m, choice.form, pages, <double>kind.width
                            )
            self.price(<int>m)

    cdef void price(self, int mode) noexcept nogil:
        # Submission and copy engine work side by side; what neither hides is the first call,
        # or the last one where the host is the slower.
        cdef const Layout *p = self.p
        cdef const Costs *c = &p.cost[self.side]
        cdef Tally *t = &self.tally[mode]
        cdef bint batched = mode == BATCH or mode == STRIDED_BATCH
        cdef Py_ssize_t size = p.batch_size[p.sizes - 1], first = p.batch_size[0], i
        cdef double each = c.together_few if t.copies <= TOGETHER_FEW else c.together_many
        cdef double alone, together
        t.alone = t.plain + t.staged
        t.submit *= 1 + SINGLE_SLOWS * (self.slow - 1)
        t.plain *= self.slow if batched else 1 + SINGLE_SLOWS * (self.slow - 1)
        t.plain += t.staged * (1 + STAGED_SLOWS * (self.slow - 1))
        t.together = TOGETHER_BEGINS + each * t.copies
        together = t.together
        if self.team_pace:
            together *= self.team_pace
        # Where the copy engine is the slower one anyway, times say nothing, for the queue is full.
        t.shared = batched and t.copies >= TOGETHER_FROM and each > 0 and (
            self.prepared.always
            or SLOWEST_CPU * t.alone > TOGETHER_WORTH * larger(t.together, t.engine)
        )
        # What its calls take one thread is in the measured time of several.
        alone = self.pace * t.alone if self.pace else t.plain
        alone += t.copies / size * c.call_submit
        self.team_of[mode] = t.shared and not self.singly and (
            self.prepared.always or alone > TOGETHER_WORTH * larger(together, t.engine)
        )
        if t.shared and 0 < self.pace * t.alone < t.plain:
            # The CPU looks slower than it is. If it is slower than it looks, batches do not cost
            # more for that: nobody would find out when they are fast again.
            t.plain = self.pace * t.alone
        if self.team_of[mode]:
            t.plain = together
        t.submit += t.plain
        if batched and t.copies == 1:
            # A batch of one copy was measured to take longer than the copy by itself.
            t.submit += c.loop_submit
            t.engine += c.loop_engine
        if self.team_of[mode]:
            # Whoever is free takes the next call; what calls cost is in the measured time.
            self.consider(mode, TOGETHER_SHARE if TOGETHER_SHARE < size else size, 0)
            t.engine += calls_of(t.copies, mode, self.size_of[mode], 0) * c.call_engine
            return
        # Longest calls first: shorter ones cost the host more, and it may be a slow one.
        self.consider(mode, size, 0)
        if batched and t.copies > first:
            for i in range(p.sizes - 2, -1, -1):
                self.consider(mode, p.batch_size[i], 0)
        if batched:
            i = <Py_ssize_t>calls_of(t.copies, mode, self.size_of[mode], self.first_of[mode])
            t.submit += i * c.call_submit
            t.engine += i * c.call_engine

    cdef void consider(self, int mode, Py_ssize_t size, Py_ssize_t first) noexcept nogil:
        # Take batch calls of a size if they are clearly faster than what was considered before.
        cdef const Costs *c = &self.p.cost[self.side]
        cdef const Tally *t = &self.tally[mode]
        cdef double calls = calls_of(t.copies, mode, size, first)
        cdef double submit = t.submit, engine = t.engine, time, rank, wait = 0
        if mode == BATCH or mode == STRIDED_BATCH:
            submit += 0 if self.team_of[mode] else calls * c.call_submit
            engine += calls * c.call_engine
        if first and engine >= submit:
            wait = c.call_submit + t.submit * first / t.copies
        elif first:
            wait = c.call_engine + t.engine * last_of(t.copies, size, first) / t.copies
        elif calls + t.strided > 0:
            wait = (engine if submit > engine else submit) / (calls + t.strided)
        time = larger(submit, engine) + c.latency + wait
        rank = time
        if self.following:
            rank = larger(submit + TRANSFER_SUBMIT * self.slow, engine)
        if rank < self.rank[mode] * (GROWING_CALLS if first else SMALLER_CALLS):
            self.rank[mode] = rank
            self.time[mode] = time
            self.size_of[mode] = size
            self.first_of[mode] = first

    def __iter__(self):
        return self

    def __next__(self):
        cdef Step step = self.step()
        if step == END:
            raise StopIteration
        if step == COPIES:
            name = "batch" if self.batched() else "loop"
        else:
            name = "strided" if step == ROWS else "strided3"
        return name, self.arrays(step)

    cdef bint batched(self) noexcept nogil:
        return self.mode == BATCH or self.mode == STRIDED_BATCH

    cdef Step step(self) except? END:
        # Pack the next piece.
        cdef Workspace w
        if self.ended:
            return END
        if self.workspace is None:
            self.workspace = take_workspace()
            self.workspace.copies = 0
        w = self.workspace
        self.settle(w)
        if self.cubes_wait:
            self.cubes_wait = False
            return CUBES
        if self.plain_waits:
            self.plain_waits = False
            if self.give(w):
                return COPIES
        while self.scan.at < self.scan.count:
            w.strided = w.cubic = 0
            if self.scan.count * self.p.weight[self.side][self.mode] < KEEP_GIL:
                self.fill(w)
            else:
                with nogil:
                    self.fill(w)
            self.piece = DEFAULT_PIECE
            if w.strided or w.cubic:
                self.plain_waits = w.copies > 0
                if not w.strided:
                    return CUBES
                self.cubes_wait = w.cubic > 0
                return ROWS
            if self.give(w):
                return COPIES
        self.ended = True
        self.workspace = None
        keep_workspace(w)
        if self.met:
            self.submitted()
        return END

    cdef object arrays(self, Step step):
        # The piece that has been packed.
        cdef Workspace w = self.workspace
        cdef Py_ssize_t n = self.given
        if step == ROWS:
            return w.ops[: w.strided]
        if step == CUBES:
            return w.cubes[: w.cubic]
        if self.same_size and (w.alike != self.same_size or w.alike_count < n):
            # Written once for all transfers of such pages: a third of what packing writes.
            w.sizes[:n] = self.same_size
            w.alike, w.alike_count = self.same_size, n
        piece = slice(n)
        return w.dsts[piece], w.srcs[piece], w.sizes[piece]

    cdef void submitted(self) noexcept nogil:
        # The host may have taken longer than the model says: beside others on its CPU, or for
        # want of room in the queue.
        cdef Queue *queue = queue_of(self.stream)
        cdef int64_t now = clock_ns()
        cdef Tally *t = &self.tally[self.mode]
        cdef const Costs *c = &self.p.cost[self.side]
        cdef double took
        cdef bint team
        if queue.stream == self.stream and queue.until < now:
            queue.until = now
        if (
            t.shared and self.took > 0 and not self.untimed and not self.prepared.always
            and 4 * self.apart <= t.copies
        ):
            took = 1e-3 * self.took
            team = self.threads > 1
            if not team:
                took -= c.call_submit * calls_of(
                    t.copies, self.mode, self.batch_size, self.first_size
                )
            took /= t.together if team else t.alone
            keep_pace(self.lane, team, took, self.begin, now)
        elif t.shared and self.hopes and self.threads > 1:
            # They were not there, which may be so for long.
            self.lane[True].since = 0
            try_later(&self.lane[True], True)

    cdef bint give(self, Workspace w) noexcept nogil:
        # Whole batch calls, until the end; the rest waits for the next pages.
        self.given = w.copies
        if self.batched() and self.scan.at < self.scan.count:
            self.given -= self.given % self.batch_size
        return self.given > 0

    cdef void settle(self, Workspace w) noexcept nogil:
        # The piece that was given is used up; what it left over moves to the front.
        cdef Py_ssize_t rest = w.copies - self.given
        if self.given == 0:
            return
        if rest:
            memmove(w.dst, w.dst + self.given, rest * sizeof(uint64_t))
            memmove(w.src, w.src + self.given, rest * sizeof(uint64_t))
            if not self.same_size:  # otherwise only so many were written as are the same
                memmove(w.size, w.size + self.given, rest * sizeof(uint64_t))
        w.copies = rest
        self.given = 0

    cdef int fill(self, Workspace w) except -1 nogil:
        cdef Py_ssize_t weight = self.p.weight[self.side][self.mode]
        cdef Py_ssize_t room = self.piece // (weight if weight > 0 else 1)
        cdef Py_ssize_t n = 0, r
        cdef bint single = True
        cdef int64_t a = 0, b = 0
        cdef Scan *s = &self.scan
        if room > BLOCK_RUNS:
            room = BLOCK_RUNS
        if room < 1:
            room = 1
        if not self.same_size:
            w.alike_count = 0
        if not self.uses_runs():
            # No run is of use: the pages are the block.
            if room > s.count - s.at:
                room = s.count - s.at
            return self.emit_pages(w, s.device + s.at, s.host + s.at, room)
        while n < room and s.at < s.count:
            r = next_run(s, &a, &b)
            w.run_pages[n] = r
            if r == 1:
                w.run_device[n] = s.device[s.at]
                w.run_host[n] = s.host[s.at]
            else:
                single = False
                if a < 0:
                    # Downwards on both sides is upwards from the other end.
                    w.run_device[n] = s.device[s.at + r - 1]
                    w.run_host[n] = s.host[s.at + r - 1]
                    w.run_device_step[n] = -a
                    w.run_host_step[n] = -b
                else:
                    w.run_device[n] = s.device[s.at]
                    w.run_host[n] = s.host[s.at]
                    w.run_device_step[n] = a
                    w.run_host_step[n] = b
            s.at += r
            n += 1
        if single:
            s.at -= n
            return self.emit_pages(w, w.run_device, w.run_host, n)
        return self.emit_runs(w, n)

    cdef int emit_pages(self, Workspace w, const int64_t *device, const int64_t *host,
                        Py_ssize_t n) except -1 nogil:
        # Every page by itself; moves the scan on.
        cdef const Layout *p = self.p
        cdef Group *g
        cdef Form form
        cdef Py_ssize_t i, q, j
        cdef uint64_t *to
        cdef uint64_t *of
        cdef uint64_t *size
        cdef uint64_t *op
        cdef uint64_t device_base, host_base, device_pitch, host_pitch, width
        self.scan.at += n
        for j in range(p.groups):
            g = &p.group[j]
            form = choice_of(p, self.side, self.mode, g.kind).form
            if g.seamed or (form == LINES and g.width > LONGEST_LINE):
                for i in range(n):
                    self.put(w, g, form, device[i], host[i], g.width)
                continue
            device_pitch, host_pitch, width = g.device_pitch, g.host_pitch, g.width
            if form == PLAIN:
                if w.copies + n * g.planes > w.copy_room:
                    w.grow_copies(n * g.planes)
                for q in range(g.first, g.first + g.planes):
                    of = (w.src if self.side else w.dst) + w.copies
                    to = (w.dst if self.side else w.src) + w.copies
                    size = w.size + w.copies
                    device_base, host_base = p.device_base[q], p.host_base[q]
                    for i in range(n):
                        of[i] = device_base + <uint64_t>device[i] * device_pitch
                        to[i] = host_base + <uint64_t>host[i] * host_pitch
                    if not self.same_size:
                        for i in range(n):
                            size[i] = width
                    w.copies += n
                continue
            if form == STACK and g.depth > 1:
                if w.cubic + n > w.cubic_room:
                    w.grow_cubes(n)
                device_base, host_base = p.device_base[g.first], p.host_base[g.first]
                for i in range(n):
                    self.push_cube(
                        w, device_base + <uint64_t>device[i] * device_pitch, g.device_step,
                        g.device_rows, host_base + <uint64_t>host[i] * host_pitch, g.host_step,
                        g.host_rows, width, g.planes // g.depth, g.depth,
                    )
                continue
            if w.strided + n * g.planes > w.strided_room:
                w.grow_strided(n * g.planes)
            for q in range(g.first, g.first + (1 if form == STACK else g.planes)):
                device_base, host_base = p.device_base[q], p.host_base[q]
                op = w.op + 6 * w.strided
                for i in range(n):
                    if self.side:
                        op[0] = host_base + <uint64_t>host[i] * host_pitch
                        op[1] = g.host_step if form == STACK else width
                        op[2] = device_base + <uint64_t>device[i] * device_pitch
                        op[3] = g.device_step if form == STACK else width
                    else:
                        op[0] = device_base + <uint64_t>device[i] * device_pitch
                        op[1] = g.device_step if form == STACK else width
                        op[2] = host_base + <uint64_t>host[i] * host_pitch
                        op[3] = g.host_step if form == STACK else width
                    op[4] = width
                    op[5] = <uint64_t>g.planes if form == STACK else 1
                    op += 6
                w.strided += n
        return 0

    cdef int emit_runs(self, Workspace w, Py_ssize_t n) except -1 nogil:
        cdef const Layout *p = self.p
        cdef const Costs *c = &p.cost[self.side]
        cdef Py_ssize_t i, j, q, x
        cdef Group *g
        cdef Kind *kind
        cdef Choice *choice
        cdef uint64_t pages, device_step, host_step, size
        for j in range(p.groups):
            g = &p.group[j]
            kind = &p.kind[g.kind]
            choice = choice_of(p, self.side, self.mode, g.kind)
            for i in range(n):
                pages = w.run_pages[i]
                if pages == 1:
                    self.put(w, g, choice.form, w.run_device[i], w.run_host[i], g.width)
                    continue
                device_step, host_step = w.run_device_step[i], w.run_host_step[i]
                if kind.merges and device_step == 1 and host_step == 1:
                    size = pages * g.width
                    self.put(
                        w, g, form_of(c, kind, self.mode, <double>size),
                        w.run_device[i], w.run_host[i], size,
                    )
                    continue
                if (
                    <int64_t>pages >= choice.slab
                    and self.put_slabs(w, g, w.run_device[i], device_step, w.run_host[i],
                                       host_step, pages)
                ):
                    continue
                if (
                    <int64_t>pages >= choice.shortest
                    and device_step <= LONGEST_PITCH // g.device_pitch
                    and host_step <= LONGEST_PITCH // g.host_pitch
                ):
                    for q in range(g.first, g.first + g.planes):
                        self.put_rows(
                            w, g.seamed,
                            p.device_base[q] + w.run_device[i] * g.device_pitch,
                            device_step * g.device_pitch,
                            p.host_base[q] + w.run_host[i] * g.host_pitch,
                            host_step * g.host_pitch,
                            g.width, pages,
                        )
                    continue
                for x in range(<Py_ssize_t>pages):
                    self.put(
                        w, g, choice.form, w.run_device[i] + x * <int64_t>device_step,
                        w.run_host[i] + x * <int64_t>host_step, g.width,
                    )
        return 0

    cdef int put(self, Workspace w, const Group *g, Form form, int64_t device, int64_t host,
                 uint64_t size) except -1 nogil:
        # One page (or a merged run from its lowest page) of every plane of a group.
        cdef const Layout *p = self.p
        cdef uint64_t device_at = <uint64_t>device * g.device_pitch
        cdef uint64_t host_at = <uint64_t>host * g.host_pitch
        cdef Py_ssize_t q, part, each = g.planes // g.depth
        if form == STACK and size <= g.device_step and size <= g.host_step:
            if g.depth > 1 and not self.meets_seam(
                g, p.device_base[g.first] + device_at, p.host_base[g.first] + host_at,
                (g.depth - 1) * g.device_rows * g.device_step + (each - 1) * g.device_step + size,
                (g.depth - 1) * g.host_rows * g.host_step + (each - 1) * g.host_step + size,
            ):
                return self.push_cube(
                    w, p.device_base[g.first] + device_at, g.device_step, g.device_rows,
                    p.host_base[g.first] + host_at, g.host_step, g.host_rows, size, each, g.depth,
                )
            for part in range(g.depth):
                q = g.first + part * each
                self.put_rows(
                    w, g.seamed, p.device_base[q] + device_at, g.device_step,
                    p.host_base[q] + host_at, g.host_step, size, each,
                )
            return 0
        for q in range(g.first, g.first + g.planes):
            self.put_copy(w, g.seamed, p.device_base[q] + device_at, p.host_base[q] + host_at, size)
        return 0

    cdef int put_slabs(self, Workspace w, const Group *g, int64_t device, uint64_t device_step,
                       int64_t host, uint64_t host_step, uint64_t pages) except -1 nogil:
        # A run of pages: the pages are the rows, and the planes of a slice the slices. 1 if it
        # was put, 0 if it cannot be.
        cdef const Layout *p = self.p
        cdef uint64_t device_pitch, host_pitch, device_rows, host_rows, each = g.planes // g.depth
        cdef Py_ssize_t q, part
        if device_step > LONGEST_PITCH // g.device_pitch:
            return 0
        if host_step > LONGEST_PITCH // g.host_pitch:
            return 0
        device_pitch = device_step * g.device_pitch
        host_pitch = host_step * g.host_pitch
        device_rows = g.device_step // device_pitch
        host_rows = g.host_step // host_pitch
        if (
            g.device_step % device_pitch or g.host_step % host_pitch
            or device_rows < pages or host_rows < pages
        ):
            return 0
        for part in range(g.depth):
            q = g.first + part * each
            if self.meets_seam(
                g, p.device_base[q] + device * g.device_pitch, p.host_base[q] + host * g.host_pitch,
                (each - 1) * g.device_step + (pages - 1) * device_pitch + g.width,
                (each - 1) * g.host_step + (pages - 1) * host_pitch + g.width,
            ):
                return 0
        for part in range(g.depth):
            q = g.first + part * each
            self.push_cube(
                w, p.device_base[q] + device * g.device_pitch, device_pitch, device_rows,
                p.host_base[q] + host * g.host_pitch, host_pitch, host_rows, g.width, pages, each,
            )
        return 1

    cdef bint meets_seam(self, const Group *g, uint64_t device, uint64_t host,
                         uint64_t device_extent, uint64_t host_extent) noexcept nogil:
        return g.seamed and (
            seam_after(self.p.device_seam, self.p.device_seams, device) - device < device_extent
            or seam_after(self.p.host_seam, self.p.host_seams, host) - host < host_extent
        )

    cdef int put_copy(self, Workspace w, bint seamed, uint64_t device, uint64_t host,
                      uint64_t size) except -1 nogil:
        cdef uint64_t part, room
        while size:
            part = size
            if seamed:
                room = seam_after(self.p.device_seam, self.p.device_seams, device) - device
                if part > room:
                    part = room
                room = seam_after(self.p.host_seam, self.p.host_seams, host) - host
                if part > room:
                    part = room
            if self.mode == STRIDED:
                if part > LONGEST_LINE:
                    part = LONGEST_LINE
                self.push_rows(w, device, part, host, part, part, 1)
            else:
                if w.copies == w.copy_room:
                    w.grow_copies(1)
                w.dst[w.copies] = host if self.side else device
                w.src[w.copies] = device if self.side else host
                w.size[w.copies] = part
                w.copies += 1
            device += part
            host += part
            size -= part
        return 0

    cdef int put_rows(self, Workspace w, bint seamed, uint64_t device, uint64_t device_pitch,
                      uint64_t host, uint64_t host_pitch, uint64_t width,
                      uint64_t rows) except -1 nogil:
        cdef uint64_t fit, other
        if not seamed:
            return self.push_rows(w, device, device_pitch, host, host_pitch, width, rows)
        while rows:
            fit = rows_before(
                seam_after(self.p.device_seam, self.p.device_seams, device) - device,
                device_pitch, width,
            )
            other = rows_before(
                seam_after(self.p.host_seam, self.p.host_seams, host) - host, host_pitch, width
            )
            if fit > other:
                fit = other
            if fit > rows:
                fit = rows
            if fit > 1:
                self.push_rows(w, device, device_pitch, host, host_pitch, width, fit)
            else:
                # A row across the seam, or alone before it.
                fit = 1
                self.put_copy(w, True, device, host, width)
            device += fit * device_pitch
            host += fit * host_pitch
            rows -= fit
        return 0

    cdef int push_cube(self, Workspace w, uint64_t device, uint64_t device_pitch,
                       uint64_t device_rows, uint64_t host, uint64_t host_pitch,
                       uint64_t host_rows, uint64_t width, uint64_t height,
                       uint64_t depth) except -1 nogil:
        cdef uint64_t *op
        if w.cubic == w.cubic_room:
            w.grow_cubes(1)
        op = w.cube + 9 * w.cubic
        op[0] = host if self.side else device
        op[1] = host_pitch if self.side else device_pitch
        op[2] = host_rows if self.side else device_rows
        op[3] = device if self.side else host
        op[4] = device_pitch if self.side else host_pitch
        op[5] = device_rows if self.side else host_rows
        op[6] = width
        op[7] = height
        op[8] = depth
        w.cubic += 1
        return 0

    cdef int push_rows(self, Workspace w, uint64_t device, uint64_t device_pitch, uint64_t host,
                       uint64_t host_pitch, uint64_t width, uint64_t rows) except -1 nogil:
        cdef uint64_t *op
        if w.strided == w.strided_room:
            w.grow_strided(1)
        op = w.op + 6 * w.strided
        op[0] = host if self.side else device
        op[1] = host_pitch if self.side else device_pitch
        op[2] = device if self.side else host
        op[3] = device_pitch if self.side else host_pitch
        op[4] = width
        op[5] = rows
        w.strided += 1
        return 0


cdef int want(bint *wanted, object method, bint batch) except -1:
    # The modes that a method may choose from.
    cdef Py_ssize_t m
    cdef bint every = method == "auto"
    for m in range(MODES):
        wanted[m] = every and (batch or (m != BATCH and m != STRIDED_BATCH))
    if every:
        return 0
    if method == "batch":
        wanted[BATCH] = True
    elif method == "strided":
        wanted[STRIDED] = True
    elif method == "loop":
        wanted[LOOP] = True
    else:
        raise ValueError(f"method is {method!r}: it is 'auto', 'batch', 'strided' or 'loop'")
    return 0


cdef inline uint64_t seam_after(const uint64_t *seam, Py_ssize_t seams,
                                uint64_t address) noexcept nogil:
    # The first seam above an address.
    cdef Py_ssize_t low = 0, high = seams, middle
    while low < high:
        middle = (low + high) >> 1
        if seam[middle] > address:
            high = middle
        else:
            low = middle + 1
    return seam[low] if low < seams else <uint64_t>-1


cdef inline uint64_t rows_before(uint64_t room, uint64_t pitch, uint64_t width) noexcept nogil:
    return (room - width) // pitch + 1 if room >= width else 0


cdef inline bint doubles_to(Py_ssize_t first, Py_ssize_t size) noexcept nogil:
    # Whether calls that double reach the full size exactly: pieces end between calls then.
    while first <= size // 2:
        first *= 2
    return first == size


cdef inline double calls_of(double copies, int mode, Py_ssize_t size,
                            Py_ssize_t first) noexcept nogil:
    cdef Py_ssize_t done = 0, calls = 0
    if mode != BATCH and mode != STRIDED_BATCH:
        return copies
    if first:
        while done < size and done < copies:
            done += first if done == 0 else done
            calls += 1
    if done < copies:
        calls += (<Py_ssize_t>copies - done + size - 1) // size
    return <double>calls


cdef inline double last_of(double copies, Py_ssize_t size, Py_ssize_t first) noexcept nogil:
    # Copies of the last one of calls that grow.
    cdef Py_ssize_t done = 0, count = <Py_ssize_t>copies
    while done < size:
        if count <= (done if done else first) + done:
            return <double>(count - done)
        done += first if done == 0 else done
    return <double>((count - done - 1) % size + 1)


# What `_submit` takes of a transfer, without a Python call.

cdef object begin_transfer(object prepared, object device_pages, object host_pages, bint load):
    cdef Prepared ready = prepared
    return ready.begin_now(device_pages, host_pages, load)


cdef bint choose_now(object transfer, object method, bint batch, uint64_t stream) except -1:
    # Choose as `Transfer.decide_now` does. Whether it is neither batches nor strided copies alone.
    cdef Transfer t = transfer
    t.choose(method, batch, stream)
    return t.mode != BATCH and t.mode != STRIDED


cdef Step next_step(object transfer, Copies *copies) except? END:
    cdef Transfer t = transfer
    cdef Step step
    if copies.took < 0:
        t.untimed = True
    t.took += copies.took
    copies.took = 0
    step = t.step()
    if step == COPIES:
        copies.dsts, copies.srcs = t.workspace.dst, t.workspace.src
        copies.sizes = NULL if t.same_size else t.workspace.size
        copies.same, copies.count = t.same_size, t.given
        copies.batch_size, copies.first_size = t.batch_size, t.first_size
        # The last piece may be too small for several threads.
        copies.threads = t.threads
        if t.given < TOGETHER_FROM and t.threads > 1:
            copies.threads = 1
            t.apart += t.given
        copies.batched = t.batched()
    return step


cdef object arrays_of(object transfer, Step step):
    cdef Transfer t = transfer
    return t.arrays(step)


def none_wrong(const uint64_t[::1] values not None, bint zeros):
    """Whether every number is below 2**63, and none is 0 unless `zeros` allows it."""
    cdef Py_ssize_t i
    cdef uint64_t bits = 0
    # No way out of the loop and no comparison in it: the compiler takes several at a time.
    if zeros:
        for i in range(values.shape[0]):
            bits |= values[i]
    else:
        for i in range(values.shape[0]):
            bits |= values[i] | (values[i] - 1)
    return bits >> 63 == 0
