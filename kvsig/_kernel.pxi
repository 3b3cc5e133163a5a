# The runner of path "kernel", included by _core.pyx: what a launch needs in device memory, and the
# launch itself. csrc/page_copy.cu says what the kernel reads.

from libc.stdlib cimport calloc, realloc

include "_page_copy.pxi"

cdef extern from "page_copy.cu" nogil:
    enum:
        KVSIG_DEVICE
        KVSIG_HOST
        KVSIG_FEW
        KVSIG_LANES
        KVSIG_CHUNKS
        KVSIG_THIN_CHUNKS
        KVSIG_THREADS
    struct kvsig_plane:
        uint64_t base[2]
        uint64_t pitch[2]
        uint64_t row_pitch[2]
        uint64_t inverse
        unsigned int units
        unsigned int rows
    struct kvsig_wrong:
        unsigned int state
        unsigned int side
        uint64_t position
        long long value
    struct kvsig_page_copy:
        const kvsig_plane *planes
        const void *pages[2]
        uint64_t limit[2]
        unsigned int *counts
        unsigned int *flags
        kvsig_wrong *wrong
        unsigned int page_count
        unsigned int plane_count
        unsigned int layer_planes
        unsigned int regular
        unsigned int source
        unsigned int unit
        unsigned int number[2]
        unsigned int value
        unsigned int pace
        unsigned int first_page
        unsigned int list_count
        int few[2][256]
    unsigned int kvsig_tiles(const kvsig_plane *plane, unsigned int pages, unsigned int chunks)

cdef enum:
    # Up to here blocks of one warp: they start beside whatever runs, but slow it down while they do.
    THIN_BYTES = 8 << 20
    # No cluster is larger on every device that has clusters.
    LARGEST_CLUSTER = 8
    # Pageable memory of up to 64 KiB, so many page numbers, is read before cudaMemcpyAsync returns,
    # and never waits for the stream.
    STAGED_NUMBERS = 16 << 10
    # Host pages in any order within such windows are found as fast as neighbours.
    WINDOW_SHIFT = 27
    # A launch of pages in that order: long enough that what is between two launches is nothing.
    PART_BYTES = 16 << 20

cdef bint recorded_now(uint64_t stream):
    cdef int status = 0
    if stream <= 1 or slots[SLOT_cudaStreamIsCapturing].variant < 0:
        return False
    if cudaStreamIsCapturing(stream=<void *>stream, pCaptureStatus=<int *>&status) != 0:
        _clear()
        return False
    return status != cudaStreamCaptureStatusNone


def stream_recorded(uint64_t stream):
    """Whether a stream is being captured; False where CUDA does not say."""
    return recorded_now(stream)


cdef uint64_t stream_number(uint64_t stream):
    # Handles come again once a stream has been destroyed; numbers do not.
    cdef unsigned long long number = 0
    if slots[SLOT_cudaStreamGetId].variant < 0:
        return stream
    if cudaStreamGetId(hStream=<void *>stream, streamId=&number) != 0:
        _clear()
        return stream
    return number


cdef _check(int code, name):
    if code != 0:
        raise _error(code, name)


cdef void *_device_memory(size_t size) except NULL:
    cdef void *found = NULL
    _check(cudaMalloc(devPtr=&found, size=size), "cudaMalloc")
    return found


cdef class _OwnStream:
    """A stream that nobody else uses: it can be waited for where nothing else must be."""
    cdef void *handle

    def __cinit__(self):
        _check(
            cudaStreamCreateWithFlags(pStream=&self.handle, flags=1), "cudaStreamCreateWithFlags"
        )

    cdef wait(self):
        _check(cudaStreamSynchronize(stream=self.handle), "cudaStreamSynchronize")

    def __dealloc__(self):
        if self.handle != NULL:
            cudaStreamDestroy(stream=self.handle)


