/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a C programmer would write by hand: page copies on raw pointers, with nothing around them.
 *
 * This is what kvsig's calls are measured against, and what benchmarks/explore.py tries ideas
 * with. Being the thing to compare with, it is the one place where prototypes of CUDA functions
 * are written by hand; functions come in as addresses, so that it links to no libcudart.
 *
 * Every function answers the first error of CUDA, or 0, and stores the host's time in
 * nanoseconds in *elapsed.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#define MOST 65536 /* entries of the array of attribute indices, which is all zero */

struct attributes {
    int src_access_order;
    int source_hint[2], destination_hint[2];
    unsigned flags;
};

/* 13.x has no failIdx; 12.8 and 12.9 have it before the stream. */
typedef int (*batch_8)(void *const *, const void *const *, const size_t *, size_t,
                       struct attributes *, size_t *, size_t, void *);
typedef int (*batch_9)(void **, void **, size_t *, size_t, struct attributes *, size_t *, size_t,
                       size_t *, void *);
typedef int (*copy_1d)(void *, const void *, size_t, int, void *);
typedef int (*copy_2d)(void *, size_t, const void *, size_t, size_t, size_t, int, void *);

struct pitched { void *ptr; size_t pitch, xsize, ysize; };
struct parms_3d {
    void *src_array; size_t src_pos[3]; struct pitched src;
    void *dst_array; size_t dst_pos[3]; struct pitched dst;
    size_t extent[3];
    int kind;
};
typedef int (*copy_3d)(const struct parms_3d *, void *);

#define KIND_DEFAULT 4 /* cudaMemcpyDefault: told by the addresses */

static size_t zeros[MOST];

static int64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static int one_batch(void *function, int parameters, uint64_t *dsts, uint64_t *srcs, size_t *sizes,
                     size_t count, int order, unsigned flags, void *stream)
{
    struct attributes attributes;
    size_t failed;
    memset(&attributes, 0, sizeof attributes);
    attributes.src_access_order = order;
    attributes.flags = flags;
    if (parameters == 9)
        return ((batch_9)function)((void **)dsts, (void **)srcs, sizes, count, &attributes, zeros,
                                   1, &failed, stream);
    return ((batch_8)function)((void *const *)dsts, (const void *const *)srcs, sizes, count,
                               &attributes, zeros, 1, stream);
}

/* Batches of per_call copies, over the streams in turn. */
int baseline_batch(void *function, int parameters, uint64_t *dsts, uint64_t *srcs, size_t *sizes,
                   size_t count, size_t per_call, int order, unsigned flags, void **streams,
                   size_t stream_count, int64_t *elapsed)
{
    int64_t begin = now();
    size_t start, call = 0;
    int code = 0;
    if (per_call > MOST)
        per_call = MOST;
    for (start = 0; start < count && code == 0; start += per_call) {
        size_t amount = count - start < per_call ? count - start : per_call;
        code = one_batch(function, parameters, dsts + start, srcs + start, sizes + start, amount,
                         order, flags, streams[call++ % stream_count]);
    }
    *elapsed = now() - begin;
    return code;
}

/* One cudaMemcpyAsync for each copy, over the streams in turn. */
int baseline_loop(void *function, uint64_t *dsts, uint64_t *srcs, size_t *sizes, size_t count,
                  void **streams, size_t stream_count, int64_t *elapsed)
{
    int64_t begin = now();
    int code = 0;
    for (size_t i = 0; i < count && code == 0; i++)
        code = ((copy_1d)function)((void *)dsts[i], (const void *)srcs[i], sizes[i], KIND_DEFAULT,
                                   streams[i % stream_count]);
    *elapsed = now() - begin;
    return code;
}

/* One cudaMemcpy2DAsync for each row of ops: dst, dpitch, src, spitch, width, height. */
int baseline_strided(void *function, const uint64_t *ops, size_t count, void **streams,
                     size_t stream_count, int64_t *elapsed)
{
    int64_t begin = now();
    int code = 0;
    for (size_t i = 0; i < count && code == 0; i++, ops += 6)
        code = ((copy_2d)function)((void *)ops[0], ops[1], (const void *)ops[2], ops[3], ops[4],
                                   ops[5], KIND_DEFAULT, streams[i % stream_count]);
    *elapsed = now() - begin;
    return code;
}

