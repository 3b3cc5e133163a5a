/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Many threads and streams on the emulated runtime, for ThreadSanitizer:
 * python packaging/sanitize.py --thread. Linked with the runtime's own sources and the glue of 13.0.
 * Exits with 1 where bytes are out of order.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "emulated.h"

enum { THREADS = 8, WORDS = 64, COPIES = 16 };

struct attributes {
    int order, source_type, source_id, target_type, target_id;
    unsigned flags;
};

int cudaMemcpyAsync(void *dst, const void *src, size_t count, int kind, void *stream);
int cudaMemcpyBatchAsync(void *const *dsts, const void *const *srcs, const size_t *sizes,
                         size_t count, struct attributes *attrs, size_t *indices,
                         size_t attributes, void *stream);
int cudaEventCreateWithFlags(void **event, unsigned flags);
int cudaEventRecord(void *event, void *stream);
int cudaEventDestroy(void *event);
int cudaStreamWaitEvent(void *stream, void *event, unsigned flags);
int cudaStreamSynchronize(void *stream);
int cudaHostRegister(void *ptr, size_t size, unsigned flags);
int cudaHostUnregister(void *ptr);
int cudaGetLastError(void);

static atomic_int stop, wrong;
static atomic_long rounds;

static void expect(int code, const char *what)
{
    if (code != 0) {
        fprintf(stderr, "%s answered %d\n", what, code);
        atomic_store(&wrong, 1);
    }
}

/* Bytes go from a to b on one stream, and behind an event from b to c on another. */
static void *work(void *argument)
{
    unsigned seed = (unsigned)(size_t)argument + 1;
    static _Thread_local unsigned a[COPIES][WORDS], b[COPIES][WORDS], c[COPIES][WORDS];
    void *streams[3] = {kvsig_emulated_stream_create(1), kvsig_emulated_stream_create(0),
                        (void *)2};
    expect(cudaHostRegister(b, sizeof b, 0), "cudaHostRegister");
    while (!atomic_load(&stop)) {
        void *one = streams[rand_r(&seed) % 3], *other = streams[rand_r(&seed) % 3], *event;
        void *dsts[COPIES];
        const void *srcs[COPIES];
        size_t sizes[COPIES], index = 0;
        struct attributes how = {.order = 1};
        for (int i = 0; i < COPIES; i++) {
            for (int j = 0; j < WORDS; j++)
                a[i][j] = (unsigned)rand_r(&seed);
            dsts[i] = b[i];
            srcs[i] = a[i];
            sizes[i] = sizeof a[i];
        }
        expect(cudaMemcpyBatchAsync(dsts, srcs, sizes, COPIES, &how, &index, 1, one), "batch");
        expect(cudaEventCreateWithFlags(&event, 2), "cudaEventCreateWithFlags");
        expect(cudaEventRecord(event, one), "cudaEventRecord");
        expect(cudaStreamWaitEvent(other, event, 0), "cudaStreamWaitEvent");
        expect(cudaEventDestroy(event), "cudaEventDestroy");
        for (int i = 0; i < COPIES; i++)
            expect(cudaMemcpyAsync(c[i], b[i], sizeof b[i], 4, other), "cudaMemcpyAsync");
        expect(cudaStreamSynchronize(other), "cudaStreamSynchronize");
        if (memcmp(a, c, sizeof a) != 0) {
            fprintf(stderr, "bytes are out of order\n");
            atomic_store(&wrong, 1);
        }
        cudaGetLastError();
        atomic_fetch_add(&rounds, 1);
    }
    expect(cudaStreamSynchronize((void *)2), "cudaStreamSynchronize");
    expect(kvsig_emulated_stream_destroy(streams[0]), "destroy");
    expect(kvsig_emulated_stream_destroy(streams[1]), "destroy");
    expect(cudaHostUnregister(b), "cudaHostUnregister");
    return NULL;
}

/* Orders and questions of a test, all the while. */
static void *meddle(void *argument)
{
    (void)argument;
    static char marked[256];
    while (!atomic_load(&stop)) {
        kvsig_emulated_record(1);
        kvsig_emulated_fault("cudaMemAdvise", 1, 0, -1);
        kvsig_emulated_delay("cudaStreamSynchronize", 10);
        kvsig_emulated_counter("copies");
        kvsig_emulated_set_attribute(115, 1);
        kvsig_emulated_mark(marked, sizeof marked, 0, 0);
        kvsig_emulated_unmark(marked);
        void *stream = kvsig_emulated_stream_create(1);
        kvsig_emulated_hold(stream);
        kvsig_emulated_pending(stream);
        kvsig_emulated_release(stream);
        kvsig_emulated_stream_query(stream);
        kvsig_emulated_stream_destroy(stream);
        kvsig_emulated_free(kvsig_emulated_calls());
        kvsig_emulated_record(0);
    }
    return NULL;
}

int main(int argc, char **argv)
{
    double seconds = argc > 1 ? atof(argv[1]) : 10;
    pthread_t threads[THREADS + 1];
    for (size_t i = 0; i < THREADS; i++)
        pthread_create(&threads[i], NULL, work, (void *)i);
    pthread_create(&threads[THREADS], NULL, meddle, NULL);
    nanosleep(&(struct timespec){(time_t)seconds, 0}, NULL);
    atomic_store(&stop, 1);
    for (int i = 0; i <= THREADS; i++)
        pthread_join(threads[i], NULL);
    printf("{\"rounds\": %ld, \"wrong\": %d}\n", atomic_load(&rounds), atomic_load(&wrong));
    return atomic_load(&wrong);
}