cdef class KernelPlanes:
    """The planes of a cache in device memory, layer by layer.

    Parameters
    ----------
    table : ndarray of uint8, shape (planes, 64)
        From `kvsig.kernel.table`: the planes of layer 0, then of layer 1, and so on.
    layer_planes : int
        Planes of each layer.
    unit : int
        Bytes of a unit of the table.
    """

    def __cinit__(
        self, const unsigned char[:, ::1] table not None, unsigned int layer_planes,
        unsigned int unit,
    ):
        cdef size_t size = table.shape[0] * sizeof(kvsig_plane)
        cdef _OwnStream stream
        if table.shape[1] != sizeof(kvsig_plane) or not size or table.shape[0] % layer_planes:
            raise ValueError("a table of planes is a number of whole layers, 64 bytes a plane")
        self.planes, self.layer_planes, self.unit = table.shape[0], layer_planes, unit
        self.host = malloc(size)
        if self.host == NULL:
            raise MemoryError()
        memcpy(self.host, &table[0, 0], size)
        self.regular = self.find_regular()
        self.device = _device_memory(size)
        stream = _OwnStream()
        _check(
            cudaMemcpyAsync(dst=self.device, src=self.host, count=size, stream=stream.handle),
            "cudaMemcpyAsync",
        )
        stream.wait()

    cdef bint find_regular(self):
        cdef unsigned int i
        cdef kvsig_plane *host = <kvsig_plane *>self.host
        cdef kvsig_plane *one
        cdef kvsig_plane *same
        for i in range(self.layer_planes, self.planes):
            one, same = &host[i], &host[i % self.layer_planes]
            if one.units != same.units or one.rows != same.rows:
                return False
        return True

    def __dealloc__(self):
        free(self.host)
        if self.device != NULL and not _forked_away():
            cudaFree(devPtr=self.device)

    cdef uint64_t page_bytes(self, unsigned int first, unsigned int layers) noexcept nogil:
        """Bytes of one page over some layers."""
        cdef const kvsig_plane *host = <const kvsig_plane *>self.host
        cdef uint64_t total = 0
        cdef unsigned int i
        for i in range(first * self.layer_planes, (first + layers) * self.layer_planes):
            total += <uint64_t>host[i].units * host[i].rows
        return total * self.unit


