/* SPDX-License-Identifier: Apache-2.0 */
/* The calls on events. */
#include "runtime.h"

static struct event *event_of(void *handle)
{
    struct event *event = handle;
    return event && event->magic == EVENT_MAGIC ? event : NULL;
}

int do_event_create(struct call *call)
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

int do_event_destroy(struct call *call)
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

int do_event_record(struct call *call)
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

int do_stream_wait_event(struct call *call)
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

int do_event_query(struct call *call)
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

int do_event_synchronize(struct call *call)
{
    pthread_mutex_lock(&queues);
    struct event *event = event_of(arg_pointer(call, "event"));
    int error = !event ? INVALID_HANDLE : event->capture_id ? CAPTURED_EVENT : SUCCESS;
    if (!error && event->stream)
        wait_for(event->stream, event->seq);
    pthread_mutex_unlock(&queues);
    return error;
}

int do_event_elapsed_time(struct call *call)
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