/*
 * One cudaMemcpy3DAsync for each row of ops: dst, dpitch, rows from one slice to the next there,
 * src, spitch, rows from one slice to the next there, width, height, depth.
 */
int baseline_3d(void *function, const uint64_t *ops, size_t count, void **streams,
                size_t stream_count, int64_t *elapsed)
{
    int64_t begin = now();
    int code = 0;
    for (size_t i = 0; i < count && code == 0; i++, ops += 9) {
        struct parms_3d parms;
        memset(&parms, 0, sizeof parms);
        parms.dst.ptr = (void *)ops[0];
        parms.dst.pitch = ops[1];
        parms.dst.xsize = ops[1];
        parms.dst.ysize = ops[2];
        parms.src.ptr = (void *)ops[3];
        parms.src.pitch = ops[4];
        parms.src.xsize = ops[4];
        parms.src.ysize = ops[5];
        parms.extent[0] = ops[6];
        parms.extent[1] = ops[7];
        parms.extent[2] = ops[8];
        parms.kind = KIND_DEFAULT;
        code = ((copy_3d)function)(&parms, streams[i % stream_count]);
    }
    *elapsed = now() - begin;
    return code;
}

/*
 * Batches, and between two of them `strided_per_call` strided copies: what the copy engine can do
 * while the CPU stages small copies inside the batch call.
 */
int baseline_mixed(void *batch, int parameters, uint64_t *dsts, uint64_t *srcs, size_t *sizes,
                   size_t count, size_t per_call, void *strided, const uint64_t *ops,
                   size_t strided_count, size_t strided_per_call, void **streams,
                   size_t stream_count, int64_t *elapsed)
{
    int64_t begin = now();
    size_t start = 0, op = 0, i;
    int code = 0;
    while ((start < count || op < strided_count) && code == 0) {
        for (i = 0; i < strided_per_call && op < strided_count && code == 0; i++, op++)
            code = ((copy_2d)strided)((void *)ops[6 * op], ops[6 * op + 1],
                                      (const void *)ops[6 * op + 2], ops[6 * op + 3],
                                      ops[6 * op + 4], ops[6 * op + 5], KIND_DEFAULT,
                                      streams[stream_count - 1]);
        if (start < count && code == 0) {
            size_t amount = count - start < per_call ? count - start : per_call;
            code = one_batch(batch, parameters, dsts + start, srcs + start, sizes + start, amount,
                             1, 0, streams[0]);
            start += amount;
        } else if (strided_per_call == 0) {
            break;
        }
    }
    *elapsed = now() - begin;
    return code;
}

struct share {
    void *function;
    int parameters;
    uint64_t *dsts, *srcs;
    size_t *sizes;
    size_t count, per_call;
    void *stream;
    int code;
};

static void *run_share(void *argument)
{
    struct share *share = argument;
    int64_t ignored;
    if (share->parameters == 0)
        share->code = baseline_loop(share->function, share->dsts, share->srcs, share->sizes,
                                    share->count, &share->stream, 1, &ignored);
    else
        share->code = baseline_batch(share->function, share->parameters, share->dsts, share->srcs,
                                     share->sizes, share->count, share->per_call, 1, 0,
                                     &share->stream, 1, &ignored);
    return NULL;
}

/* An equal share of the copies from each of several host threads, each with a stream of its own. */
int baseline_threads(void *function, int parameters, uint64_t *dsts, uint64_t *srcs, size_t *sizes,
                     size_t count, size_t per_call, void **streams, size_t threads,
                     int64_t *elapsed)
{
    pthread_t running[16];
    struct share shares[16];
    int64_t begin = now();
    size_t i, started = 0;
    int code = 0;
    if (threads > 16)
        threads = 16;
    for (i = 0; i < threads; i++) {
        size_t first = count * i / threads, last = count * (i + 1) / threads;
        shares[i] = (struct share){function, parameters, dsts + first, srcs + first, sizes + first,
                                   last - first, per_call, streams[i], 0};
        if (pthread_create(&running[i], NULL, run_share, &shares[i]) != 0) {
            code = -1;
            break;
        }
        started++;
    }
    for (i = 0; i < started; i++) {
        pthread_join(running[i], NULL);
        if (code == 0)
            code = shares[i].code;
    }
    *elapsed = now() - begin;
    return code;
}