cdef class KernelLane:
    """What the launches of one cache on one stream share, in the order of that stream.

    Parameters
    ----------
    layers : int
        Most layers of a launch.
    stream : int
        Handle of the stream.
    """

    def __cinit__(self, unsigned int layers, uint64_t stream):
        cdef void *found = NULL
        cdef void *mapped = NULL
        cdef _OwnStream own
        self.layers, self.stream = layers, stream
        self.outgrown, self.lock = [], threading.Lock()
        _check(cudaHostAlloc(pHost=&found, size=sizeof(kvsig_wrong)), "cudaHostAlloc")
        self.wrong = found
        memset(self.wrong, 0, sizeof(kvsig_wrong))
        _check(
            cudaHostGetDevicePointer(pDevice=&mapped, pHost=found),
            "cudaHostGetDevicePointer",
        )
        self.device_wrong = mapped
        self.counts = <unsigned int *>_device_memory(8 * <size_t>layers)
        self.flags = self.counts + layers
        own = _OwnStream()
        _check(
            cudaMemsetAsync(
                devPtr=self.counts, value=0, count=8 * <size_t>layers, stream=own.handle
            ),
            "cudaMemsetAsync",
        )
        own.wait()

    def __dealloc__(self):
        free(self.narrow)
        if _forked_away():
            return
        if self.counts != NULL:
            cudaFree(devPtr=self.counts)
        if self.numbers != NULL:
            cudaFree(devPtr=self.numbers)
        for old in self.outgrown or ():
            cudaFree(devPtr=<void *><size_t>old)
        if self.wrong != NULL:
            cudaFreeHost(ptr=self.wrong)

    cdef reserve(self, size_t count, bint on_device):
        """Have room for some page numbers, in host memory and on the device."""
        cdef size_t room = max(count, 2 * self.room)
        cdef int *narrow
        cdef int *numbers
        if count > self.narrow_room:
            narrow = <int *>realloc(self.narrow, room * sizeof(int))
            if narrow == NULL:
                raise MemoryError()
            self.narrow, self.narrow_room = narrow, room
        if on_device and count > self.room:
            numbers = <int *>_device_memory(room * sizeof(int))
            # It may still be read by launches in flight; freeing it would wait for them.
            if self.numbers != NULL:
                self.outgrown.append(<size_t>self.numbers)
            self.numbers, self.room = numbers, room

    cpdef object take_wrong(self):
        """What a launch found wrong since the last time.

        Returns
        -------
        (side, position, value) or None
            0 for a device page number or 1 for a host one, its place in the list, and what it is.
        """
        cdef kvsig_wrong *wrong = <kvsig_wrong *>self.wrong
        if not (<volatile unsigned int *>&wrong.state)[0]:
            return None
        found = wrong.side, wrong.position, wrong.value
        wrong.state = 0
        return found

    cpdef object wait(self, unsigned int layer, unsigned int value, uint64_t stream):
        """Make a stream wait until a layer of a launch is there.

        Parameters
        ----------
        layer : int
            Counted from the first of the launch.
        value : int
            What the launch answered.
        stream : int
            Handle of the stream that is to wait.
        """
        cdef int code
        if layer >= self.layers:
            raise ValueError(f"layer {layer} is not one of {self.layers}")
        with nogil:
            code = cuStreamWaitValue32(
                stream=<void *>stream, addr=<unsigned long long>(self.flags + layer), value=value,
                flags=CU_STREAM_WAIT_VALUE_GEQ,
            )
        _check(code, "cuStreamWaitValue32")

    cpdef object tell(self, const uint64_t[::1] events, unsigned int value, uint64_t stream):
        """Record an event for each layer behind a wait for it.

        Parameters
        ----------
        events : ndarray of uint64
            Handles, for layer 0 of the launch and those behind it.
        value : int
            What the launch answered.
        stream : int
            Handle of the stream that waits, and that the events are recorded on.
        """
        cdef const uint64_t *event = NULL
        cdef Py_ssize_t i
        cdef int code = 0, recorded = 0
        if not 0 < events.shape[0] <= self.layers:
            raise ValueError(f"{events.shape[0]} events for {self.layers} layers")
        event = &events[0]
        with nogil:
            for i in range(events.shape[0]):
                code = cuStreamWaitValue32(
                    stream=<void *>stream, addr=<unsigned long long>(self.flags + i), value=value,
                    flags=CU_STREAM_WAIT_VALUE_GEQ,
                )
                if code != 0:
                    break
                recorded = cudaEventRecord(event=<void *>event[i], stream=<void *>stream)
                if recorded != 0:
                    break
        _check(code, "cuStreamWaitValue32")
        _check(recorded, "cudaEventRecord")


cdef int _by_window(
    const KernelRequest *request, int *device_pages, int *host_pages
) noexcept nogil:
    """Put pages into the order of windows of host memory; 0, or -1 for no memory.

    A random page of a large pool costs the look-up of its address, which is forgotten before the
    next page of the same window comes by.
    """
    cdef const int64_t *near = <const int64_t *>request.pages[KVSIG_DEVICE]
    cdef const int64_t *far = <const int64_t *>request.pages[KVSIG_HOST]
    cdef uint64_t pitch = request.window_pitch
    cdef size_t windows = ((request.limit[KVSIG_HOST] * pitch) >> WINDOW_SHIFT) + 2
    cdef size_t i, place
    cdef size_t *next_place = <size_t *>calloc(windows, sizeof(size_t))
    if next_place == NULL:
        return -1
    for i in range(request.count):
        next_place[((<uint64_t>far[i] * pitch) >> WINDOW_SHIFT) + 1] += 1
    for i in range(1, windows):
        next_place[i] += next_place[i - 1]
    for i in range(request.count):
        place = next_place[(<uint64_t>far[i] * pitch) >> WINDOW_SHIFT]
        next_place[(<uint64_t>far[i] * pitch) >> WINDOW_SHIFT] += 1
        device_pages[place], host_pages[place] = <int>near[i], <int>far[i]
    free(next_place)
    return 0


