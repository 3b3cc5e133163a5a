/* SPDX-License-Identifier: Apache-2.0 */
/* Queues: one thread for each stream that was ever given work. */
#include "runtime.h"

#include <errno.h>

pthread_mutex_t queues = PTHREAD_MUTEX_INITIALIZER;
struct stream *streams;
static struct stream *legacy[MAX_DEVICES];
static pthread_cond_t progress = PTHREAD_COND_INITIALIZER; /* an operation was finished */
static int waiters, stopping, working;
static uint64_t next_stream_id = 3;
static pthread_key_t thread_streams_key;
static _Thread_local struct stream **thread_streams;

void stream_drop(struct stream *stream)
{
    if (--stream->refs)
        return;
    pthread_cond_destroy(&stream->wake);
    free(stream);
}

void event_drop(struct event *event)
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

struct stream *stream_new(int device, unsigned flags, int priority)
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

int stream_pending(const struct stream *stream)
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
        /* A host function may wait for anything: process exit does not wait for such. */
        enum kind kind = operation->work->kind;
        int counted = kind != WORK_CALL && kind != WORK_GRAPH && kind != WORK_WAIT;
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
void capture_end(struct capture *capture)
{
    for (struct stream *stream = streams; stream; stream = stream->next)
        if (stream->capture == capture)
            stream->capture = NULL;
    free(capture);
}

void capture_abandon(struct capture *capture)
{
    graph_drop(capture->graph);
    capture_end(capture);
}

void stream_destroy(struct stream *stream)
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
struct stream *stream_find(void *handle)
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

struct capture *legacy_capture(const struct stream *stream)
{
    /* What the legacy stream would have to wait for, were it used now. */
    for (struct stream *other = streams; other; other = other->next)
        if (other->blocking && other->capture && other->device == stream->device)
            return other->capture;
    return NULL;
}

void invalidate(struct capture *capture)
{
    capture->status = 2;
}

/* The streams that STREAM is ordered after besides itself: how many, and into NEEDS if given. */
size_t stream_needs(const struct stream *stream, struct need *needs)
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

static int capture_work(struct stream *stream, struct work *work)
{
    int error = stream->capture->status == 1 ? SUCCESS : CAPTURE_INVALIDATED;
    if (!error && work->kind != WORK_NOTHING) {
        struct graph *into = stream->capture->graph;
        size_t count = work->kind == WORK_GRAPH ? work->graph->count : 1;
        for (size_t i = 0; i < count; i++)
            graph_add(into, work->kind == WORK_GRAPH ? work->graph->work[i] : work);
        stream->captured++;
    }
    work_drop(work);
    return error;
}

static int start_worker(struct stream *stream)
{
    pthread_t thread;
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    stream->started = pthread_create(&thread, &attributes, stream_worker, stream) == 0;
    pthread_attr_destroy(&attributes);
    return stream->started;
}

/*
 * Puts WORK at the end of STREAM, or into the graph that STREAM is captured into. Takes over the
 * caller's reference to WORK, whatever the answer. Called with `queues` held.
 */
int enqueue(struct stream *stream, struct work *work, const struct need *after,
                   struct event *event)
{
    if (stream->capture)
        return capture_work(stream, work);
    if (stream->legacy) {
        struct capture *capture = legacy_capture(stream);
        if (capture) {
            invalidate(capture);
            work_drop(work);
            return CAPTURE_IMPLICIT;
        }
    }
    if (!stream->started && !start_worker(stream)) {
        work_drop(work);
        return OUT_OF_MEMORY;
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

int submit(void *handle, struct work *work)
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
void wait_for(struct stream *stream, uint64_t seq)
{
    stream->refs++;
    waiters++;
    while (stream->done < seq)
        pthread_cond_wait(&progress, &queues);
    waiters--;
    stream_drop(stream);
}

/* Waits for STREAM; the legacy stream stands for all blocking streams as well. */
void wait_stream(struct stream *stream)
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
int unsafe_call(void)
{
    int error = SUCCESS;
    pthread_mutex_lock(&queues);
    for (struct stream *stream = streams; stream; stream = stream->next) {
        struct capture *capture = stream->capture;
        if (!capture || capture->mode == CAPTURE_RELAXED)
            continue;
        if (capture->mode == CAPTURE_GLOBAL || pthread_equal(capture->thread, pthread_self())) {
            invalidate(capture);
            error = CAPTURE_UNSUPPORTED;
        }
    }
    pthread_mutex_unlock(&queues);
    return error;
}

/* For what cannot be captured here; the capture stays valid. */
int refuse_captured(void *handle)
{
    pthread_mutex_lock(&queues);
    const struct stream *stream = stream_find(handle);
    int error = !stream ? INVALID_HANDLE : stream->capture ? CAPTURE_UNSUPPORTED : SUCCESS;
    pthread_mutex_unlock(&queues);
    return error;
}

int any_pending(void)
{
    int pending = 0;
    pthread_mutex_lock(&queues);
    for (struct stream *stream = streams; stream && !pending; stream = stream->next)
        pending = stream_pending(stream);
    pthread_mutex_unlock(&queues);
    return pending;
}

static struct timespec in_seconds(int seconds)
{
    struct timespec limit;
    clock_gettime(CLOCK_REALTIME, &limit);
    limit.tv_sec += seconds;
    return limit;
}

/* Ends captures, lets all queues go on and run dry; NOT_READY where one does not in time. */
int queues_drain(int seconds)
{
    struct timespec limit = in_seconds(seconds);
    int error = SUCCESS;
    pthread_mutex_lock(&queues);
    atomic_store(&giving_up, 1);
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
    atomic_store(&giving_up, 0);
    pthread_mutex_unlock(&queues);
    return error;
}

/* In the child no queue has a thread: what the parent made is forgotten, never waited for. */
void queues_after_fork(void)
{
    streams = NULL;
    memset(legacy, 0, sizeof legacy);
    thread_streams = NULL;
    pthread_setspecific(thread_streams_key, NULL);
    progress = (pthread_cond_t)PTHREAD_COND_INITIALIZER;
    waiters = stopping = working = 0;
}

__attribute__((constructor)) static void queues_start(void)
{
    pthread_key_create(&thread_streams_key, thread_streams_free);
}

/* At process exit queues stop where they are, held or not: what they would copy to may be gone. */
__attribute__((destructor)) static void queues_stop(void)
{
    struct timespec limit = in_seconds(2);
    pthread_mutex_lock(&queues);
    stopping = 1;
    waiters++;
    while (working && pthread_cond_timedwait(&progress, &queues, &limit) != ETIMEDOUT)
        continue;
    pthread_mutex_unlock(&queues);
}
