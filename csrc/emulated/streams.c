/* SPDX-License-Identifier: Apache-2.0 */
/* The calls on streams. */
#include "runtime.h"

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

int do_stream_create(struct call *call)
{
    return create_stream(call, 0);
}

int do_stream_create_with_priority(struct call *call)
{
    int priority = arg_int(call, "priority", 0);
    return create_stream(call, priority < -5 ? -5 : priority > 0 ? 0 : priority);
}

int do_stream_destroy(struct call *call)
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

int do_stream_synchronize(struct call *call)
{
    return synchronize(arg_stream(call));
}

int do_stream_query(struct call *call)
{
    pthread_mutex_lock(&queues);
    struct stream *stream = stream_find(arg_stream(call));
    int error = stream ? capture_refuses(stream) : INVALID_HANDLE;
    if (!error && (stream_pending(stream) || (stream->legacy && stream_needs(stream, NULL))))
        error = NOT_READY;
    pthread_mutex_unlock(&queues);
    return error;
}

int do_device_synchronize(struct call *call)
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

int do_stream_get_priority(struct call *call)
{
    pthread_mutex_lock(&queues);
    const struct stream *stream = stream_find(arg_stream(call));
    int error = stream ? store_int(call, "priority", stream->priority) : INVALID_HANDLE;
    pthread_mutex_unlock(&queues);
    return error;
}

int do_stream_get_id(struct call *call)
{
    pthread_mutex_lock(&queues);
    const struct stream *stream = stream_find(arg_stream(call));
    uint64_t *out = arg_pointer(call, "streamId");
    int error = !stream ? INVALID_HANDLE : out ? SUCCESS : INVALID_VALUE;
    if (!error)
        *out = stream->id;
    pthread_mutex_unlock(&queues);
    return error;
}

int do_launch_host_func(struct call *call)
{
    uintptr_t function = (uintptr_t)arg_pointer(call, "fn");
    if (!function)
        return INVALID_VALUE;
    struct work *work = work_new(WORK_CALL, 0, 0);
    work->call.function = (void (*)(void *))function;
    work->call.data = arg_pointer(call, "userData");
    return submit(arg_stream(call), work);
}

/* The first form of these calls is refused where CanUseStreamMemOps (92) is 0, as it mostly is. */
static int submit_word(struct call *call, enum kind kind)
{
    int allowed = 0;
    if (!strstr(call->symbol, "_v2") && (device_attribute(92, 0, &allowed) || !allowed))
        return NOT_SUPPORTED;
    uint32_t *address = arg_pointer(call, "addr");
    if (!address || (uintptr_t)address % sizeof *address || leaves_block(address, sizeof *address))
        return INVALID_VALUE;
    struct work *work = work_new(kind, 0, 0);
    work->word.address = address;
    work->word.value = (uint32_t)arg_u64(call, "value", 0);
    work->word.flags = (unsigned)arg_u64(call, "flags", 0);
    return submit(arg_stream(call), work);
}

int do_stream_wait_value(struct call *call)
{
    enum { FLUSH = 1 << 30 };
    return arg_u64(call, "flags", 0) & ~(uint64_t)(FLUSH | 3) ? INVALID_VALUE
                                                              : submit_word(call, WORK_WAIT);
}

int do_stream_write_value(struct call *call)
{
    return arg_u64(call, "flags", 0) > 1 ? INVALID_VALUE : submit_word(call, WORK_WRITE);
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
    return stream ? SUCCESS : process_forked() ? INITIALIZATION_ERROR : INVALID_HANDLE;
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
 * No fault strikes them and no record shows them. NULL in a child of a process that used CUDA.
 */
void *kvsig_emulated_stream_create(unsigned flags)
{
    if (process_forked())
        return NULL;
    process_initialised();
    pthread_mutex_lock(&queues);
    struct stream *stream = stream_new(current_device, flags, 0);
    pthread_mutex_unlock(&queues);
    return stream;
}

static int run_on_stream(handler_function *run, void *stream)
{
    const struct emu_arg arg = {"stream", "cudaStream_t", &stream, sizeof stream};
    struct call call = {.symbol = "", .args = &arg, .count = 1};
    return process_forked() ? INITIALIZATION_ERROR : run(&call);
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
