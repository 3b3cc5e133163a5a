/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The state of the driver, and what a fork makes of it. As with CUDA, a child of a process that
 * had used it cannot: every call that needs the driver answers INITIALIZATION_ERROR.
 */
#include "runtime.h"

enum { STATE_READY = 0, STATE_MISSING = -1, STATE_OLD = -2 }; /* else the error of every call */

static const struct {
    const char *name;
    int state;
} state_names[] = {
    {"ready", STATE_READY}, {"missing", STATE_MISSING},
    {"old", STATE_OLD},     {"stub", STUB_LIBRARY},
    {"lost", FIRST_STICKY}, {"uninitialised", INITIALIZATION_ERROR},
};

static atomic_int state, initialised, forked;

/* NAME is one of the names above or an error code. */
int kvsig_emulated_set_state(const char *name)
{
    char *end;
    long code = strtol(name, &end, 10);
    int known = end != name && *end == 0 && code > 0 && code < 1000;
    for (size_t i = 0; i < COUNT(state_names) && !known; i++)
        if (strcmp(state_names[i].name, name) == 0) {
            code = state_names[i].state;
            known = 1;
        }
    if (!known)
        return INVALID_VALUE;
    atomic_store(&state, (int)code);
    last_error = state_sticky();
    return SUCCESS;
}

void state_reset(void)
{
    atomic_store(&state, STATE_READY);
}

int state_sticky(void)
{
    int now = atomic_load(&state);
    return now >= FIRST_STICKY && now <= LAST_STICKY ? now : SUCCESS;
}

int driver_shown(void)
{
    int driver = atomic_load(&driver_version), runtime = atomic_load(&runtime_version);
    switch (atomic_load(&state)) {
    case STATE_MISSING:
        return 0;
    case STATE_OLD: /* the major before the runtime's, unless it is older still */
        return driver / 1000 < runtime / 1000 ? driver : (runtime / 1000 - 1) * 1000;
    default:
        return driver;
    }
}

int state_refuses(int flags)
{
    int now = atomic_load_explicit(&state, memory_order_relaxed);
    if (flags & ANY_TIME)
        return now == STUB_LIBRARY && flags & ASKS_DRIVER ? STUB_LIBRARY : SUCCESS;
    if (atomic_load_explicit(&forked, memory_order_relaxed))
        return INITIALIZATION_ERROR;
    int driver = driver_shown();
    if (!driver)
        return INSUFFICIENT_DRIVER;
    /* Within a major any driver serves; the driver's own calls do not ask for the runtime. */
    if (!(flags & DRIVER) && driver / 1000 < atomic_load(&runtime_version) / 1000)
        return INSUFFICIENT_DRIVER;
    return now > 0 ? now : SUCCESS;
}

int process_forked(void)
{
    return atomic_load(&forked);
}

void process_initialised(void)
{
    atomic_store_explicit(&initialised, 1, memory_order_relaxed);
}

static void before_fork(void)
{
    pthread_mutex_lock(&queues);
    pthread_mutex_lock(&memory);
    pthread_mutex_lock(&control);
}

static void after_fork(void)
{
    pthread_mutex_unlock(&control);
    pthread_mutex_unlock(&memory);
    pthread_mutex_unlock(&queues);
}

static void in_child(void)
{
    after_fork();
    if (atomic_load(&initialised))
        atomic_store(&forked, 1);
    queues_after_fork();
}

__attribute__((constructor)) static void process_start(void)
{
    const char *ordered = getenv("KVSIG_EMULATED_DRIVER");
    if (ordered && *ordered && kvsig_emulated_set_state(ordered))
        fprintf(stderr, "kvsig emulated runtime: KVSIG_EMULATED_DRIVER=%s is no state of a driver\n",
                ordered);
    pthread_atfork(before_fork, after_fork, in_child);
}