cdef int _narrow(const KernelRequest *request, bint windowed, int *into) noexcept nogil:
    """Write page numbers that are in host memory as the kernel reads them, one side after the
    other; 0, or -1 for no memory."""
    cdef const int64_t *numbers
    cdef size_t i
    cdef int side
    if windowed:
        return _by_window(request, into, into + request.count)
    for side in range(2):
        numbers = <const int64_t *>request.pages[side]
        if not request.number[side]:
            for i in range(request.count):
                into[side * request.count + i] = <int>numbers[i]
    return 0


cdef int _place_numbers(
    kvsig_page_copy *given, KernelLane lane, const KernelRequest *request, size_t first
) noexcept nogil:
    """Page numbers from the first one of a launch on: where they are, into the parameters if they
    are few, else ahead of the launch into device memory; a code."""
    cdef size_t count = given.page_count, start, done, size
    cdef int side, code = 0
    for side in range(2):
        start = side * request.count + first
        if request.number[side]:
            given.pages[side] = <const char *>request.pages[side] + first * request.number[side]
        elif count <= KVSIG_FEW:
            given.pages[side] = NULL
            memcpy(given.few[side], lane.narrow + start, count * sizeof(int))
        else:
            given.pages[side] = lane.numbers + start
            done = 0
            while done < count and code == 0:
                size = min(<size_t>STAGED_NUMBERS, count - done)
                code = cudaMemcpyAsync(
                    dst=lane.numbers + start + done, src=lane.narrow + start + done,
                    count=size * sizeof(int), stream=<void *>lane.stream,
                )
                done += size
    return code


cdef inline unsigned int _cluster_of(unsigned int blocks) noexcept nogil:
    """Blocks of a cluster: as many as go into the number of blocks."""
    cdef unsigned int size = min(blocks, <unsigned int>LARGEST_CLUSTER)
    while blocks % size:
        size -= 1
    return size


cdef int _launch(
    KernelCode code, kvsig_page_copy *given, const kvsig_plane *planes, uint64_t size, unsigned int sms,
    double rate, void *stream,
) noexcept nogil:
    """Choose the shape and launch; a code."""
    cdef CUlaunchConfig config
    cdef CUlaunchAttribute attribute
    cdef void *params[1]
    cdef unsigned int blocks, threads, i
    cdef uint64_t tiles = 0
    cdef void *function = code.thin
    cdef bint cluster = False
    if size <= THIN_BYTES:
        for i in range(given.plane_count):
            tiles += kvsig_tiles(&planes[i], given.page_count, KVSIG_THIN_CHUNKS)
            if tiles >= code.multiprocessors:
                break
        blocks, threads = <unsigned int>min(tiles, <uint64_t>code.multiprocessors), KVSIG_LANES
    else:
        function, blocks, threads = code.wide, sms, KVSIG_THREADS
        cluster = code.clusters and sms > 1
        if rate > 0:
            # The slowest that can be said is four seconds from tile to tile.
            given.pace = <unsigned int>min(
                blocks * threads * KVSIG_CHUNKS * given.unit / rate, <double>0xFFFFFFFF
            )
    memset(&config, 0, sizeof(config))
    config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.hStream = stream
    if cluster:
        memset(&attribute, 0, sizeof(attribute))
        attribute.id_ = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        (<unsigned int *>attribute.value)[0] = _cluster_of(blocks)
        (<unsigned int *>attribute.value)[1] = 1
        (<unsigned int *>attribute.value)[2] = 1
        config.attrs, config.numAttrs = &attribute, 1
    params[0] = given
    return cuLaunchKernelEx(config=&config, f=function, kernelParams=params)


