/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The behaviour of the emulated CUDA runtime: device memory is host memory, streams are queues with
 * a thread each, and work is done when its turn comes, never when it is submitted. It answers as
 * real runtimes were seen to answer, refusals included, and is stricter where strictness finds
 * mistakes: the copies of a batch run last to first, and a source that may be read early is.
 *
 * Locks: `queues` guards streams, events, captures and graphs, `memory` the table of blocks,
 * `control` faults, stubs, delays and recorded calls. No two are ever held at once.
 */
#define _GNU_SOURCE
#include "emulated.h"

#include <dlfcn.h>
#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    INVALID_PITCH = 12,
    INVALID_DIRECTION = 21,
    INSUFFICIENT_DRIVER = 35,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_HANDLE = 400,
    ILLEGAL_STATE = 401,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ALREADY_REGISTERED = 712,
    NOT_REGISTERED = 713,
    NOT_SUPPORTED = 801,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
    CAPTURE_MERGE = 902,
    CAPTURE_UNMATCHED = 903,
    CAPTURE_UNJOINED = 904,
    CAPTURE_ISOLATION = 905,
    CAPTURE_IMPLICIT = 906,
    CAPTURED_EVENT = 907,
    CAPTURE_WRONG_THREAD = 908,
};

static const struct {
    int code;
    const char *name, *text;
} error_table[] = {
    {0, "cudaSuccess", "no error"},
    {1, "cudaErrorInvalidValue", "invalid argument"},
    {2, "cudaErrorMemoryAllocation", "out of memory"},
    {3, "cudaErrorInitializationError", "initialization error"},
    {4, "cudaErrorCudartUnloading", "driver shutting down"},
    {12, "cudaErrorInvalidPitchValue", "invalid pitch argument"},
    {16, "cudaErrorInvalidHostPointer", "invalid host pointer"},
    {17, "cudaErrorInvalidDevicePointer", "invalid device pointer"},
    {21, "cudaErrorInvalidMemcpyDirection", "invalid copy direction for memcpy"},
    {34, "cudaErrorStubLibrary", "CUDA driver is a stub library"},
    {35, "cudaErrorInsufficientDriver",
     "CUDA driver version is insufficient for CUDA runtime version"},
    {36, "cudaErrorCallRequiresNewerDriver",
     "API call is not supported in the installed CUDA driver"},
    {46, "cudaErrorDevicesUnavailable", "CUDA-capable device(s) is/are busy or unavailable"},
    {100, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {101, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {201, "cudaErrorDeviceUninitialized", "invalid device context"},
    {214, "cudaErrorECCUncorrectable", "uncorrectable ECC error encountered"},
    {400, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {401, "cudaErrorIllegalState", "the operation cannot be performed in the present state"},
    {500, "cudaErrorSymbolNotFound", "named symbol not found"},
    {600, "cudaErrorNotReady", "device not ready"},
    {700, "cudaErrorIllegalAddress", "an illegal memory access was encountered"},
    {702, "cudaErrorLaunchTimeout", "the launch timed out and was terminated"},
    {709, "cudaErrorContextIsDestroyed", "context is destroyed"},
    {712, "cudaErrorHostMemoryAlreadyRegistered",
     "part or all of the requested memory range is already mapped"},
    {713, "cudaErrorHostMemoryNotRegistered",
     "pointer does not correspond to a registered memory region"},
    {716, "cudaErrorMisalignedAddress", "misaligned address"},
    {719, "cudaErrorLaunchFailure", "unspecified launch failure"},
    {800, "cudaErrorNotPermitted", "operation not permitted"},
    {801, "cudaErrorNotSupported", "operation not supported"},
    {802, "cudaErrorSystemNotReady", "system not yet initialized"},
    {803, "cudaErrorSystemDriverMismatch",
     "system has unsupported display driver / cuda driver combination"},
    {900, "cudaErrorStreamCaptureUnsupported", "operation not permitted when stream is capturing"},
    {901, "cudaErrorStreamCaptureInvalidated",
     "operation failed due to a previous error during capture"},
    {902, "cudaErrorStreamCaptureMerge",
     "operation would result in a merge of separate capture sequences"},
    {903, "cudaErrorStreamCaptureUnmatched",
     "capture was not ended in the same stream as it began"},
    {904, "cudaErrorStreamCaptureUnjoined", "capturing stream has unjoined work"},
    {905, "cudaErrorStreamCaptureIsolation",
     "dependency created on uncaptured work in another stream"},
    {906, "cudaErrorStreamCaptureImplicit",
     "operation would make the legacy stream depend on a capturing blocking stream"},
    {907, "cudaErrorCapturedEvent",
     "operation not permitted on an event last recorded in a capturing stream"},
    {908, "cudaErrorStreamCaptureWrongThread",
     "attempt to terminate a thread-local capture sequence from another thread"},
    {999, "cudaErrorUnknown", "unknown error"},
};

enum { MAX_DEVICES = 16, MAX_CALLS = 1 << 16, MAX_ATTRIBUTES = 256 };
enum { CAPTURE_GLOBAL = 0, CAPTURE_THREAD_LOCAL = 1, CAPTURE_RELAXED = 2 };
enum { ORDER_STREAM = 1, ORDER_DURING_CALL = 2, ORDER_ANY = 3 };
enum { MEMORY_UNREGISTERED = 0, MEMORY_HOST = 1, MEMORY_DEVICE = 2, MEMORY_MANAGED = 3 };

#define LEGACY_STREAM ((void *)(uintptr_t)1)
#define PER_THREAD_STREAM ((void *)(uintptr_t)2)
#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

static pthread_mutex_t queues = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t memory = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t control = PTHREAD_MUTEX_INITIALIZER;

static atomic_int runtime_version, driver_version, device_count = 1;
static _Thread_local int current_device, last_error, capture_mode = CAPTURE_GLOBAL;

static atomic_llong calls_made, operations_done, copies_done, bytes_done, batches_taken;

static void *must(void *pointer)
{
    if (!pointer) {
        fputs("kvsig emulated runtime: out of memory\n", stderr);
        abort();
    }
    return pointer;
}

/* ---- Text that grows --------------------------------------------------------------------- */

struct text {
    char *data;
    size_t length, room;
};

static void text_bytes(struct text *text, const char *data, size_t length)
{
    if (text->length + length + 1 > text->room) {
        text->room = (text->length + length + 1) * 2;
        text->data = must(realloc(text->data, text->room));
    }
    memcpy(text->data + text->length, data, length);
    text->length += length;
    text->data[text->length] = 0;
}

__attribute__((format(printf, 2, 3))) static void text_add(struct text *text, const char *format,
                                                           ...)
{
    char buffer[128];
    va_list args;
    va_start(args, format);
    int length = vsnprintf(buffer, sizeof buffer, format, args);
    va_end(args);
    if (length > 0)
        text_bytes(text, buffer,
                   (size_t)length < sizeof buffer ? (size_t)length : sizeof buffer - 1);
}

static void text_string(struct text *text, const char *string)
{
    text_bytes(text, "\"", 1);
    for (size_t i = 0; string && string[i] && i < 1024; i++) {
        unsigned char c = (unsigned char)string[i];
        if (c == '"' || c == '\\')
            text_add(text, "\\%c", c);
        else if (c < 0x20 || c >= 0x7f)
            text_add(text, "\\u%04x", c);
        else
            text_bytes(text, &string[i], 1);
    }
    text_bytes(text, "\"", 1);
}

static void text_hex(struct text *text, const void *data, size_t size)
{
    text_bytes(text, "\"", 1);
    for (size_t i = 0; i < size; i++)
        text_add(text, "%02x", ((const unsigned char *)data)[i]);
    text_bytes(text, "\"", 1);
}

/* ---- Arguments of a call, by name -------------------------------------------------------- */

struct call {
    const char *function, *symbol, *variant;
    const struct emu_arg *args;
    size_t count;
    int recording;
    struct text observed; /* JSON members: what the arguments point to */
    int fault_error;      /* a fault ordered at one copy of a batch */
    long fault_index;
};

static const struct emu_arg *find_arg(const struct call *call, const char *name)
{
    for (size_t i = 0; i < call->count; i++)
        if (strcmp(call->args[i].name, name) == 0)
            return &call->args[i];
    return NULL;
}

static uint64_t arg_u64(const struct call *call, const char *name, uint64_t missing)
{
    const struct emu_arg *arg = find_arg(call, name);
    if (!arg || arg->size > sizeof(uint64_t))
        return missing;
    uint64_t value = 0; /* little-endian, as every machine CUDA runs on */
    memcpy(&value, arg->value, arg->size);
    return value;
}

static int arg_int(const struct call *call, const char *name, int missing)
{
    return (int)arg_u64(call, name, (uint64_t)(int64_t)missing);
}

static void *arg_pointer(const struct call *call, const char *name)
{
    return (void *)(uintptr_t)arg_u64(call, name, 0);
}

/* The first of two names, as some parameters were renamed between releases. */
static void *arg_pointer2(const struct call *call, const char *name, const char *other)
{
    return arg_pointer(call, find_arg(call, name) ? name : other);
}

static void *arg_stream(const struct call *call)
{
    void *stream = arg_pointer2(call, "stream", "hStream");
    size_t length = strlen(call->symbol);
    /* The _ptsz twins mean the calling thread's stream where the others mean the legacy one. */
    if (!stream && length > 5 && strcmp(call->symbol + length - 5, "_ptsz") == 0)
        return PER_THREAD_STREAM;
    return stream;
}

/* ---- Work: what a queue does when its turn comes, shared by queue and graphs -------------- */

struct copy {
    char *dst;
    const char *src;
    size_t size;
};

struct rows { /* the 3-D form; a 2-D copy has one layer */
    char *dst;
    const char *src;
    size_t dst_row, src_row, dst_layer, src_layer, width, height, depth;
};

enum kind { WORK_NOTHING, WORK_COPIES, WORK_ROWS, WORK_SET, WORK_CALL, WORK_FREE, WORK_GRAPH };

struct graph;

struct work {
    enum kind kind;
    int refs; /* guarded by `queues` */
    union {
        struct {
            size_t count;
            char *early; /* sources read at submission, NULL where there are none */
        } copies;
        struct {
            char *dst;
            int value;
            size_t size;
        } set;
        struct {
            void (*function)(void *);
            void *data;
        } call;
        void *block;
        struct graph *graph;
    };
    size_t rows;     /* entries in use, of WORK_ROWS */
    uint64_t list[]; /* struct copy or struct rows, by kind */
};

struct graph {
    unsigned magic;
    int refs;
    size_t count, room;
    struct work **work;
};

struct stream;

struct need { /* wait until STREAM has finished operation SEQ */
    struct stream *stream;
    uint64_t seq;
};

struct operation {
    struct operation *next;
    struct work *work;
    struct event *event; /* stamped with the time when the operation is done */
    uint64_t seq;
    size_t need_count;
    struct need needs[];
};

struct capture {
    int status, mode; /* status: 1 active, 2 invalidated */
    uint64_t id;
    pthread_t thread;
    struct stream *origin;
    struct graph *graph;
};

struct stream {
    struct stream *next;
    int refs, device, priority;
    unsigned flags;
    uint64_t id;
    int legacy, blocking, destroyed, held, started, busy, blocked;
    uint64_t submitted, done;
    struct operation *head, *tail;
    pthread_cond_t wake;
    struct capture *capture;
    uint64_t captured; /* operations captured here */
    uint64_t joined;   /* how many of them another stream of the capture waits for */
};

struct event {
    unsigned magic, flags;
    int refs;
    struct stream *stream; /* last record, NULL before the first */
    uint64_t seq, capture_id, capture_mark;
    int stamped;
    struct timespec time;
};

enum { EVENT_MAGIC = 0x4b564556, GRAPH_MAGIC = 0x4b564752, EXEC_MAGIC = 0x4b564558 };

static pthread_cond_t progress = PTHREAD_COND_INITIALIZER; /* an operation was finished */
static int waiters, stopping, working;
static struct stream *streams;
static struct stream *legacy[MAX_DEVICES];
static uint64_t next_stream_id = 3, next_capture_id = 1;
static pthread_key_t thread_streams_key;
static _Thread_local struct stream **thread_streams;

static struct work *work_new(enum kind kind, size_t copies, size_t rows)
{
    size_t extra = copies * sizeof(struct copy);
    if (rows * sizeof(struct rows) > extra)
        extra = rows * sizeof(struct rows);
    struct work *work = must(malloc(sizeof(struct work) + extra));
    memset(work, 0, sizeof *work);
    work->kind = kind;
    work->refs = 1;
    work->rows = rows;
    if (kind == WORK_COPIES)
        work->copies.count = copies;
    return work;
}

static struct copy *work_copies(struct work *work)
{
    return (struct copy *)(void *)work->list;
}

static struct rows *work_rows(struct work *work)
{
    return (struct rows *)(void *)work->list;
}

static void graph_drop(struct graph *graph);

static void work_drop(struct work *work)
{
    if (!work || --work->refs)
        return;
    if (work->kind == WORK_COPIES)
        free(work->copies.early);
    if (work->kind == WORK_GRAPH)
        graph_drop(work->graph);
    free(work);
}

static struct graph *graph_new(unsigned magic)
{
    struct graph *graph = must(calloc(1, sizeof *graph));
    graph->magic = magic;
    graph->refs = 1;
    return graph;
}

static void graph_drop(struct graph *graph)
{
    if (!graph || --graph->refs)
        return;
    for (size_t i = 0; i < graph->count; i++)
        work_drop(graph->work[i]);
    free(graph->work);
    graph->magic = 0;
    free(graph);
}

static void graph_add(struct graph *graph, struct work *work)
{
    if (graph->count == graph->room) {
        graph->room = graph->room ? graph->room * 2 : 16;
        graph->work = must(realloc(graph->work, graph->room * sizeof *graph->work));
    }
    graph->work[graph->count++] = work;
    work->refs++;
}

static void work_run(struct work *work)
{
    size_t bytes = 0;
    switch (work->kind) {
    case WORK_NOTHING:
        return;
    case WORK_COPIES: {
        /* A batch has no order inside: last to first shows copies that depend on each other. */
        const struct copy *copy = work_copies(work);
        for (size_t i = work->copies.count; i-- > 0;) {
            memmove(copy[i].dst, copy[i].src, copy[i].size);
            bytes += copy[i].size;
        }
        atomic_fetch_add_explicit(&copies_done, (long long)work->copies.count,
                                  memory_order_relaxed);
        break;
    }
    case WORK_ROWS: {
        const struct rows *row = work_rows(work);
        for (size_t i = work->rows; i-- > 0;) {
            for (size_t z = 0; z < row[i].depth; z++)
                for (size_t y = 0; y < row[i].height; y++)
                    memmove(row[i].dst + z * row[i].dst_layer + y * row[i].dst_row,
                            row[i].src + z * row[i].src_layer + y * row[i].src_row, row[i].width);
            bytes += row[i].width * row[i].height * row[i].depth;
        }
        atomic_fetch_add_explicit(&copies_done, (long long)work->rows, memory_order_relaxed);
        break;
    }
    case WORK_SET:
        memset(work->set.dst, work->set.value, work->set.size);
        return;
    case WORK_CALL:
        work->call.function(work->call.data);
        return;
    case WORK_FREE:
        free(work->block);
        return;
    case WORK_GRAPH:
        for (size_t i = 0; i < work->graph->count; i++)
            work_run(work->graph->work[i]);
        return;
    }
    atomic_fetch_add_explicit(&bytes_done, (long long)bytes, memory_order_relaxed);
}

/* ---- Streams ----------------------------------------------------------------------------- */

static void stream_drop(struct stream *stream)
{
    if (--stream->refs)
        return;
    pthread_cond_destroy(&stream->wake);
    free(stream);
}

static void event_drop(struct event *event)
{
    if (!event || --event->refs)
        return;
    if (event->stream)
        stream_drop(event->stream);
    event->magic = 0;
    free(event);
}

static void operation_free(struct operation *operation)
{
    for (size_t i = 0; i < operation->need_count; i++)
        stream_drop(operation->needs[i].stream);
    event_drop(operation->event);
    work_drop(operation->work);
    free(operation);
}

static struct stream *stream_new(int device, unsigned flags, int priority)
{
    struct stream *stream = must(calloc(1, sizeof *stream));
    pthread_cond_init(&stream->wake, NULL);
    stream->refs = 1;
    stream->device = device;
    stream->flags = flags;
    stream->priority = priority;
    stream->blocking = !(flags & 1);
    stream->id = next_stream_id++;
    stream->next = streams;
    streams = stream;
    return stream;
}

static void stream_unlink(struct stream *stream)
{
    struct stream **link = &streams;
    while (*link && *link != stream)
        link = &(*link)->next;
    if (*link)
        *link = stream->next;
    stream_drop(stream);
}

static int stream_pending(const struct stream *stream)
{
    return stream->done != stream->submitted;
}

static int operation_ready(const struct operation *operation)
{
    for (size_t i = 0; i < operation->need_count; i++)
        if (operation->needs[i].stream->done < operation->needs[i].seq)
            return 0;
    return 1;
}

static void wake_blocked(void)
{
    if (waiters)
        pthread_cond_broadcast(&progress);
    for (struct stream *stream = streams; stream; stream = stream->next)
        if (stream->blocked)
            pthread_cond_signal(&stream->wake);
}

static void *stream_worker(void *argument)
{
    struct stream *stream = argument;
    pthread_mutex_lock(&queues);
    for (;;) {
        struct operation *operation = stream->head;
        if (!operation && stream->destroyed)
            break;
        if (!operation || stream->held || stopping || !operation_ready(operation)) {
            stream->blocked = operation != NULL;
            stream->busy = 0;
            pthread_cond_wait(&stream->wake, &queues);
            stream->blocked = 0;
            continue;
        }
        stream->busy = 1;
        stream->head = operation->next;
        if (!stream->head)
            stream->tail = NULL;
        /* A host function may wait for anything, so process exit does not wait for it. */
        int counted = operation->work->kind != WORK_CALL && operation->work->kind != WORK_GRAPH;
        working += counted;
        pthread_mutex_unlock(&queues);
        work_run(operation->work);
        atomic_fetch_add_explicit(&operations_done, 1, memory_order_relaxed);
        pthread_mutex_lock(&queues);
        working -= counted;
        stream->done = operation->seq;
        struct event *event = operation->event;
        if (event && event->stream == stream && event->seq == operation->seq) {
            clock_gettime(CLOCK_MONOTONIC, &event->time);
            event->stamped = 1;
        }
        operation_free(operation);
        wake_blocked();
    }
    stream_unlink(stream);
    pthread_mutex_unlock(&queues);
    return NULL;
}

/* Ends a capture and takes all streams out of it. The caller keeps its graph. */
static void capture_end(struct capture *capture)
{
    for (struct stream *stream = streams; stream; stream = stream->next)
        if (stream->capture == capture)
            stream->capture = NULL;
    free(capture);
}

static void capture_abandon(struct capture *capture)
{
    graph_drop(capture->graph);
    capture_end(capture);
}

static void stream_destroy(struct stream *stream)
{
    if (stream->capture)
        capture_abandon(stream->capture);
    stream->destroyed = 1;
    if (stream->started)
        pthread_cond_signal(&stream->wake);
    else
        stream_unlink(stream);
}

static void thread_streams_free(void *argument)
{
    struct stream **table = argument;
    thread_streams = NULL;
    pthread_mutex_lock(&queues);
    for (int i = 0; i < MAX_DEVICES; i++)
        if (table[i])
            stream_destroy(table[i]);
    pthread_mutex_unlock(&queues);
    free(table);
}

/* The stream of a handle, or NULL for a handle that is none (or no longer one). */
static struct stream *stream_find(void *handle)
{
    if (!handle || handle == LEGACY_STREAM) {
        struct stream **slot = &legacy[current_device];
        if (!*slot) {
            *slot = stream_new(current_device, 0, 0);
            (*slot)->legacy = 1;
            (*slot)->blocking = 0;
            (*slot)->id = 1;
        }
        return *slot;
    }
    if (handle == PER_THREAD_STREAM) {
        if (!thread_streams) {
            thread_streams = must(calloc(MAX_DEVICES, sizeof *thread_streams));
            pthread_setspecific(thread_streams_key, thread_streams);
        }
        struct stream **slot = &thread_streams[current_device];
        if (!*slot)
            *slot = stream_new(current_device, 0, 0);
        return *slot;
    }
    for (struct stream *stream = streams; stream; stream = stream->next)
        if (stream == handle)
            return stream->destroyed || stream->legacy ? NULL : stream;
    return NULL;
}

static struct capture *legacy_capture(const struct stream *stream)
{
    /* What the legacy stream would have to wait for, were it used now. */
    for (struct stream *other = streams; other; other = other->next)
        if (other->blocking && other->capture && other->device == stream->device)
            return other->capture;
    return NULL;
}

static void invalidate(struct capture *capture)
{
    capture->status = 2;
}

/* The streams that STREAM is ordered after besides itself: how many, and into NEEDS if given. */
static size_t stream_needs(const struct stream *stream, struct need *needs)
{
    size_t count = 0;
    if (!stream->legacy && !stream->blocking)
        return 0;
    for (struct stream *other = streams; other; other = other->next) {
        int ordered = stream->legacy ? other->blocking : other->legacy;
        if (!ordered || other == stream || other->device != stream->device ||
            !stream_pending(other))
            continue;
        if (needs)
            needs[count] = (struct need){other, other->submitted};
        count++;
    }
    return count;
}

/*
 * Puts WORK at the end of STREAM, or into the graph that STREAM is captured into. Takes over the
 * caller's reference to WORK, whatever the answer. Called with `queues` held.
 */
static int enqueue(struct stream *stream, struct work *work, const struct need *after,
                   struct event *event)
{
    int error = SUCCESS;
    if (stream->capture) {
        if (stream->capture->status != 1) {
            error = CAPTURE_INVALIDATED;
        } else if (work->kind != WORK_NOTHING) {
            if (work->kind == WORK_GRAPH)
                for (size_t i = 0; i < work->graph->count; i++)
                    graph_add(stream->capture->graph, work->graph->work[i]);
            else
                graph_add(stream->capture->graph, work);
            stream->captured++;
        }
        work_drop(work);
        return error;
    }
    if (stream->legacy) {
        struct capture *capture = legacy_capture(stream);
        if (capture) {
            invalidate(capture);
            work_drop(work);
            return CAPTURE_IMPLICIT;
        }
    }
    if (!stream->started) {
        pthread_t thread;
        pthread_attr_t attributes;
        pthread_attr_init(&attributes);
        pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
        int failed = pthread_create(&thread, &attributes, stream_worker, stream);
        pthread_attr_destroy(&attributes);
        if (failed) {
            work_drop(work);
            return OUT_OF_MEMORY;
        }
        stream->started = 1;
    }
    size_t count = stream_needs(stream, NULL);
    struct operation *operation =
        must(malloc(sizeof(struct operation) + (count + 1) * sizeof(struct need)));
    memset(operation, 0, sizeof *operation);
    operation->need_count = stream_needs(stream, operation->needs);
    if (after)
        operation->needs[operation->need_count++] = *after;
    for (size_t i = 0; i < operation->need_count; i++)
        operation->needs[i].stream->refs++;
    operation->work = work;
    operation->seq = ++stream->submitted;
    if (event) {
        event->refs++;
        operation->event = event;
    }
    if (stream->tail)
        stream->tail->next = operation;
    else
        stream->head = operation;
    stream->tail = operation;
    if (!stream->busy)
        pthread_cond_signal(&stream->wake);
    return SUCCESS;
}

static int submit(void *handle, struct work *work)
{
    pthread_mutex_lock(&queues);
    struct stream *stream = stream_find(handle);
    int error = INVALID_HANDLE;
    if (stream)
        error = enqueue(stream, work, NULL, NULL);
    else
        work_drop(work);
    pthread_mutex_unlock(&queues);
    return error;
}

/* Waits with `queues` held. */
static void wait_for(struct stream *stream, uint64_t seq)
{
    stream->refs++;
    waiters++;
    while (stream->done < seq)
        pthread_cond_wait(&progress, &queues);
    waiters--;
    stream_drop(stream);
}

/* Waits for STREAM; the legacy stream stands for all blocking streams as well. */
static void wait_stream(struct stream *stream)
{
    size_t count = stream->legacy ? stream_needs(stream, NULL) : 0;
    struct need *needs = must(malloc((count + 1) * sizeof *needs));
    if (count)
        stream_needs(stream, needs);
    needs[count++] = (struct need){stream, stream->submitted};
    for (size_t i = 0; i < count; i++)
        needs[i].stream->refs++;
    for (size_t i = 0; i < count; i++) {
        wait_for(needs[i].stream, needs[i].seq);
        stream_drop(needs[i].stream);
    }
    free(needs);
}

/*
 * Calls such as cudaMalloc may wait for the device, so a capture forbids them, in its own thread
 * or everywhere, and is lost by the attempt.
 */
static int unsafe_call(void)
{
    int error = SUCCESS;
    pthread_mutex_lock(&queues);
    for (struct stream *stream = streams; stream; stream = stream->next) {
        struct capture *capture = stream->capture;
        if (!capture || capture_mode == CAPTURE_RELAXED || capture->mode == CAPTURE_RELAXED)
            continue;
        int own = pthread_equal(capture->thread, pthread_self());
        if (own || (capture->mode == CAPTURE_GLOBAL && capture_mode == CAPTURE_GLOBAL)) {
            invalidate(capture);
            error = CAPTURE_UNSUPPORTED;
        }
    }
    pthread_mutex_unlock(&queues);
    return error;
}

/* For what cannot be captured here; the capture stays valid. */
static int refuse_captured(void *handle)
{
    pthread_mutex_lock(&queues);
    const struct stream *stream = stream_find(handle);
    int error = !stream ? INVALID_HANDLE : stream->capture ? CAPTURE_UNSUPPORTED : SUCCESS;
    pthread_mutex_unlock(&queues);
    return error;
}

/* ---- Memory: which addresses are whose ---------------------------------------------------- */

struct block {
    uintptr_t start, end;
    int type, device, owned, registered;
};

static struct block *blocks; /* sorted by address, none overlap */
static size_t block_count, block_room;
static atomic_size_t block_total;
static void **graveyard; /* freed while queues were at work: given back when they are not */
static size_t graveyard_count, graveyard_room;

/* The first block that ends behind ADDRESS. Called with `memory` held, as all of these. */
static size_t block_index(uintptr_t address)
{
    size_t low = 0, high = block_count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (blocks[middle].end <= address)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static struct block *block_of(uintptr_t address)
{
    size_t i = block_index(address);
    return i < block_count && blocks[i].start <= address ? &blocks[i] : NULL;
}

static int block_add(void *pointer, size_t size, int type, int owned, int registered)
{
    uintptr_t start = (uintptr_t)pointer;
    size_t i = block_index(start);
    if (i < block_count && blocks[i].start < start + size)
        return 0;
    if (block_count == block_room) {
        block_room = block_room ? block_room * 2 : 64;
        blocks = must(realloc(blocks, block_room * sizeof *blocks));
    }
    memmove(&blocks[i + 1], &blocks[i], (block_count - i) * sizeof *blocks);
    blocks[i] = (struct block){start, start + size, type, current_device, owned, registered};
    atomic_store(&block_total, ++block_count);
    return 1;
}

static void block_remove(struct block *block)
{
    size_t i = (size_t)(block - blocks);
    memmove(&blocks[i], &blocks[i + 1], (block_count - i - 1) * sizeof *blocks);
    atomic_store(&block_total, --block_count);
}

static int any_pending(void)
{
    int pending = 0;
    pthread_mutex_lock(&queues);
    for (struct stream *stream = streams; stream && !pending; stream = stream->next)
        pending = stream_pending(stream);
    pthread_mutex_unlock(&queues);
    return pending;
}

static int allocate(void **out, size_t size, int type)
{
    if (!out)
        return INVALID_VALUE;
    *out = NULL;
    int error = unsafe_call();
    if (error || !size)
        return error;
    void *pointer = NULL;
    if (posix_memalign(&pointer, 512, size))
        return OUT_OF_MEMORY;
    pthread_mutex_lock(&memory);
    int added = block_add(pointer, size, type, 1, type == MEMORY_HOST);
    pthread_mutex_unlock(&memory);
    if (!added) { /* the caller registered or marked memory that it has since freed */
        free(pointer);
        return OUT_OF_MEMORY;
    }
    *out = pointer;
    return SUCCESS;
}

/* Takes a block out of the table; the caller frees it. */
static int disown(void *pointer, int host)
{
    pthread_mutex_lock(&memory);
    struct block *block = block_of((uintptr_t)pointer);
    int found = block && block->owned && block->start == (uintptr_t)pointer &&
                (block->type == MEMORY_HOST) == host;
    if (found)
        block_remove(block);
    pthread_mutex_unlock(&memory);
    return found;
}

static int release_block(void *pointer, int host)
{
    if (!pointer)
        return SUCCESS;
    int error = unsafe_call();
    if (error)
        return error;
    if (!disown(pointer, host))
        return INVALID_VALUE;
    /* A real runtime waits for the device here; a queue that is held would make that forever. */
    int pending = any_pending();
    pthread_mutex_lock(&memory);
    if (graveyard_count == graveyard_room) {
        graveyard_room = graveyard_room ? graveyard_room * 2 : 16;
        graveyard = must(realloc(graveyard, graveyard_room * sizeof *graveyard));
    }
    graveyard[graveyard_count++] = pointer;
    while (!pending && graveyard_count)
        free(graveyard[--graveyard_count]);
    pthread_mutex_unlock(&memory);
    return SUCCESS;
}

/* Whether SIZE bytes from POINTER leave the block that they begin in. */
static int leaves_block(const void *pointer, size_t size)
{
    if (!atomic_load_explicit(&block_total, memory_order_relaxed))
        return 0;
    pthread_mutex_lock(&memory);
    const struct block *block = block_of((uintptr_t)pointer);
    int leaves = block && size > block->end - (uintptr_t)pointer;
    pthread_mutex_unlock(&memory);
    return leaves;
}

static int memory_type(const void *pointer)
{
    if (!atomic_load_explicit(&block_total, memory_order_relaxed))
        return MEMORY_UNREGISTERED;
    pthread_mutex_lock(&memory);
    const struct block *block = block_of((uintptr_t)pointer);
    int type = block ? block->type : MEMORY_UNREGISTERED;
    pthread_mutex_unlock(&memory);
    return type;
}

/* Untracked memory stands for either side; tracked memory must be on the side that KIND says. */
static int check_direction(int kind, const void *dst, const void *src)
{
    if (kind < 0 || kind > 4)
        return INVALID_DIRECTION;
    if (kind > 2)
        return SUCCESS;
    int to = memory_type(dst), from = memory_type(src);
    if ((kind == 1 ? to == MEMORY_HOST : to == MEMORY_DEVICE) ||
        (kind == 2 ? from == MEMORY_HOST : from == MEMORY_DEVICE))
        return INVALID_VALUE;
    return SUCCESS;
}

static int do_malloc(struct call *call)
{
    return allocate(arg_pointer(call, "devPtr"), arg_u64(call, "size", 0), MEMORY_DEVICE);
}

static int do_malloc_managed(struct call *call)
{
    return allocate(arg_pointer(call, "devPtr"), arg_u64(call, "size", 0), MEMORY_MANAGED);
}

static int do_malloc_host(struct call *call)
{
    return allocate(arg_pointer2(call, "ptr", "pHost"), arg_u64(call, "size", 0), MEMORY_HOST);
}

static int do_free(struct call *call)
{
    return release_block(arg_pointer(call, "devPtr"), 0);
}

static int do_free_host(struct call *call)
{
    return release_block(arg_pointer(call, "ptr"), 1);
}

static int do_malloc_async(struct call *call)
{
    int error = refuse_captured(arg_stream(call));
    return error ? error
                 : allocate(arg_pointer(call, "devPtr"), arg_u64(call, "size", 0),
                            MEMORY_DEVICE);
}

static int do_free_async(struct call *call)
{
    void *pointer = arg_pointer(call, "devPtr");
    if (!pointer)
        return SUCCESS;
    int error = refuse_captured(arg_stream(call));
    if (error)
        return error;
    if (!disown(pointer, 0))
        return INVALID_VALUE;
    struct work *work = work_new(WORK_FREE, 0, 0);
    work->block = pointer;
    return submit(arg_stream(call), work);
}

static int do_host_register(struct call *call)
{
    void *pointer = arg_pointer(call, "ptr");
    size_t size = arg_u64(call, "size", 0);
    if (!pointer || !size)
        return INVALID_VALUE;
    int error = unsafe_call();
    if (error)
        return error;
    pthread_mutex_lock(&memory);
    int added = block_add(pointer, size, MEMORY_HOST, 0, 1);
    pthread_mutex_unlock(&memory);
    return added ? SUCCESS : ALREADY_REGISTERED;
}

static int do_host_unregister(struct call *call)
{
    void *pointer = arg_pointer(call, "ptr");
    if (!pointer)
        return INVALID_VALUE;
    int error = unsafe_call();
    if (error)
        return error;
    pthread_mutex_lock(&memory);
    struct block *block = block_of((uintptr_t)pointer);
    int found = block && block->registered && !block->owned && block->start == (uintptr_t)pointer;
    if (found)
        block_remove(block);
    pthread_mutex_unlock(&memory);
    return found ? SUCCESS : NOT_REGISTERED;
}

static int do_host_get_device_pointer(struct call *call)
{
    void **out = arg_pointer(call, "pDevice");
    void *host = arg_pointer(call, "pHost");
    if (!out || memory_type(host) != MEMORY_HOST)
        return INVALID_VALUE;
    *out = host;
    return SUCCESS;
}

static int do_pointer_get_attributes(struct call *call)
{
    struct {
        int type, device;
        const void *device_pointer, *host_pointer;
    } answer = {MEMORY_UNREGISTERED, -2, NULL, NULL};
    char *out = arg_pointer(call, "attributes");
    const void *pointer = arg_pointer(call, "ptr");
    if (!out || !pointer)
        return INVALID_VALUE;
    pthread_mutex_lock(&memory);
    const struct block *block = block_of((uintptr_t)pointer);
    if (block) {
        answer.type = block->type;
        answer.device = block->device;
        answer.device_pointer = pointer;
    }
    pthread_mutex_unlock(&memory);
    if (answer.type != MEMORY_DEVICE)
        answer.host_pointer = pointer;
    memcpy(out, &answer, sizeof answer);
    if (emu_abi_since >= 13000) /* eight longs more from 13.0 on */
        memset(out + sizeof answer, 0, 8 * sizeof(long));
    return SUCCESS;
}

static int do_mem_get_info(struct call *call)
{
    size_t *available = arg_pointer(call, "free"), *total = arg_pointer(call, "total");
    size_t used = 0;
    pthread_mutex_lock(&memory);
    for (size_t i = 0; i < block_count; i++)
        if (blocks[i].type == MEMORY_DEVICE)
            used += blocks[i].end - blocks[i].start;
    pthread_mutex_unlock(&memory);
    size_t all = (size_t)80 << 30;
    if (available)
        *available = used < all ? all - used : 0;
    if (total)
        *total = all;
    return SUCCESS;
}

/* ---- Copies ------------------------------------------------------------------------------ */

static int one_copy(void *stream, void *dst, const void *src, size_t size)
{
    struct work *work = work_new(WORK_COPIES, 1, 0);
    work_copies(work)[0] = (struct copy){dst, src, size};
    return submit(stream, work);
}

static int check_copy(const struct call *call, void *dst, const void *src, size_t size)
{
    if (!dst || !src)
        return INVALID_VALUE;
    int error = check_direction(arg_int(call, "kind", 4), dst, src);
    if (!error && (leaves_block(dst, size) || leaves_block(src, size)))
        error = INVALID_VALUE;
    return error;
}

static int do_memcpy_async(struct call *call)
{
    void *dst = arg_pointer(call, "dst");
    const void *src = arg_pointer(call, "src");
    size_t size = arg_u64(call, "count", 0);
    if (!size)
        return SUCCESS;
    int error = check_copy(call, dst, src, size);
    return error ? error : one_copy(arg_stream(call), dst, src, size);
}

static int synchronize(void *handle);

static int do_memcpy(struct call *call)
{
    void *dst = arg_pointer(call, "dst");
    const void *src = arg_pointer(call, "src");
    size_t size = arg_u64(call, "count", 0);
    if (!size)
        return SUCCESS;
    int error = unsafe_call();
    if (!error)
        error = check_copy(call, dst, src, size);
    if (!error)
        error = one_copy(arg_stream(call), dst, src, size);
    return error ? error : synchronize(arg_stream(call));
}

static int do_memcpy_2d_async(struct call *call)
{
    struct rows row = {
        .dst = arg_pointer(call, "dst"),
        .src = arg_pointer(call, "src"),
        .dst_row = arg_u64(call, "dpitch", 0),
        .src_row = arg_u64(call, "spitch", 0),
        .width = arg_u64(call, "width", 0),
        .height = arg_u64(call, "height", 0),
        .depth = 1,
    };
    if (!row.width || !row.height)
        return SUCCESS;
    if (row.dst_row < row.width || row.src_row < row.width || row.dst_row > INT32_MAX ||
        row.src_row > INT32_MAX)
        return INVALID_PITCH;
    if (!row.dst || !row.src)
        return INVALID_VALUE;
    int error = check_direction(arg_int(call, "kind", 4), row.dst, row.src);
    if (error)
        return error;
    if (leaves_block(row.dst, (row.height - 1) * row.dst_row + row.width) ||
        leaves_block(row.src, (row.height - 1) * row.src_row + row.width))
        return INVALID_VALUE;
    struct work *work = work_new(WORK_ROWS, 0, 1);
    work_rows(work)[0] = row;
    return submit(arg_stream(call), work);
}

struct pitched {
    char *ptr;
    size_t pitch, xsize, ysize;
};

struct parameters_3d { /* cudaMemcpy3DParms */
    void *src_array;
    size_t src_pos[3];
    struct pitched src;
    void *dst_array;
    size_t dst_pos[3];
    struct pitched dst;
    size_t width, height, depth;
    int kind;
};

static char *first_byte(const struct pitched *side, const size_t *pos)
{
    return side->ptr + (pos[2] * side->ysize + pos[1]) * side->pitch + pos[0];
}

static int do_memcpy_3d_async(struct call *call)
{
    const struct parameters_3d *p = arg_pointer(call, "p");
    if (!p)
        return INVALID_VALUE;
    if (p->src_array || p->dst_array)
        return NOT_SUPPORTED;
    if (!p->width || !p->height || !p->depth)
        return SUCCESS;
    if (!p->src.ptr || !p->dst.ptr)
        return INVALID_VALUE;
    struct rows row = {
        .dst = first_byte(&p->dst, p->dst_pos),
        .src = first_byte(&p->src, p->src_pos),
        .dst_row = p->dst.pitch,
        .src_row = p->src.pitch,
        .dst_layer = p->dst.pitch * p->dst.ysize,
        .src_layer = p->src.pitch * p->src.ysize,
        .width = p->width,
        .height = p->height,
        .depth = p->depth,
    };
    if (row.dst_row < row.width || row.src_row < row.width || row.dst_row > INT32_MAX ||
        row.src_row > INT32_MAX)
        return INVALID_PITCH;
    if (row.depth > 1 && (p->dst.ysize < row.height || p->src.ysize < row.height))
        return INVALID_VALUE;
    int error = check_direction(p->kind, row.dst, row.src);
    if (error)
        return error;
    size_t last = row.height - 1;
    if (leaves_block(row.dst, (row.depth - 1) * row.dst_layer + last * row.dst_row + row.width) ||
        leaves_block(row.src, (row.depth - 1) * row.src_layer + last * row.src_row + row.width))
        return INVALID_VALUE;
    struct work *work = work_new(WORK_ROWS, 0, 1);
    work_rows(work)[0] = row;
    return submit(arg_stream(call), work);
}

static int do_memset_async(struct call *call)
{
    struct work *work;
    char *dst = arg_pointer(call, "devPtr");
    size_t size = arg_u64(call, "count", 0);
    if (!size)
        return SUCCESS;
    if (!dst || leaves_block(dst, size))
        return INVALID_VALUE;
    work = work_new(WORK_SET, 0, 0);
    work->set.dst = dst;
    work->set.value = arg_int(call, "value", 0);
    work->set.size = size;
    return submit(arg_stream(call), work);
}

static int do_memset(struct call *call)
{
    int error = unsafe_call();
    if (!error)
        error = do_memset_async(call);
    return error ? error : synchronize(arg_stream(call));
}

static int do_mem_prefetch_async(struct call *call)
{
    if (!arg_pointer(call, "devPtr") || !arg_u64(call, "count", 0))
        return INVALID_VALUE;
    return submit(arg_stream(call), work_new(WORK_NOTHING, 0, 0));
}

static int do_mem_advise(struct call *call)
{
    return arg_pointer(call, "devPtr") && arg_u64(call, "count", 0) ? SUCCESS : INVALID_VALUE;
}

/* The layout of struct cudaMemcpyAttributes in every release. */
struct attributes {
    int order;
    struct {
        int type, id;
    } src_hint, dst_hint;
    unsigned flags;
};

static int order_known(int order)
{
    return order == ORDER_STREAM || order == ORDER_DURING_CALL || order == ORDER_ANY;
}

/* What batch calls ask of a stream: not the legacy one, not captured. */
static int check_batch_stream(void *handle)
{
    return !handle || handle == LEGACY_STREAM ? INVALID_VALUE : refuse_captured(handle);
}

/* Reads the sources that may be read early, at once, where ORDER says so. */
static void read_early(struct work *work, const int *orders)
{
    size_t count = work->copies.count, total = 0, at = 0;
    struct copy *copy = work_copies(work);
    for (size_t i = 0; i < count; i++)
        total += orders[i] == ORDER_STREAM ? 0 : copy[i].size;
    if (!total)
        return;
    work->copies.early = must(malloc(total));
    for (size_t i = 0; i < count; i++) {
        if (orders[i] == ORDER_STREAM)
            continue;
        memcpy(work->copies.early + at, copy[i].src, copy[i].size);
        copy[i].src = work->copies.early + at;
        at += copy[i].size;
    }
}

static void observe_numbers(struct call *call, const char *name, const size_t *values, size_t count)
{
    text_add(&call->observed, ", \"%s\": [", name);
    for (size_t i = 0; values && i < count; i++)
        text_add(&call->observed, "%s%zu", i ? ", " : "", values[i]);
    text_add(&call->observed, "]");
}

static void observe_attributes(struct call *call, const struct attributes *attributes, size_t count)
{
    text_add(&call->observed, ", \"attributes\": [");
    for (size_t i = 0; attributes && i < count; i++) {
        text_add(&call->observed, "%s{\"srcAccessOrder\": %d, \"flags\": %u, \"bytes\": ",
                 i ? ", " : "", attributes[i].order, attributes[i].flags);
        text_hex(&call->observed, &attributes[i], sizeof attributes[i]);
        text_add(&call->observed, "}");
    }
    text_add(&call->observed, "]");
}

static int do_memcpy_batch_async(struct call *call)
{
    enum { SHOWN = 1024 };
    void *const *dsts = arg_pointer(call, "dsts");
    const void *const *srcs = arg_pointer(call, "srcs");
    const size_t *sizes = arg_pointer(call, "sizes");
    size_t count = arg_u64(call, "count", 0);
    const struct attributes *attributes = arg_pointer(call, "attrs");
    /* A prototype may come without either: one attribute for all copies, then. */
    size_t attribute_count = arg_u64(call, "numAttrs", 1);
    const size_t *starts = arg_pointer(call, "attrsIdxs");
    size_t *fail_index = arg_pointer(call, "failIdx");
    void *stream = arg_stream(call);
    int has_attributes = find_arg(call, "attrs") != NULL;
    int has_starts = find_arg(call, "attrsIdxs") != NULL;

    if (fail_index)
        *fail_index = SIZE_MAX;
    if (call->recording) {
        size_t shown = count < SHOWN ? count : SHOWN;
        size_t shown_attributes = attribute_count < SHOWN ? attribute_count : SHOWN;
        text_add(&call->observed, "\"copies\": %zu", count);
        observe_numbers(call, "dsts", (const size_t *)(const void *)dsts, shown);
        observe_numbers(call, "srcs", (const size_t *)(const void *)srcs, shown);
        observe_numbers(call, "sizes", sizes, shown);
        observe_attributes(call, attributes, shown_attributes);
        observe_numbers(call, "attrsIdxs", starts, shown_attributes);
    }
    int error = check_batch_stream(stream);
    if (error)
        return error;
    if (!count || !dsts || !srcs || !sizes)
        return INVALID_VALUE;
    if (count > SIZE_MAX / 64)
        return OUT_OF_MEMORY;
    if (has_attributes && (!attributes || !attribute_count || attribute_count > count))
        return INVALID_VALUE;
    if (has_starts && (!starts || starts[0] != 0))
        return INVALID_VALUE;
    for (size_t i = 0; has_attributes && i < attribute_count; i++)
        if (!order_known(attributes[i].order) ||
            (has_starts && i && (starts[i] <= starts[i - 1] || starts[i] >= count)))
            return INVALID_VALUE;

    struct work *work = work_new(WORK_COPIES, count, 0);
    struct copy *copies = work_copies(work);
    int *orders = NULL;
    size_t taken = 0, attribute = 0;
    for (; taken < count; taken++) {
        if (call->fault_index >= 0 && taken == (size_t)call->fault_index) {
            error = call->fault_error;
            break;
        }
        if (!dsts[taken] || !srcs[taken] || !sizes[taken] ||
            leaves_block(dsts[taken], sizes[taken]) || leaves_block(srcs[taken], sizes[taken])) {
            error = INVALID_VALUE;
            break;
        }
        copies[taken] = (struct copy){dsts[taken], srcs[taken], sizes[taken]};
        if (!has_attributes)
            continue;
        while (has_starts && attribute + 1 < attribute_count && starts[attribute + 1] <= taken)
            attribute++;
        if (attributes[attribute].order != ORDER_STREAM && !orders) {
            orders = must(malloc(count * sizeof *orders));
            for (size_t i = 0; i < taken; i++)
                orders[i] = ORDER_STREAM;
        }
        if (orders)
            orders[taken] = attributes[attribute].order;
    }
    if (!error && call->fault_index >= 0)
        error = call->fault_error; /* an index behind the last copy */
    if (error && fail_index)
        *fail_index = taken;
    /* The copies before the refused one are made, as real runtimes do. */
    work->copies.count = taken;
    if (orders)
        read_early(work, orders);
    free(orders);
    int submitted = SUCCESS;
    if (taken)
        submitted = submit(stream, work);
    else
        work_drop(work);
    if (!error)
        error = submitted;
    if (!error)
        atomic_fetch_add_explicit(&batches_taken, 1, memory_order_relaxed);
    return error;
}

struct operand {
    int type;
    struct {
        void *pointer;
        size_t row_length, layer_height;
        int hint[2];
    } at;
};

struct batch_operation {
    struct operand src, dst;
    size_t width, height, depth;
    int order;
    unsigned flags;
};

/* What one 3-D operation copies, or the error that it answers. */
static int read_operation(const struct batch_operation *op, struct rows *row)
{
    if (op->src.type == 2 || op->dst.type == 2) /* CUDA arrays */
        return NOT_SUPPORTED;
    *row = (struct rows){
        .dst = op->dst.at.pointer,
        .src = op->src.at.pointer,
        .dst_row = op->dst.at.row_length ? op->dst.at.row_length : op->width,
        .src_row = op->src.at.row_length ? op->src.at.row_length : op->width,
        .width = op->width,
        .height = op->height,
        .depth = op->depth,
    };
    size_t dst_rows = op->dst.at.layer_height ? op->dst.at.layer_height : op->height;
    size_t src_rows = op->src.at.layer_height ? op->src.at.layer_height : op->height;
    row->dst_layer = row->dst_row * dst_rows;
    row->src_layer = row->src_row * src_rows;
    if (op->src.type != 1 || op->dst.type != 1 || !row->dst || !row->src || !op->width ||
        !op->height || !op->depth || !order_known(op->order) || row->dst_row < op->width ||
        row->src_row < op->width || row->dst_layer < row->dst_row * op->height ||
        row->src_layer < row->src_row * op->height)
        return INVALID_VALUE;
    size_t dst_end =
        (op->depth - 1) * row->dst_layer + (op->height - 1) * row->dst_row + op->width;
    size_t src_end =
        (op->depth - 1) * row->src_layer + (op->height - 1) * row->src_row + op->width;
    return leaves_block(row->dst, dst_end) || leaves_block(row->src, src_end) ? INVALID_VALUE
                                                                              : SUCCESS;
}

static int do_memcpy_3d_batch_async(struct call *call)
{
    const struct batch_operation *list = arg_pointer(call, "opList");
    size_t count = arg_u64(call, "numOps", 0), taken = 0;
    size_t *fail_index = arg_pointer(call, "failIdx");
    void *stream = arg_stream(call);
    if (fail_index)
        *fail_index = SIZE_MAX;
    if (call->recording)
        text_add(&call->observed, "\"copies\": %zu", count);
    int error = check_batch_stream(stream);
    if (error)
        return error;
    if (!count || !list || arg_u64(call, "flags", 0))
        return INVALID_VALUE;
    if (count > SIZE_MAX / 128)
        return OUT_OF_MEMORY;
    struct work *work = work_new(WORK_ROWS, 0, count);
    while (taken < count && !error) {
        error = call->fault_index >= 0 && taken == (size_t)call->fault_index
                    ? call->fault_error
                    : read_operation(&list[taken], &work_rows(work)[taken]);
        taken += !error;
    }
    if (!error && call->fault_index >= 0)
        error = call->fault_error;
    if (error && fail_index)
        *fail_index = taken;
    work->rows = taken;
    int submitted = SUCCESS;
    if (taken)
        submitted = submit(stream, work);
    else
        work_drop(work);
    return error ? error : submitted;
}

static int do_memcpy_3d_with_attributes_async(struct call *call)
{
    const struct batch_operation *op = arg_pointer(call, "op");
    struct rows row;
    if (!op || arg_u64(call, "flags", 0))
        return INVALID_VALUE;
    int error = read_operation(op, &row);
    if (error)
        return error;
    struct work *work = work_new(WORK_ROWS, 0, 1);
    work_rows(work)[0] = row;
    return submit(arg_stream(call), work);
}

static int do_memcpy_with_attributes_async(struct call *call)
{
    void *dst = arg_pointer(call, "dst");
    const void *src = arg_pointer(call, "src");
    size_t size = arg_u64(call, "size", 0);
    const struct attributes *attributes = arg_pointer(call, "attr");
    if (call->recording) {
        text_add(&call->observed, "\"copies\": 1");
        observe_attributes(call, attributes, 1);
    }
    if (!attributes || !order_known(attributes->order) || !dst || !src || !size ||
        leaves_block(dst, size) || leaves_block(src, size))
        return INVALID_VALUE;
    struct work *work = work_new(WORK_COPIES, 1, 0);
    work_copies(work)[0] = (struct copy){dst, src, size};
    read_early(work, &attributes->order);
    return submit(arg_stream(call), work);
}

/* ---- Streams, events, captures and graphs: the calls --------------------------------------- */

static int create_stream(struct call *call, int priority)
{
    void **out = arg_pointer(call, "pStream");
    unsigned flags = (unsigned)arg_u64(call, "flags", 0);
    if (!out || flags > 1)
        return INVALID_VALUE;
    pthread_mutex_lock(&queues);
    *out = stream_new(current_device, flags, priority);
    pthread_mutex_unlock(&queues);
    return SUCCESS;
}

static int do_stream_create(struct call *call)
{
    return create_stream(call, 0);
}

static int do_stream_create_with_priority(struct call *call)
{
    int priority = arg_int(call, "priority", 0);
    return create_stream(call, priority < -5 ? -5 : priority > 0 ? 0 : priority);
}

static int do_stream_destroy(struct call *call)
{
    void *handle = arg_stream(call);
    if ((uintptr_t)handle <= 2)
        return INVALID_HANDLE;
    pthread_mutex_lock(&queues);
    struct stream *stream = stream_find(handle);
    if (stream)
        stream_destroy(stream);
    pthread_mutex_unlock(&queues);
    return stream ? SUCCESS : INVALID_HANDLE;
}

/* What waiting for STREAM or asking after it answers while captures are going on; 0 to go on. */
static int capture_refuses(struct stream *stream)
{
    if (stream->capture) {
        invalidate(stream->capture);
        return CAPTURE_UNSUPPORTED;
    }
    struct capture *capture = stream->legacy ? legacy_capture(stream) : NULL;
    if (capture)
        invalidate(capture);
    return capture ? CAPTURE_IMPLICIT : SUCCESS;
}

static int synchronize(void *handle)
{
    pthread_mutex_lock(&queues);
    struct stream *stream = stream_find(handle);
    int error = stream ? capture_refuses(stream) : INVALID_HANDLE;
    if (!error)
        wait_stream(stream);
    pthread_mutex_unlock(&queues);
    return error;
}

static int do_stream_synchronize(struct call *call)
{
    return synchronize(arg_stream(call));
}

static int do_stream_query(struct call *call)
{
    pthread_mutex_lock(&queues);
    struct stream *stream = stream_find(arg_stream(call));
    int error = stream ? capture_refuses(stream) : INVALID_HANDLE;
    if (!error && (stream_pending(stream) || (stream->legacy && stream_needs(stream, NULL))))
        error = NOT_READY;
    pthread_mutex_unlock(&queues);
    return error;
}

static int do_device_synchronize(struct call *call)
{
    (void)call;
    int error = unsafe_call();
    if (error)
        return error;
    pthread_mutex_lock(&queues);
    size_t count = 0;
    for (struct stream *stream = streams; stream; stream = stream->next)
        count++;
    struct need *needs = must(malloc((count + 1) * sizeof *needs));
    count = 0;
    for (struct stream *stream = streams; stream; stream = stream->next)
        if (stream->device == current_device && stream_pending(stream)) {
            stream->refs++;
            needs[count++] = (struct need){stream, stream->submitted};
        }
    for (size_t i = 0; i < count; i++) {
        wait_for(needs[i].stream, needs[i].seq);
        stream_drop(needs[i].stream);
    }
    free(needs);
    pthread_mutex_unlock(&queues);
    return SUCCESS;
}

static int do_stream_get(struct call *call)
{
    int *device = arg_pointer(call, "device");
    int *priority = arg_pointer(call, "priority");
    unsigned *flags = arg_pointer(call, "flags");
    unsigned long long *id = arg_pointer(call, "streamId");
    if (!device && !priority && !flags && !id)
        return INVALID_VALUE;
    pthread_mutex_lock(&queues);
    struct stream *stream = stream_find(arg_stream(call));
    if (stream && device)
        *device = stream->device;
    if (stream && priority)
        *priority = stream->priority;
    if (stream && flags)
        *flags = stream->flags;
    if (stream && id)
        *id = stream->id;
    pthread_mutex_unlock(&queues);
    return stream ? SUCCESS : INVALID_HANDLE;
}

static struct event *event_of(void *handle)
{
    struct event *event = handle;
    return event && event->magic == EVENT_MAGIC ? event : NULL;
}

static int do_event_create(struct call *call)
{
    void **out = arg_pointer(call, "event");
    if (!out)
        return INVALID_VALUE;
    struct event *event = must(calloc(1, sizeof *event));
    event->magic = EVENT_MAGIC;
    event->flags = (unsigned)arg_u64(call, "flags", 0);
    event->refs = 1;
    *out = event;
    return SUCCESS;
}

static int do_event_destroy(struct call *call)
{
    pthread_mutex_lock(&queues);
    struct event *event = event_of(arg_pointer(call, "event"));
    if (event) {
        if (event->refs > 1)
            event->magic = 0;
        event_drop(event);
    }
    pthread_mutex_unlock(&queues);
    return event ? SUCCESS : INVALID_HANDLE;
}

static int do_event_record(struct call *call)
{
    pthread_mutex_lock(&queues);
    struct event *event = event_of(arg_pointer(call, "event"));
    struct stream *stream = stream_find(arg_stream(call));
    int error = event && stream ? SUCCESS : INVALID_HANDLE;
    struct capture *capture = stream ? stream->capture : NULL;
    if (!error && capture && capture->status != 1)
        error = CAPTURE_INVALIDATED;
    if (!error && !capture)
        error = enqueue(stream, work_new(WORK_NOTHING, 0, 0), NULL, event);
    if (!error) {
        stream->refs++;
        if (event->stream)
            stream_drop(event->stream);
        event->stream = stream;
        event->seq = capture ? 0 : stream->submitted;
        event->capture_id = capture ? capture->id : 0;
        event->capture_mark = stream->captured;
        event->stamped = 0;
    }
    pthread_mutex_unlock(&queues);
    return error;
}

static struct capture *capture_by_id(uint64_t id)
{
    for (struct stream *stream = streams; stream; stream = stream->next)
        if (stream->capture && stream->capture->id == id)
            return stream->capture;
    return NULL;
}

/* A stream that waits for a captured event joins the capture. */
static int wait_captured(struct stream *stream, struct event *event)
{
    struct capture *capture = capture_by_id(event->capture_id);
    if (!capture)
        return CAPTURED_EVENT;
    if (capture->status != 1)
        return CAPTURE_INVALIDATED;
    if (stream->legacy) {
        invalidate(capture);
        return CAPTURE_IMPLICIT;
    }
    if (stream->capture && stream->capture != capture) {
        invalidate(capture);
        invalidate(stream->capture);
        return CAPTURE_MERGE;
    }
    if (!stream->capture) {
        stream->capture = capture;
        stream->captured = stream->joined = 0;
    }
    if (event->stream != stream && event->stream->joined < event->capture_mark) {
        event->stream->joined = event->capture_mark;
        stream->captured++; /* has to be joined in its turn */
    }
    return SUCCESS;
}

static int do_stream_wait_event(struct call *call)
{
    pthread_mutex_lock(&queues);
    struct stream *stream = stream_find(arg_stream(call));
    struct event *event = event_of(arg_pointer(call, "event"));
    int error = event && stream ? SUCCESS : INVALID_HANDLE;
    if (!error && event->stream) {
        if (event->capture_id) {
            error = wait_captured(stream, event);
        } else if (stream->capture) {
            invalidate(stream->capture);
            error = CAPTURE_ISOLATION;
        } else {
            struct need need = {event->stream, event->seq};
            error = enqueue(stream, work_new(WORK_NOTHING, 0, 0), &need, NULL);
        }
    }
    pthread_mutex_unlock(&queues);
    return error;
}

static int event_done(const struct event *event)
{
    return !event->stream || event->stream->done >= event->seq;
}

static int do_event_query(struct call *call)
{
    pthread_mutex_lock(&queues);
    struct event *event = event_of(arg_pointer(call, "event"));
    int error = !event              ? INVALID_HANDLE
                : event->capture_id ? CAPTURED_EVENT
                : event_done(event) ? SUCCESS
                                    : NOT_READY;
    pthread_mutex_unlock(&queues);
    return error;
}

static int do_event_synchronize(struct call *call)
{
    pthread_mutex_lock(&queues);
    struct event *event = event_of(arg_pointer(call, "event"));
    int error = !event ? INVALID_HANDLE : event->capture_id ? CAPTURED_EVENT : SUCCESS;
    if (!error && event->stream)
        wait_for(event->stream, event->seq);
    pthread_mutex_unlock(&queues);
    return error;
}

static int do_event_elapsed_time(struct call *call)
{
    float *out = arg_pointer(call, "ms");
    if (!out)
        return INVALID_VALUE;
    pthread_mutex_lock(&queues);
    struct event *start = event_of(arg_pointer(call, "start"));
    struct event *end = event_of(arg_pointer(call, "end"));
    int error = SUCCESS;
    if (!start || !end || !start->stream || !end->stream || ((start->flags | end->flags) & 2))
        error = INVALID_HANDLE;
    else if (start->capture_id || end->capture_id)
        error = CAPTURED_EVENT;
    else if (!start->stamped || !end->stamped)
        error = NOT_READY;
    else
        *out = (float)((double)(end->time.tv_sec - start->time.tv_sec) * 1e3 +
                       (double)(end->time.tv_nsec - start->time.tv_nsec) * 1e-6);
    pthread_mutex_unlock(&queues);
    return error;
}

static int do_launch_host_func(struct call *call)
{
    uintptr_t function = (uintptr_t)arg_pointer(call, "fn");
    if (!function)
        return INVALID_VALUE;
    struct work *work = work_new(WORK_CALL, 0, 0);
    work->call.function = (void (*)(void *))function;
    work->call.data = arg_pointer(call, "userData");
    return submit(arg_stream(call), work);
}

static int do_stream_is_capturing(struct call *call)
{
    int *status = arg_pointer2(call, "pCaptureStatus", "captureStatus_out");
    if (!status)
        status = arg_pointer(call, "captureStatus");
    unsigned long long *id = arg_pointer2(call, "id_out", "pId");
    void **graph = arg_pointer(call, "graph_out");
    void **dependencies = arg_pointer(call, "dependencies_out");
    void **edges = arg_pointer(call, "edgeData_out");
    size_t *dependency_count = arg_pointer(call, "numDependencies_out");
    if (!status)
        return INVALID_VALUE;
    pthread_mutex_lock(&queues);
    struct stream *stream = stream_find(arg_stream(call));
    int error = stream ? SUCCESS : INVALID_HANDLE;
    if (stream && stream->legacy && legacy_capture(stream))
        error = CAPTURE_IMPLICIT;
    if (!error) {
        const struct capture *capture = stream->capture;
        *status = capture ? capture->status : 0;
        if (capture && capture->status == 1) {
            struct graph *into = capture->graph;
            if (id)
                *id = capture->id;
            if (graph)
                *graph = into;
            if (dependencies)
                *dependencies = into->count ? &into->work[into->count - 1] : NULL;
            if (edges)
                *edges = NULL;
            if (dependency_count)
                *dependency_count = into->count ? 1 : 0;
        }
    }
    pthread_mutex_unlock(&queues);
    return error;
}

static int do_stream_begin_capture(struct call *call)
{
    int mode = arg_int(call, "mode", CAPTURE_GLOBAL);
    if (mode < CAPTURE_GLOBAL || mode > CAPTURE_RELAXED)
        return INVALID_VALUE;
    pthread_mutex_lock(&queues);
    struct stream *stream = stream_find(arg_stream(call));
    int error = !stream           ? INVALID_HANDLE
                : stream->legacy  ? CAPTURE_UNSUPPORTED
                : stream->capture ? ILLEGAL_STATE
                                  : SUCCESS;
    if (!error) {
        struct capture *capture = must(calloc(1, sizeof *capture));
        capture->status = 1;
        capture->mode = mode;
        capture->id = next_capture_id++;
        capture->thread = pthread_self();
        capture->origin = stream;
        capture->graph = graph_new(GRAPH_MAGIC);
        stream->capture = capture;
        stream->captured = stream->joined = 0;
    }
    pthread_mutex_unlock(&queues);
    return error;
}

static int do_stream_end_capture(struct call *call)
{
    void **out = arg_pointer(call, "pGraph");
    if (!out)
        return INVALID_VALUE;
    *out = NULL;
    pthread_mutex_lock(&queues);
    struct stream *stream = stream_find(arg_stream(call));
    struct capture *capture = stream ? stream->capture : NULL;
    int error = !stream ? INVALID_HANDLE : !capture ? ILLEGAL_STATE : SUCCESS;
    if (!error && capture->origin != stream) {
        invalidate(capture);
        error = CAPTURE_UNMATCHED;
    } else if (!error && capture->mode != CAPTURE_RELAXED &&
               !pthread_equal(capture->thread, pthread_self())) {
        error = CAPTURE_WRONG_THREAD;
    } else if (!error) {
        if (capture->status != 1)
            error = CAPTURE_INVALIDATED;
        for (struct stream *other = streams; other && !error; other = other->next)
            if (other->capture == capture && other != stream && other->captured > other->joined)
                error = CAPTURE_UNJOINED;
        if (error) {
            capture_abandon(capture);
        } else {
            *out = capture->graph;
            capture_end(capture);
        }
    }
    pthread_mutex_unlock(&queues);
    return error;
}

static int do_exchange_capture_mode(struct call *call)
{
    int *mode = arg_pointer(call, "mode");
    if (!mode || *mode < CAPTURE_GLOBAL || *mode > CAPTURE_RELAXED)
        return INVALID_VALUE;
    int before = capture_mode;
    capture_mode = *mode;
    *mode = before;
    return SUCCESS;
}

static struct graph *graph_of(const struct call *call, const char *name, unsigned magic)
{
    struct graph *graph = arg_pointer(call, name);
    return graph && graph->magic == magic ? graph : NULL;
}

static int do_graph_create(struct call *call)
{
    void **out = arg_pointer(call, "pGraph");
    if (!out)
        return INVALID_VALUE;
    *out = graph_new(GRAPH_MAGIC);
    return SUCCESS;
}

static int do_graph_instantiate(struct call *call)
{
    void **out = arg_pointer(call, "pGraphExec");
    if (!out)
        return INVALID_VALUE;
    pthread_mutex_lock(&queues);
    const struct graph *graph = graph_of(call, "graph", GRAPH_MAGIC);
    if (graph) {
        struct graph *exec = graph_new(EXEC_MAGIC);
        for (size_t i = 0; i < graph->count; i++)
            graph_add(exec, graph->work[i]);
        *out = exec;
    }
    pthread_mutex_unlock(&queues);
    return graph ? SUCCESS : INVALID_VALUE;
}

static int do_graph_launch(struct call *call)
{
    pthread_mutex_lock(&queues);
    struct graph *exec = graph_of(call, "graphExec", EXEC_MAGIC);
    struct stream *stream = stream_find(arg_stream(call));
    int error = !exec ? INVALID_VALUE : !stream ? INVALID_HANDLE : SUCCESS;
    if (!error) {
        struct work *work = work_new(WORK_GRAPH, 0, 0);
        work->graph = exec;
        exec->refs++;
        error = enqueue(stream, work, NULL, NULL);
    }
    pthread_mutex_unlock(&queues);
    return error;
}

static int drop_graph(const struct call *call, const char *name, unsigned magic)
{
    pthread_mutex_lock(&queues);
    struct graph *graph = graph_of(call, name, magic);
    if (graph)
        graph_drop(graph);
    pthread_mutex_unlock(&queues);
    return graph ? SUCCESS : INVALID_VALUE;
}

static int do_graph_destroy(struct call *call)
{
    return drop_graph(call, "graph", GRAPH_MAGIC);
}

static int do_graph_exec_destroy(struct call *call)
{
    return drop_graph(call, "graphExec", EXEC_MAGIC);
}

static int do_graph_get_nodes(struct call *call)
{
    void **nodes = arg_pointer(call, "nodes");
    size_t *count = arg_pointer(call, "numNodes");
    if (!count)
        return INVALID_VALUE;
    pthread_mutex_lock(&queues);
    const struct graph *graph = graph_of(call, "graph", GRAPH_MAGIC);
    if (graph) {
        for (size_t i = 0; nodes && i < *count; i++)
            nodes[i] = i < graph->count ? graph->work[i] : NULL;
        if (!nodes || *count > graph->count)
            *count = graph->count;
    }
    pthread_mutex_unlock(&queues);
    return graph ? SUCCESS : INVALID_VALUE;
}

/* Captured work is a chain here, whatever streams it came from. */
static int do_graph_get_edges(struct call *call)
{
    void **from = arg_pointer(call, "from"), **to = arg_pointer(call, "to");
    char *data = arg_pointer(call, "edgeData"); /* eight bytes each */
    size_t *count = arg_pointer(call, "numEdges");
    if (!count || !from != !to)
        return INVALID_VALUE;
    pthread_mutex_lock(&queues);
    const struct graph *graph = graph_of(call, "graph", GRAPH_MAGIC);
    if (graph) {
        size_t edges = graph->count ? graph->count - 1 : 0;
        for (size_t i = 0; from && i < *count; i++) {
            from[i] = i < edges ? graph->work[i] : NULL;
            to[i] = i < edges ? graph->work[i + 1] : NULL;
            if (data)
                memset(data + 8 * i, 0, 8);
        }
        if (!from || *count > edges)
            *count = edges;
    }
    pthread_mutex_unlock(&queues);
    return graph ? SUCCESS : INVALID_VALUE;
}

/* ---- Versions, devices, errors, entry points ----------------------------------------------- */

static int device_attributes[MAX_ATTRIBUTES]; /* guarded by `control` */
static const struct {
    int attribute, value;
} attribute_defaults[] = {
    {1, 1024},        /* MaxThreadsPerBlock */
    {10, 32},         /* WarpSize */
    {11, 2147483647}, /* MaxPitch */
    {13, 1000000},    /* ClockRate */
    {15, 1},          /* GpuOverlap */
    {16, 132},        /* MultiProcessorCount */
    {19, 1},          /* CanMapHostMemory */
    {31, 1},          /* ConcurrentKernels */
    {40, 3},          /* AsyncEngineCount */
    {41, 1},          /* UnifiedAddressing */
    {75, 9},          /* ComputeCapabilityMajor */
    {78, 1},          /* StreamPrioritiesSupported */
    {83, 1},          /* ManagedMemory */
    {89, 1},          /* ConcurrentManagedAccess */
    {90, 1},          /* ComputePreemptionSupported */
    {91, 1},          /* CanUseHostPointerForRegisteredMem */
    {95, 1},          /* CooperativeLaunch */
    {99, 1},          /* HostRegisterSupported */
    {115, 1},         /* MemoryPoolsSupported */
};

static void attributes_reset(void)
{
    memset(device_attributes, 0, sizeof device_attributes);
    for (size_t i = 0; i < COUNT(attribute_defaults); i++)
        device_attributes[attribute_defaults[i].attribute] = attribute_defaults[i].value;
}

static int store_int(const struct call *call, const char *name, int value)
{
    int *out = arg_pointer(call, name);
    if (!out)
        return INVALID_VALUE;
    *out = value;
    return SUCCESS;
}

static int do_runtime_get_version(struct call *call)
{
    return store_int(call, "runtimeVersion", atomic_load(&runtime_version));
}

static int do_driver_get_version(struct call *call)
{
    return store_int(call, "driverVersion", atomic_load(&driver_version));
}

static int do_get_device_count(struct call *call)
{
    int count = atomic_load(&device_count);
    int error = store_int(call, "count", count);
    return error ? error : count ? SUCCESS : NO_DEVICE;
}

static int do_get_device(struct call *call)
{
    return store_int(call, "device", current_device);
}

static int do_set_device(struct call *call)
{
    int device = arg_int(call, "device", 0);
    int count = atomic_load(&device_count);
    if (device < 0 || device >= count)
        return count ? INVALID_DEVICE : NO_DEVICE;
    current_device = device;
    return SUCCESS;
}

static int do_device_get_attribute(struct call *call)
{
    int attribute = arg_int(call, "attr", -1), device = arg_int(call, "device", 0);
    if (device < 0 || device >= atomic_load(&device_count))
        return INVALID_DEVICE;
    if (attribute < 1 || attribute >= MAX_ATTRIBUTES)
        return INVALID_VALUE;
    pthread_mutex_lock(&control);
    int value = device_attributes[attribute];
    pthread_mutex_unlock(&control);
    return store_int(call, "value", value);
}

static int do_priority_range(struct call *call)
{
    int *least = arg_pointer(call, "leastPriority"), *most = arg_pointer(call, "greatestPriority");
    if (least)
        *least = 0;
    if (most)
        *most = -5;
    return SUCCESS;
}

static int do_can_access_peer(struct call *call)
{
    return store_int(call, "canAccessPeer",
                     arg_int(call, "device", 0) != arg_int(call, "peerDevice", 0));
}

static int do_get_last_error(struct call *call)
{
    (void)call;
    int error = last_error;
    last_error = SUCCESS;
    return error;
}

static int do_peek_at_last_error(struct call *call)
{
    (void)call;
    return last_error;
}

static int do_nothing(struct call *call)
{
    (void)call;
    return SUCCESS;
}

static const char *error_text(const struct call *call, int name)
{
    int code = arg_int(call, "error", -1);
    for (size_t i = 0; i < COUNT(error_table); i++)
        if (error_table[i].code == code)
            return name ? error_table[i].name : error_table[i].text;
    return "unrecognized error code";
}

/* The driver's names of the same codes. */
static int do_driver_error_text(struct call *call)
{
    const char **out = arg_pointer(call, "pStr");
    if (!out)
        return INVALID_VALUE;
    *out = error_text(call, strstr(call->function, "Name") != NULL);
    return SUCCESS;
}

static void *self; /* this very library: an entry point never comes from another one */

/* Names that the driver gives a newer prototype of the same function. */
static const struct {
    const char *symbol;
    int since;
    const char *exported;
} driver_symbols[] = {
    {"cuMemcpyBatchAsync", 13000, "cuMemcpyBatchAsync_v2"},
    {"cuMemcpy3DBatchAsync", 13000, "cuMemcpy3DBatchAsync_v2"},
    {"cuMemcpyBatchAsync", 12080, "cuMemcpyBatchAsync"},
    {"cuMemcpy3DBatchAsync", 12080, "cuMemcpy3DBatchAsync"},
};

static int do_entry_point(struct call *call)
{
    const char *symbol = arg_pointer(call, "symbol");
    void **out = arg_pointer2(call, "pfn", "funcPtr");
    int version = arg_int(call, "cudaVersion", atomic_load(&driver_version));
    int *status = arg_pointer2(call, "symbolStatus", "driverStatus");
    int driver_call = strncmp(call->function, "cuGet", 5) == 0;
    if (!symbol || !out)
        return INVALID_VALUE;
    *out = NULL;
    const char *exported = symbol;
    int too_old = version > atomic_load(&driver_version);
    for (size_t i = 0; i < COUNT(driver_symbols); i++) {
        if (strcmp(driver_symbols[i].symbol, symbol))
            continue;
        too_old = too_old || version < driver_symbols[i].since;
        if (version >= driver_symbols[i].since) {
            exported = driver_symbols[i].exported;
            too_old = version > atomic_load(&driver_version);
            break;
        }
    }
    if (!too_old && self)
        *out = dlsym(self, exported);
    if (status)
        *status = *out ? 0 : too_old ? 2 : 1;
    /* The runtime's own call answers success and leaves the news to the status. */
    return *out || (!driver_call && status) ? SUCCESS : NOT_FOUND;
}

/* ---- The table --------------------------------------------------------------------------- */

enum { ANY_TIME = 1, BATCH = 2, DRIVER = 4, QUIET = 8 };
/* ANY_TIME: answers without a driver. QUIET: leaves the last error alone. */

static const struct handler {
    const char *name;
    int (*run)(struct call *call);
    int flags;
} handlers[] = { /* sorted by strcmp */
    {"cuDriverGetVersion", do_driver_get_version, ANY_TIME | DRIVER},
    {"cuGetErrorName", do_driver_error_text, ANY_TIME | DRIVER},
    {"cuGetErrorString", do_driver_error_text, ANY_TIME | DRIVER},
    {"cuGetProcAddress", do_entry_point, DRIVER},
    {"cuGetProcAddress_v2", do_entry_point, DRIVER},
    {"cuInit", do_nothing, DRIVER},
    {"cuMemcpy3DBatchAsync", do_memcpy_3d_batch_async, DRIVER | BATCH},
    {"cuMemcpy3DBatchAsync_v2", do_memcpy_3d_batch_async, DRIVER | BATCH},
    {"cuMemcpyBatchAsync", do_memcpy_batch_async, DRIVER | BATCH},
    {"cuMemcpyBatchAsync_v2", do_memcpy_batch_async, DRIVER | BATCH},
    {"cuStreamIsCapturing", do_stream_is_capturing, DRIVER},
    {"cuStreamSynchronize", do_stream_synchronize, DRIVER},
    {"cudaDeviceCanAccessPeer", do_can_access_peer, 0},
    {"cudaDeviceGetAttribute", do_device_get_attribute, 0},
    {"cudaDeviceGetStreamPriorityRange", do_priority_range, 0},
    {"cudaDeviceSynchronize", do_device_synchronize, 0},
    {"cudaDriverGetVersion", do_driver_get_version, ANY_TIME},
    {"cudaEventCreate", do_event_create, 0},
    {"cudaEventCreateWithFlags", do_event_create, 0},
    {"cudaEventDestroy", do_event_destroy, 0},
    {"cudaEventElapsedTime", do_event_elapsed_time, 0},
    {"cudaEventQuery", do_event_query, 0},
    {"cudaEventRecord", do_event_record, 0},
    {"cudaEventRecordWithFlags", do_event_record, 0},
    {"cudaEventSynchronize", do_event_synchronize, 0},
    {"cudaFree", do_free, 0},
    {"cudaFreeAsync", do_free_async, 0},
    {"cudaFreeHost", do_free_host, 0},
    {"cudaGetDevice", do_get_device, 0},
    {"cudaGetDeviceCount", do_get_device_count, 0},
    {"cudaGetDriverEntryPoint", do_entry_point, 0},
    {"cudaGetDriverEntryPointByVersion", do_entry_point, 0},
    {"cudaGetLastError", do_get_last_error, ANY_TIME | QUIET},
    {"cudaGraphCreate", do_graph_create, 0},
    {"cudaGraphDestroy", do_graph_destroy, 0},
    {"cudaGraphExecDestroy", do_graph_exec_destroy, 0},
    {"cudaGraphGetEdges", do_graph_get_edges, 0},
    {"cudaGraphGetNodes", do_graph_get_nodes, 0},
    {"cudaGraphInstantiate", do_graph_instantiate, 0},
    {"cudaGraphInstantiateWithFlags", do_graph_instantiate, 0},
    {"cudaGraphLaunch", do_graph_launch, 0},
    {"cudaHostAlloc", do_malloc_host, 0},
    {"cudaHostGetDevicePointer", do_host_get_device_pointer, 0},
    {"cudaHostRegister", do_host_register, 0},
    {"cudaHostUnregister", do_host_unregister, 0},
    {"cudaLaunchHostFunc", do_launch_host_func, 0},
    {"cudaMalloc", do_malloc, 0},
    {"cudaMallocAsync", do_malloc_async, 0},
    {"cudaMallocHost", do_malloc_host, 0},
    {"cudaMallocManaged", do_malloc_managed, 0},
    {"cudaMemAdvise", do_mem_advise, 0},
    {"cudaMemGetInfo", do_mem_get_info, 0},
    {"cudaMemPrefetchAsync", do_mem_prefetch_async, 0},
    {"cudaMemcpy", do_memcpy, 0},
    {"cudaMemcpy2DAsync", do_memcpy_2d_async, 0},
    {"cudaMemcpy3DAsync", do_memcpy_3d_async, 0},
    {"cudaMemcpy3DBatchAsync", do_memcpy_3d_batch_async, BATCH},
    {"cudaMemcpy3DWithAttributesAsync", do_memcpy_3d_with_attributes_async, 0},
    {"cudaMemcpyAsync", do_memcpy_async, 0},
    {"cudaMemcpyBatchAsync", do_memcpy_batch_async, BATCH},
    {"cudaMemcpyWithAttributesAsync", do_memcpy_with_attributes_async, 0},
    {"cudaMemset", do_memset, 0},
    {"cudaMemsetAsync", do_memset_async, 0},
    {"cudaPeekAtLastError", do_peek_at_last_error, ANY_TIME | QUIET},
    {"cudaPointerGetAttributes", do_pointer_get_attributes, 0},
    {"cudaRuntimeGetVersion", do_runtime_get_version, ANY_TIME},
    {"cudaSetDevice", do_set_device, 0},
    {"cudaStreamBeginCapture", do_stream_begin_capture, 0},
    {"cudaStreamCreate", do_stream_create, 0},
    {"cudaStreamCreateWithFlags", do_stream_create, 0},
    {"cudaStreamCreateWithPriority", do_stream_create_with_priority, 0},
    {"cudaStreamDestroy", do_stream_destroy, 0},
    {"cudaStreamEndCapture", do_stream_end_capture, 0},
    {"cudaStreamGetCaptureInfo", do_stream_is_capturing, 0},
    {"cudaStreamGetCaptureInfo_v2", do_stream_is_capturing, 0},
    {"cudaStreamGetCaptureInfo_v3", do_stream_is_capturing, 0},
    {"cudaStreamGetDevice", do_stream_get, 0},
    {"cudaStreamGetFlags", do_stream_get, 0},
    {"cudaStreamGetId", do_stream_get, 0},
    {"cudaStreamGetPriority", do_stream_get, 0},
    {"cudaStreamIsCapturing", do_stream_is_capturing, 0},
    {"cudaStreamQuery", do_stream_query, 0},
    {"cudaStreamSynchronize", do_stream_synchronize, 0},
    {"cudaStreamWaitEvent", do_stream_wait_event, 0},
    {"cudaThreadExchangeStreamCaptureMode", do_exchange_capture_mode, 0},
};

static int compare_handlers(const void *key, const void *entry)
{
    return strcmp(key, ((const struct handler *)entry)->name);
}

/* ---- Faults, stubs and the record of calls --------------------------------------------------- */

struct order { /* a fault, a stub or a delay that a test asked for */
    struct order *next;
    char *function; /* NULL: all of them (stubs only) */
    int error;
    long remaining; /* calls until it strikes; 0: every call. Of a delay its microseconds. */
    long fail_index;
};

static struct order *faults, *stubs, *delays;
static atomic_int orders_given, recording;
static char *recorded[MAX_CALLS];
static size_t recorded_first, recorded_count;
static atomic_llong recorded_dropped;

static void orders_free(struct order **list)
{
    while (*list) {
        struct order *order = *list;
        *list = order->next;
        free(order->function);
        free(order);
    }
}

static struct order *order_new(const char *function)
{
    struct order *order = must(calloc(1, sizeof *order));
    if (function && *function)
        order->function = must(strdup(function));
    return order;
}

/* Whether a fault strikes this call; counts every fault of the function down. */
static int fault_strikes(const char *function, int *error, long *fail_index)
{
    int strikes = 0;
    pthread_mutex_lock(&control);
    for (struct order **link = &faults; *link;) {
        struct order *fault = *link;
        int every = fault->remaining == 0;
        if (strcmp(fault->function, function) || (!every && --fault->remaining)) {
            link = &fault->next;
            continue;
        }
        strikes = 1;
        *error = fault->error;
        *fail_index = fault->fail_index;
        if (every) {
            link = &fault->next;
        } else {
            *link = fault->next;
            free(fault->function);
            free(fault);
        }
    }
    pthread_mutex_unlock(&control);
    return strikes;
}

static int is_stub(const char *function)
{
    int found = 0;
    pthread_mutex_lock(&control);
    for (const struct order *stub = stubs; stub && !found; stub = stub->next)
        found = !stub->function || strcmp(stub->function, function) == 0;
    pthread_mutex_unlock(&control);
    return found;
}

/* The caller of a real function is kept as long as that takes its CPU. */
static void delay(const char *function)
{
    long us = 0;
    pthread_mutex_lock(&control);
    const struct order *order = delays;
    while (order && strcmp(order->function, function))
        order = order->next;
    if (order)
        us = order->remaining;
    pthread_mutex_unlock(&control);
    struct timespec left = {us / 1000000, us % 1000000 * 1000};
    while (us && nanosleep(&left, &left) && errno == EINTR)
        ;
}

static int is_signed(const char *type)
{
    static const char *const names[] = {"int",    "long",    "short", "char",
                                        "signed", "ssize_t", "enum"};
    if (strchr(type, '*'))
        return 0;
    while (strncmp(type, "const ", 6) == 0)
        type += 6;
    for (size_t i = 0; i < COUNT(names); i++)
        if (strncmp(type, names[i], strlen(names[i])) == 0)
            return 1;
    return 0;
}

static int by_value(const struct emu_arg *arg)
{
    const char *type = arg->type;
    while (strncmp(type, "const ", 6) == 0)
        type += 6;
    return arg->size > 8 ||
           ((strncmp(type, "struct", 6) == 0 || strncmp(type, "union", 5) == 0) &&
            !strchr(type, '*'));
}

static void record_call(const struct call *call, int64_t result)
{
    struct text text = {0};
    text_add(&text, "{\"function\": ");
    text_string(&text, call->function);
    text_add(&text, ", \"symbol\": ");
    text_string(&text, call->symbol);
    text_add(&text, ", \"variant\": ");
    text_string(&text, call->variant);
    text_add(&text, ", \"arguments\": [");
    for (size_t i = 0; i < call->count; i++) {
        const struct emu_arg *arg = &call->args[i];
        text_add(&text, "%s{\"name\": ", i ? ", " : "");
        text_string(&text, arg->name);
        text_add(&text, ", \"type\": ");
        text_string(&text, arg->type);
        if (by_value(arg)) {
            text_add(&text, ", \"bytes\": ");
            text_hex(&text, arg->value, arg->size);
        } else if (strcmp(arg->type, "float") == 0) {
            float value;
            memcpy(&value, arg->value, sizeof value);
            text_add(&text, ", \"value\": %.9g", (double)value);
        } else if (strcmp(arg->type, "double") == 0) {
            double value;
            memcpy(&value, arg->value, sizeof value);
            text_add(&text, ", \"value\": %.17g", value);
        } else {
            uint64_t value = 0;
            memcpy(&value, arg->value, arg->size);
            unsigned unused = 64 - 8 * (unsigned)arg->size;
            if (is_signed(arg->type) && arg->size)
                text_add(&text, ", \"value\": %" PRId64, (int64_t)(value << unused) >> unused);
            else
                text_add(&text, ", \"value\": %" PRIu64, value);
        }
        text_add(&text, "}");
    }
    text_add(&text, "], \"result\": %" PRId64, result);
    if (call->observed.length) {
        text_add(&text, ", \"observed\": {");
        text_bytes(&text, call->observed.data, call->observed.length);
        text_add(&text, "}");
    }
    text_add(&text, "}");
    pthread_mutex_lock(&control);
    if (recorded_count == MAX_CALLS) { /* the newest are the ones worth keeping */
        free(recorded[recorded_first]);
        recorded_first = (recorded_first + 1) % MAX_CALLS;
        recorded_count--;
        atomic_fetch_add(&recorded_dropped, 1);
    }
    recorded[(recorded_first + recorded_count++) % MAX_CALLS] = text.data;
    pthread_mutex_unlock(&control);
}

static void record_clear(void)
{
    while (recorded_count) {
        free(recorded[recorded_first]);
        recorded_first = (recorded_first + 1) % MAX_CALLS;
        recorded_count--;
    }
    atomic_store(&recorded_dropped, 0);
}

int64_t emu_dispatch(const char *function, const char *symbol, const char *variant,
                     const struct emu_arg *args, size_t count)
{
    struct call call = {.function = function,
                        .symbol = symbol,
                        .variant = variant,
                        .args = args,
                        .count = count,
                        .recording = atomic_load_explicit(&recording, memory_order_relaxed),
                        .fault_index = -1};
    atomic_fetch_add_explicit(&calls_made, 1, memory_order_relaxed);
    int names = strcmp(function, "cudaGetErrorName") == 0;
    int64_t result = SUCCESS;
    if (names || strcmp(function, "cudaGetErrorString") == 0) {
        result = (int64_t)(intptr_t)error_text(&call, names);
    } else {
        const struct handler *handler = bsearch(function, handlers, COUNT(handlers),
                                                sizeof handlers[0], compare_handlers);
        int flags = handler ? handler->flags : strncmp(function, "cuda", 4) ? DRIVER : 0;
        int ordered = atomic_load_explicit(&orders_given, memory_order_relaxed), error = 0;
        long fail_index = -1;
        if (ordered)
            delay(function);
        if (ordered && fault_strikes(function, &error, &fail_index) && fail_index < 0) {
            result = error;
        } else if (ordered && is_stub(function)) {
            result = error;
        } else if (!(flags & ANY_TIME) && !atomic_load(&driver_version)) {
            result = INSUFFICIENT_DRIVER;
        } else if (fail_index >= 0 && !(flags & BATCH)) {
            result = error;
        } else if (handler) {
            call.fault_error = error;
            call.fault_index = fail_index;
            result = handler->run(&call);
        }
        if (result && !(flags & (DRIVER | QUIET)))
            last_error = (int)result;
    }
    if (call.recording)
        record_call(&call, result);
    free(call.observed.data);
    return result;
}

_Noreturn void emu_trap(const char *function)
{
    fprintf(stderr,
            "kvsig emulated runtime: %s called by a prototype that was never proven for version "
            "%d.%d\n",
            function, atomic_load(&runtime_version) / 1000,
            atomic_load(&runtime_version) % 1000 / 10);
    fflush(stderr);
    abort();
}

/* ---- What kvsig/emulated.py calls ------------------------------------------------------------ */

void kvsig_emulated_abi(int *since, int *before)
{
    *since = emu_abi_since;
    *before = emu_abi_before;
}

void kvsig_emulated_set_version(int runtime, int driver)
{
    atomic_store(&runtime_version, runtime);
    atomic_store(&driver_version, driver);
}

void kvsig_emulated_set_devices(int count)
{
    atomic_store(&device_count, count < 0 ? 0 : count > MAX_DEVICES ? MAX_DEVICES : count);
}

void kvsig_emulated_set_attribute(int attribute, int value)
{
    if (attribute < 0 || attribute >= MAX_ATTRIBUTES)
        return;
    pthread_mutex_lock(&control);
    device_attributes[attribute] = value;
    pthread_mutex_unlock(&control);
}

void kvsig_emulated_fault(const char *function, int error, long nth_call, long fail_index)
{
    struct order *fault = order_new(function);
    if (!fault->function) {
        free(fault);
        return;
    }
    fault->error = error;
    fault->remaining = nth_call;
    fault->fail_index = fail_index;
    pthread_mutex_lock(&control);
    fault->next = faults;
    faults = fault;
    atomic_store(&orders_given, 1);
    pthread_mutex_unlock(&control);
}

void kvsig_emulated_stub(const char *function, int on)
{
    pthread_mutex_lock(&control);
    if (on) {
        struct order *stub = order_new(function);
        stub->next = stubs;
        stubs = stub;
        atomic_store(&orders_given, 1);
    }
    for (struct order **link = &stubs; !on && *link;) {
        struct order *stub = *link;
        if (function && *function && (!stub->function || strcmp(stub->function, function))) {
            link = &stub->next;
            continue;
        }
        *link = stub->next;
        free(stub->function);
        free(stub);
    }
    pthread_mutex_unlock(&control);
}

void kvsig_emulated_delay(const char *function, long microseconds)
{
    struct order *order = order_new(function);
    order->remaining = microseconds;
    if (!order->function) {
        free(order);
        return;
    }
    pthread_mutex_lock(&control);
    order->next = delays;
    delays = order; /* the newest is found first */
    atomic_store(&orders_given, 1);
    pthread_mutex_unlock(&control);
}

void kvsig_emulated_record(int on)
{
    pthread_mutex_lock(&control);
    if (on)
        record_clear();
    atomic_store(&recording, on != 0);
    pthread_mutex_unlock(&control);
}

char *kvsig_emulated_calls(void)
{
    struct text text = {0};
    text_bytes(&text, "[", 1);
    pthread_mutex_lock(&control);
    for (size_t i = 0; i < recorded_count; i++) {
        const char *entry = recorded[(recorded_first + i) % MAX_CALLS];
        if (i)
            text_bytes(&text, ",\n", 2);
        text_bytes(&text, entry, strlen(entry));
    }
    pthread_mutex_unlock(&control);
    text_bytes(&text, "]", 1);
    return text.data;
}

void kvsig_emulated_free(void *text)
{
    free(text);
}

long long kvsig_emulated_counter(const char *name)
{
    static const struct {
        const char *name;
        atomic_llong *value;
    } counters[] = {
        {"calls", &calls_made},        {"operations", &operations_done},
        {"copies", &copies_done},      {"bytes", &bytes_done},
        {"batches", &batches_taken},   {"dropped", &recorded_dropped},
    };
    for (size_t i = 0; i < COUNT(counters); i++)
        if (strcmp(counters[i].name, name) == 0)
            return atomic_load(counters[i].value);
    return -1;
}

static int set_held(void *handle, int held)
{
    pthread_mutex_lock(&queues);
    struct stream *stream = stream_find(handle);
    if (stream) {
        stream->held = held;
        pthread_cond_signal(&stream->wake);
    }
    pthread_mutex_unlock(&queues);
    return stream ? SUCCESS : INVALID_HANDLE;
}

int kvsig_emulated_hold(void *stream)
{
    return set_held(stream, 1);
}

int kvsig_emulated_release(void *stream)
{
    return set_held(stream, 0);
}

long long kvsig_emulated_pending(void *handle)
{
    pthread_mutex_lock(&queues);
    const struct stream *stream = stream_find(handle);
    long long pending = stream ? (long long)(stream->submitted - stream->done) : -1;
    pthread_mutex_unlock(&queues);
    return pending;
}

/*
 * Streams for tests, on any version: past its last range even cudaStreamCreateWithFlags is a trap.
 * No fault strikes them and no record shows them.
 */
void *kvsig_emulated_stream_create(unsigned flags)
{
    pthread_mutex_lock(&queues);
    struct stream *stream = stream_new(current_device, flags, 0);
    pthread_mutex_unlock(&queues);
    return stream;
}

static int run_on_stream(int (*run)(struct call *call), void *stream)
{
    const struct emu_arg arg = {"stream", "cudaStream_t", &stream, sizeof stream};
    struct call call = {.symbol = "", .args = &arg, .count = 1};
    return run(&call);
}

int kvsig_emulated_stream_synchronize(void *stream)
{
    return run_on_stream(do_stream_synchronize, stream);
}

int kvsig_emulated_stream_query(void *stream)
{
    return run_on_stream(do_stream_query, stream);
}

int kvsig_emulated_stream_destroy(void *stream)
{
    return run_on_stream(do_stream_destroy, stream);
}

int kvsig_emulated_mark_device(void *pointer, size_t size)
{
    if (!pointer || !size)
        return INVALID_VALUE;
    pthread_mutex_lock(&memory);
    int added = block_add(pointer, size, MEMORY_DEVICE, 0, 0);
    pthread_mutex_unlock(&memory);
    return added ? SUCCESS : ALREADY_REGISTERED;
}

int kvsig_emulated_unmark_device(void *pointer)
{
    pthread_mutex_lock(&memory);
    struct block *block = block_of((uintptr_t)pointer);
    int found = block && !block->owned && !block->registered &&
                block->start == (uintptr_t)pointer;
    if (found)
        block_remove(block);
    pthread_mutex_unlock(&memory);
    return found ? SUCCESS : NOT_REGISTERED;
}

static struct timespec in_seconds(int seconds)
{
    struct timespec limit;
    clock_gettime(CLOCK_REALTIME, &limit);
    limit.tv_sec += seconds;
    return limit;
}

/*
 * Forgets what a test asked for, ends captures and lets all queues run dry. Answers NOT_READY
 * where one does not within ten seconds. Versions stay, since a program has bound itself to them.
 */
int kvsig_emulated_reset(void)
{
    pthread_mutex_lock(&control);
    orders_free(&faults);
    orders_free(&stubs);
    orders_free(&delays);
    atomic_store(&orders_given, 0);
    atomic_store(&recording, 0);
    record_clear();
    attributes_reset();
    pthread_mutex_unlock(&control);
    atomic_store(&device_count, 1);
    current_device = 0;
    last_error = SUCCESS;
    capture_mode = CAPTURE_GLOBAL;

    pthread_mutex_lock(&memory);
    for (size_t i = block_count; i-- > 0;) /* what was marked may have been freed meanwhile */
        if (!blocks[i].owned && !blocks[i].registered)
            block_remove(&blocks[i]);
    pthread_mutex_unlock(&memory);

    struct timespec limit = in_seconds(10);
    int error = SUCCESS;
    pthread_mutex_lock(&queues);
    for (struct stream *stream = streams; stream; stream = stream->next) {
        if (stream->capture)
            capture_abandon(stream->capture);
        stream->held = 0;
        pthread_cond_signal(&stream->wake);
    }
    waiters++;
    for (struct stream *stream = streams; stream && !error;) {
        if (!stream_pending(stream)) {
            stream = stream->next;
        } else {
            if (pthread_cond_timedwait(&progress, &queues, &limit) == ETIMEDOUT)
                error = NOT_READY;
            stream = streams; /* the list may have changed meanwhile */
        }
    }
    waiters--;
    pthread_mutex_unlock(&queues);
    atomic_store(&calls_made, 0);
    atomic_store(&operations_done, 0);
    atomic_store(&copies_done, 0);
    atomic_store(&bytes_done, 0);
    atomic_store(&batches_taken, 0);
    return error;
}

__attribute__((constructor)) static void start(void)
{
    Dl_info info;
    atomic_store(&runtime_version, emu_abi_since);
    atomic_store(&driver_version, emu_abi_since);
    attributes_reset();
    pthread_key_create(&thread_streams_key, thread_streams_free);
    /* Found while the path still holds; never unmapped, since queues run code of this library. */
    if (dladdr((void *)(uintptr_t)emu_dispatch, &info) && info.dli_fname)
        self = dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD | RTLD_NODELETE);
}

/* At process exit queues stop where they are, held or not: what they would copy to may be gone. */
__attribute__((destructor)) static void stop(void)
{
    struct timespec limit = in_seconds(2);
    pthread_mutex_lock(&queues);
    stopping = 1;
    waiters++;
    while (working && pthread_cond_timedwait(&progress, &queues, &limit) != ETIMEDOUT)
        continue;
    pthread_mutex_unlock(&queues);
}
