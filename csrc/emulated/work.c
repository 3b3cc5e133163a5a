/* SPDX-License-Identifier: Apache-2.0 */
/* Work: what a queue does when its turn comes. Queues and graphs share it. */
#include "runtime.h"

atomic_llong operations_done, copies_done, bytes_done, launches_done;
atomic_int giving_up;

struct work *work_new(enum kind kind, size_t copies, size_t rows)
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

struct copy *work_copies(struct work *work)
{
    return (struct copy *)(void *)work->list;
}

struct rows *work_rows(struct work *work)
{
    return (struct rows *)(void *)work->list;
}

void work_drop(struct work *work)
{
    if (!work || --work->refs)
        return;
    if (work->kind == WORK_COPIES)
        free(work->copies.early);
    if (work->kind == WORK_GRAPH)
        graph_drop(work->graph);
    if (work->kind == WORK_LAUNCH)
        free(work->launch.params);
    free(work);
}

struct graph *graph_new(unsigned magic)
{
    struct graph *graph = must(calloc(1, sizeof *graph));
    graph->magic = magic;
    graph->refs = 1;
    return graph;
}

void graph_drop(struct graph *graph)
{
    if (!graph || --graph->refs)
        return;
    for (size_t i = 0; i < graph->count; i++)
        work_drop(graph->work[i]);
    free(graph->work);
    graph->magic = 0;
    free(graph);
}

void graph_add(struct graph *graph, struct work *work)
{
    if (graph->count == graph->room) {
        graph->room = graph->room ? graph->room * 2 : 16;
        graph->work = must(realloc(graph->work, graph->room * sizeof *graph->work));
    }
    graph->work[graph->count++] = work;
    work->refs++;
}

static size_t copy_list(const struct copy *copy, size_t count)
{
    size_t bytes = 0;
    /* A batch has no order inside: last to first shows copies that depend on each other. */
    for (size_t i = count; i-- > 0;) {
        memmove(copy[i].dst, copy[i].src, copy[i].size);
        bytes += copy[i].size;
    }
    return bytes;
}

static size_t copy_rows(const struct rows *row, size_t count)
{
    size_t bytes = 0;
    for (size_t i = count; i-- > 0;) {
        for (size_t z = 0; z < row[i].depth; z++)
            for (size_t y = 0; y < row[i].height; y++)
                memmove(row[i].dst + z * row[i].dst_layer + y * row[i].dst_row,
                        row[i].src + z * row[i].src_layer + y * row[i].src_row, row[i].width);
        bytes += row[i].width * row[i].height * row[i].depth;
    }
    return bytes;
}

static void count_copies(size_t copies, size_t bytes)
{
    atomic_fetch_add_explicit(&copies_done, (long long)copies, memory_order_relaxed);
    atomic_fetch_add_explicit(&bytes_done, (long long)bytes, memory_order_relaxed);
}

static int value_reached(uint32_t have, uint32_t want, unsigned how)
{
    switch (how & 3) {
    case 0:
        return (int32_t)(have - want) >= 0; /* GEQ, cyclic */
    case 1:
        return have == want; /* EQ */
    case 2:
        return (have & want) != 0; /* AND */
    default:
        return ~(have | want) != 0; /* NOR */
    }
}

/* Looks again and again; only this stream waits meanwhile, since each has a thread. */
static void wait_for_value(const struct work *work)
{
    const struct timespec pause = {0, 20000};
    while (!value_reached(__atomic_load_n(work->word.address, __ATOMIC_ACQUIRE), work->word.value,
                          work->word.flags) &&
           !atomic_load(&giving_up))
        nanosleep(&pause, NULL);
}

void work_run(struct work *work)
{
    switch (work->kind) {
    case WORK_NOTHING:
        return;
    case WORK_COPIES:
        count_copies(work->copies.count, copy_list(work_copies(work), work->copies.count));
        return;
    case WORK_ROWS:
        count_copies(work->rows, copy_rows(work_rows(work), work->rows));
        return;
    case WORK_SET:
        memset(work->set.dst, work->set.value, work->set.size);
        return;
    case WORK_CALL:
        work->call.function(work->call.data);
        return;
    case WORK_LAUNCH:
        work->launch.kernel->run(work->launch.params, &work->launch.shape);
        atomic_fetch_add_explicit(&launches_done, 1, memory_order_relaxed);
        return;
    case WORK_WAIT:
        wait_for_value(work);
        return;
    case WORK_WRITE:
        __atomic_store_n(work->word.address, work->word.value, __ATOMIC_RELEASE);
        return;
    case WORK_GRAPH:
        for (size_t i = 0; i < work->graph->count; i++)
            work_run(work->graph->work[i]);
        return;
    }
}
