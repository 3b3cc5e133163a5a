/* SPDX-License-Identifier: Apache-2.0 */
/* The calls on captures and graphs. */
#include "runtime.h"

static uint64_t next_capture_id = 1; /* guarded by `queues` */

int do_stream_is_capturing(struct call *call)
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

int do_stream_begin_capture(struct call *call)
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

int do_stream_end_capture(struct call *call)
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

static struct graph *graph_of(const struct call *call, const char *name, unsigned magic)
{
    struct graph *graph = arg_pointer(call, name);
    return graph && graph->magic == magic ? graph : NULL;
}

int do_graph_instantiate(struct call *call)
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

int do_graph_launch(struct call *call)
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

int do_graph_destroy(struct call *call)
{
    return drop_graph(call, "graph", GRAPH_MAGIC);
}

int do_graph_exec_destroy(struct call *call)
{
    return drop_graph(call, "graphExec", EXEC_MAGIC);
}

/* Captured work is a chain here, whatever streams it came from. */
int do_graph_get_edges(struct call *call)
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