cdef class KernelCode:
    """The compiled kernel as launches need it; `kernel` is a `kvsig.kernel.Kernel`."""

    def __cinit__(self, kernel):
        self.kernel = kernel
        self.wide, self.thin = <void *><size_t>kernel.wide, <void *><size_t>kernel.thin
        self.multiprocessors, self.clusters = kernel.multiprocessors, kernel.clusters

    cdef Report launch(self, KernelPlanes planes, KernelLane lane, const KernelRequest *request):
        """Queue one request whose arguments are known to be good; at least one page.

        Notes
        -----
        Page numbers in host memory are read before this returns. A recorded stream gets a launch
        for every 256 pages, whose numbers it keeps; without flags then.
        """
        cdef kvsig_page_copy given
        cdef uint64_t page = planes.page_bytes(request.first_layer, request.layers)
        cdef const kvsig_plane *table = <const kvsig_plane *>planes.host
        cdef size_t first = 0, each = request.count, calls = 0
        cdef bint near = not (request.number[0] and request.number[1])
        cdef bint windowed = False
        cdef int code = 0, sent = 0
        global _used
        _ensure()
        if planes.unit != self.kernel.unit:
            raise ValueError("the table's unit is not the kernel's")
        _used = True
        _describe(&given, planes, lane, request)
        table += request.first_layer * planes.layer_planes
        if near and request.count > KVSIG_FEW:
            windowed = request.window_pitch and not (request.number[0] or request.number[1])
            if request.recorded:
                each = KVSIG_FEW
            elif given.wrong == NULL and not request.flags:
                # The first part is on its way while the numbers of the next are copied. In the
                # order of windows a part is all layers of some windows: looking up their addresses
                # is paid for once.
                each = max(
                    <size_t>(KVSIG_FEW if windowed else STAGED_NUMBERS),
                    <size_t>(PART_BYTES // page),
                )
        with lane.lock:
            if near:
                lane.reserve(2 * request.count, each > KVSIG_FEW)
            if request.flags:
                lane.value += 1
                given.value = lane.value
            with nogil:
                if near and _narrow(request, windowed, lane.narrow) != 0:
                    sent = -1
                while sent == 0 and code == 0 and first < request.count:
                    given.page_count = <unsigned int>min(each, request.count - first)
                    given.first_page = <unsigned int>first
                    sent = _place_numbers(&given, lane, request, first)
                    if sent == 0:
                        code = _launch(
                            self, &given, table, request.count * page, request.sms, request.rate,
                            <void *>lane.stream,
                        )
                    first += each
                    calls += 1
        if sent == -1:
            raise MemoryError()
        _check(sent, "cudaMemcpyAsync")
        _check(code, "cuLaunchKernelEx")
        return Report(
            "kernel", None, request.count * given.plane_count, calls, request.count * page
        )


def launch_nothing(uint64_t wide, uint64_t thin):
    """Launch both kernels once for no page, and wait for them.

    What the driver does at the first launch of a kernel takes longer than most transfers.

    Parameters
    ----------
    wide, thin : int
        Handles of the kernels.
    """
    cdef kvsig_page_copy given
    cdef CUlaunchConfig config
    cdef void *params[1]
    cdef _OwnStream stream = _OwnStream()
    # What every launch asks of its stream takes longer the first time, too.
    recorded_now(<uint64_t>stream.handle)
    stream_number(<uint64_t>stream.handle)
    memset(&given, 0, sizeof(given))
    memset(&config, 0, sizeof(config))
    given.layer_planes = 1
    config.gridDimX = config.gridDimY = config.gridDimZ = 1
    config.blockDimX, config.blockDimY, config.blockDimZ = KVSIG_LANES, 1, 1
    config.hStream, params[0] = stream.handle, &given
    for function in (wide, thin):
        _check(
            cuLaunchKernelEx(config=&config, f=<void *><size_t>function, kernelParams=params),
            "cuLaunchKernelEx",
        )
    stream.wait()


cdef void _describe(
    kvsig_page_copy *given, KernelPlanes planes, KernelLane lane, const KernelRequest *request
) noexcept:
    """Everything but page numbers that are in host memory, the flag's value and the pace."""
    cdef int side
    memset(given, 0, sizeof(given[0]) - sizeof(given.few))
    given.planes = (
        <kvsig_plane *>planes.device + <size_t>request.first_layer * planes.layer_planes
    )
    given.page_count = given.list_count = <unsigned int>request.count
    given.plane_count = request.layers * planes.layer_planes
    given.layer_planes, given.regular = planes.layer_planes, planes.regular
    given.source, given.unit = request.source, planes.unit
    if request.flags:
        given.counts, given.flags = lane.counts, lane.flags
    for side in range(2):
        given.limit[side] = request.limit[side]
        given.number[side] = request.number[side] or 4
        if request.number[side]:
            given.pages[side] = request.pages[side]
            given.wrong = <kvsig_wrong *>lane.device_wrong


cdef bint _forked_away() noexcept:
    """Whether this process is a child, which must not touch its parent's device memory."""
    return os.getpid() != _kernel_process


cdef object _kernel_process = os.getpid()


def launch_kernel(
    KernelCode code not None, KernelPlanes planes not None, KernelLane lane not None,
    device_pages, host_pages, limits, unsigned int source, first_layer=0, layers=None,
    unsigned int sms=4, double rate=0, uint64_t window_pitch=0, bint flags=False,
    bint recorded=False,
):
    """Launch the page-copy kernel on the stream of a lane.

    Parameters
    ----------
    code, planes, lane
        What to launch, on what, and where.
    device_pages, host_pages : ndarray of int64, or (address, count, bytes of a number)
        Page numbers in host memory, or in device memory.
    limits : (int, int)
        Pages of the device and of the host.
    source : int
        The side to read: 0 the device, 1 the host.
    first_layer, layers : int
        Which layers of the table.
    sms : int
        Blocks of a long transfer.
    rate : float
        Bytes a nanosecond at most, of a long transfer; 0: as fast as it goes.
    window_pitch : int
        Host bytes from page to page, to order pages by their windows of host memory; 0: not.
    flags : bool
        Whether each layer raises its flag, for `KernelLane.wait`.
    recorded : bool
        Whether the stream is being captured.

    Returns
    -------
    (Report, int)
        And the value for `KernelLane.wait`.
    """
    cdef KernelRequest request
    cdef const int64_t[::1] near
    cdef size_t counts[2]
    cdef int side
    memset(&request, 0, sizeof(request))
    for side, pages in enumerate((device_pages, host_pages)):
        if isinstance(pages, tuple):
            request.pages[side] = <const void *><size_t>pages[0]
            counts[side], request.number[side] = pages[1], pages[2]
        else:
            near = pages
            counts[side] = near.shape[0]
            request.pages[side] = &near[0] if near.shape[0] else NULL
    if counts[0] != counts[1] or not counts[0]:
        raise ValueError(f"{counts[0]} device pages and {counts[1]} host pages")
    request.count = counts[0]
    request.limit[0], request.limit[1] = limits
    request.first_layer = first_layer
    request.layers = planes.planes // planes.layer_planes - first_layer if layers is None else layers
    request.source, request.sms, request.rate = source, sms, rate
    request.window_pitch, request.flags, request.recorded = window_pitch, flags, recorded
    report = code.launch(planes, lane, &request)
    return report, lane.value
