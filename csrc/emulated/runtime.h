/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the files of the emulated CUDA runtime share. Device memory is host memory, streams are
 * queues with a thread each, and work is done when its turn comes, never when it is submitted. It
 * answers as real runtimes were seen to answer, refusals included, and is stricter where strictness
 * finds mistakes: the copies of a batch run last to first, and a source that may be read early is.
 *
 * Locks: `queues` guards streams, events, captures and graphs, `memory` the table of blocks and
 * what was loaded, `control` faults, stubs, delays and recorded calls. No two are ever held at once,
 * but by a fork, which takes all three.
 */
#ifndef KVSIG_EMULATED_RUNTIME_H
#define KVSIG_EMULATED_RUNTIME_H

#define _GNU_SOURCE
#include "emulated.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* Hidden, as what emulated.h shares with the glue. */
#pragma GCC visibility push(hidden)

enum {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    INITIALIZATION_ERROR = 3,
    INVALID_PITCH = 12,
    INVALID_DIRECTION = 21,
    STUB_LIBRARY = 34,
    INSUFFICIENT_DRIVER = 35,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_HANDLE = 400,
    ILLEGAL_STATE = 401,
    NOT_FOUND = 500,
    NOT_READY = 600,
    FIRST_STICKY = 700, /* from here on a context is lost for good */
    LAST_STICKY = 719,
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

enum { MAX_DEVICES = 16, MAX_ATTRIBUTES = 256 };
enum { CAPTURE_GLOBAL = 0, CAPTURE_THREAD_LOCAL = 1, CAPTURE_RELAXED = 2 };
enum { MEMORY_UNREGISTERED = 0, MEMORY_HOST = 1, MEMORY_DEVICE = 2, MEMORY_MANAGED = 3 };

#define LEGACY_STREAM ((void *)(uintptr_t)1)
#define PER_THREAD_STREAM ((void *)(uintptr_t)2)
#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

extern pthread_mutex_t queues, memory, control;
extern atomic_int runtime_version, driver_version, device_count;
extern _Thread_local int current_device, last_error;
extern atomic_llong calls_made, calls_unknown, operations_done, copies_done, bytes_done,
    batches_taken, launches_done, recorded_dropped;

/* ---- text.c ------------------------------------------------------------------------------ */

struct text {
    char *data;
    size_t length, room;
};

void *must(void *pointer);
void text_bytes(struct text *text, const char *data, size_t length);
__attribute__((format(printf, 2, 3))) void text_add(struct text *text, const char *format, ...);
void text_string(struct text *text, const char *string);
void text_hex(struct text *text, const void *data, size_t size);

/* ---- call.c ------------------------------------------------------------------------------ */

struct call {
    const char *function, *symbol, *variant;
    const struct emu_arg *args;
    size_t count;
    int recording;
    struct text observed; /* JSON members: what the arguments point to */
    int fault_error;      /* a fault ordered at one copy of a batch */
    long fault_index;
};

const struct emu_arg *find_arg(const struct call *call, const char *name);
uint64_t arg_u64(const struct call *call, const char *name, uint64_t missing);
int arg_int(const struct call *call, const char *name, int missing);
void *arg_pointer(const struct call *call, const char *name);
/* The first of two names, as some parameters were renamed between releases. */
void *arg_pointer2(const struct call *call, const char *name, const char *other);
void *arg_stream(const struct call *call);
int store_int(const struct call *call, const char *name, int value);
int recording_now(void);
void record_call(const struct call *call, int64_t result);
void record_reset(void); /* with `control` held */

/* ---- kernels.c: what a launch runs ------------------------------------------------------- */

/* Of a struct kvsig_page_copy: page_copy.c checks it. */
#define PAGE_COPY_BYTES 2160

struct launch { /* the shape of one launch */
    unsigned grid[3], block[3], cluster[3];
    unsigned shared; /* bytes of dynamic shared memory */
};

/* Does what a whole launch of the kernel does. PARAMS points to its parameters, as CUDA's does. */
typedef void (*kernel_double)(void **params, const struct launch *shape);

struct kernel {
    const char *name; /* of the extern "C" function on the GPU */
    kernel_double run;
    size_t count;        /* parameters */
    const size_t *sizes; /* bytes of each */
};

const struct kernel *kernel_find(const char *name);
const struct kernel *kernel_at(size_t index); /* NULL behind the last */

/* ---- work.c ------------------------------------------------------------------------------ */

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

enum kind {
    WORK_NOTHING,
    WORK_COPIES,
    WORK_ROWS,
    WORK_SET,
    WORK_CALL,
    WORK_GRAPH,
    WORK_LAUNCH,
    WORK_WAIT,
    WORK_WRITE,
};

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
        struct {
            uint32_t *address, value;
            unsigned flags;
        } word; /* of WORK_WAIT and WORK_WRITE */
        struct {
            const struct kernel *kernel;
            struct launch shape;
            void **params; /* and behind the pointers the values */
        } launch;
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

extern atomic_int giving_up; /* queued waits for a value end at once */

struct work *work_new(enum kind kind, size_t copies, size_t rows);
struct copy *work_copies(struct work *work);
struct rows *work_rows(struct work *work);
void work_drop(struct work *work);
void work_run(struct work *work);
struct graph *graph_new(unsigned magic);
void graph_drop(struct graph *graph);
void graph_add(struct graph *graph, struct work *work);

/* ---- queues.c: all but submit, unsafe_call and refuse_captured with `queues` held ---------- */

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

enum {
    EVENT_MAGIC = 0x4b564556,
    GRAPH_MAGIC = 0x4b564752,
    EXEC_MAGIC = 0x4b564558,
};

extern struct stream *streams;

struct stream *stream_new(int device, unsigned flags, int priority);
struct stream *stream_find(void *handle);
void stream_drop(struct stream *stream);
void stream_destroy(struct stream *stream);
int stream_pending(const struct stream *stream);
size_t stream_needs(const struct stream *stream, struct need *needs);
void event_drop(struct event *event);
struct capture *legacy_capture(const struct stream *stream);
void invalidate(struct capture *capture);
void capture_end(struct capture *capture);
void capture_abandon(struct capture *capture);
int enqueue(struct stream *stream, struct work *work, const struct need *after,
            struct event *event);
void wait_for(struct stream *stream, uint64_t seq);
void wait_stream(struct stream *stream);
int submit(void *handle, struct work *work);
int unsafe_call(void);
int refuse_captured(void *handle);
int any_pending(void);
int queues_drain(int seconds);
void queues_after_fork(void);

/* ---- memory.c ---------------------------------------------------------------------------- */

/* Whether SIZE bytes from POINTER are not all of one block, or all of none. */
int leaves_block(const void *pointer, size_t size);
int memory_type(const void *pointer);
int check_direction(int kind, const void *dst, const void *src);
void memory_reset(void);

/* ---- devices.c, control.c, process.c ------------------------------------------------------- */

void attributes_reset(void); /* with `control` held */
int device_attribute(int attribute, int device, int *value);
void set_device_attribute(int attribute, int value);
const char *error_text(int code, int name);

struct ordered { /* what a test has ordered for one call */
    int fault, stub, error;
    long fail_index; /* of a fault at one copy; -1 for the whole call */
};

struct ordered orders_for(const char *function);
void orders_reset(void); /* with `control` held */

enum { /* what a handler's function needs, and what it does to the last error */
    ANY_TIME = 1,   /* answers without a driver and without a device */
    BATCH = 2,      /* takes a fault at one copy */
    DRIVER = 4,     /* the driver's: no last error */
    QUIET = 8,      /* leaves the last error alone */
    ASKS_DRIVER = 16, /* ANY_TIME, but a driver that is a stub says so */
};

int driver_shown(void);        /* the version that the driver says it has */
int state_refuses(int flags);  /* the error that the state of driver and process answers, or 0 */
int state_sticky(void);        /* the error of a lost device, or 0 */
int process_forked(void);
void process_initialised(void);
void state_reset(void);

/* ---- What the functions do --------------------------------------------------------------- */

typedef int handler_function(struct call *call);

handler_function do_malloc, do_malloc_managed, do_malloc_host, do_free, do_free_host,
    do_host_register, do_host_unregister, do_host_get_device_pointer, do_pointer_get_attributes,
    do_pointer_get_attribute, do_mem_get_info;
handler_function do_memcpy_async, do_memcpy_2d_async, do_memcpy_3d_async, do_memset_async,
    do_mem_prefetch_async, do_mem_advise;
handler_function do_memcpy_batch_async, do_memcpy_3d_batch_async,
    do_memcpy_3d_with_attributes_async, do_memcpy_with_attributes_async;
handler_function do_stream_create, do_stream_create_with_priority, do_stream_destroy,
    do_stream_synchronize, do_stream_query, do_stream_get_priority, do_stream_get_id, do_device_synchronize,
    do_launch_host_func, do_stream_wait_value, do_stream_write_value;
handler_function do_event_create, do_event_destroy, do_event_record, do_event_query,
    do_event_synchronize, do_event_elapsed_time, do_stream_wait_event;
handler_function do_stream_is_capturing, do_stream_begin_capture, do_stream_end_capture,
    do_graph_instantiate, do_graph_launch, do_graph_destroy, do_graph_exec_destroy,
    do_graph_get_edges;
handler_function do_runtime_get_version, do_driver_get_version, do_get_device_count, do_get_device,
    do_set_device, do_device_get_attribute, do_get_last_error, do_peek_at_last_error,
    do_context_get_current, do_context_set_current, do_context_get_device, do_context_retain,
    do_context_release, do_device_get;
handler_function do_entry_point, do_initialise, do_driver_error_text;
handler_function do_module_load, do_module_unload, do_module_get_function,
    do_function_get_attribute, do_function_set_attribute, do_launch_kernel, do_launch_kernel_ex;
handler_function do_nvrtc_version, do_nvrtc_create, do_nvrtc_compile, do_nvrtc_destroy,
    do_nvrtc_size, do_nvrtc_text, do_nvrtc_arch_count, do_nvrtc_archs;

/* Functions that answer a text and no code. */
const char *nvrtc_error_text(int code);

/* What stands for compiled code: this line, then the names of its kernels, a line each. */
#define IMAGE_HEAD "kvsig emulated device code\n"

#pragma GCC visibility pop

#endif
