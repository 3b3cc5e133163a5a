/* SPDX-License-Identifier: Apache-2.0 */
/* What a test asks for: faults, stubs, delays, versions, counts. */
#include "runtime.h"

#include <errno.h>
#include <limits.h>

pthread_mutex_t control = PTHREAD_MUTEX_INITIALIZER;

struct order { /* a fault, a stub or a delay that a test asked for */
    struct order *next;
    char *function; /* NULL: all of them (stubs only) */
    int error;
    long remaining; /* calls until it strikes; 0: every call. Of a delay its microseconds. */
    long fail_index;
};

static struct order *faults, *stubs, *delays;
static atomic_int orders_given;

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
struct ordered orders_for(const char *function)
{
    struct ordered ordered = {.fail_index = -1};
    if (!atomic_load_explicit(&orders_given, memory_order_relaxed))
        return ordered;
    delay(function);
    ordered.fault = fault_strikes(function, &ordered.error, &ordered.fail_index);
    ordered.stub = is_stub(function);
    return ordered;
}

void orders_reset(void)
{
    orders_free(&faults);
    orders_free(&stubs);
    orders_free(&delays);
    atomic_store(&orders_given, 0);
}

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
    set_device_attribute(attribute, value);
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
long long kvsig_emulated_counter(const char *name)
{
    static const struct {
        const char *name;
        atomic_llong *value;
    } counters[] = {
        {"calls", &calls_made},        {"operations", &operations_done},
        {"copies", &copies_done},      {"bytes", &bytes_done},
        {"batches", &batches_taken},   {"dropped", &recorded_dropped},
        {"launches", &launches_done},  {"unknown", &calls_unknown},
    };
    for (size_t i = 0; i < COUNT(counters); i++)
        if (strcmp(counters[i].name, name) == 0)
            return atomic_load(counters[i].value);
    return -1;
}

/*
 * Forgets what a test asked for, ends captures and lets all queues run dry. Answers NOT_READY
 * where one does not within ten seconds. Versions stay, since a program has bound itself to them.
 */
int kvsig_emulated_reset(void)
{
    pthread_mutex_lock(&control);
    orders_reset();
    record_reset();
    attributes_reset();
    pthread_mutex_unlock(&control);
    state_reset();
    atomic_store(&device_count, 1);
    current_device = 0;
    last_error = SUCCESS;
    memory_reset();
    int error = queues_drain(10);
    atomic_llong *counters[] = {&calls_made, &calls_unknown, &operations_done, &copies_done,
                                &bytes_done, &batches_taken, &launches_done};
    for (size_t i = 0; i < COUNT(counters); i++)
        atomic_store(counters[i], 0);
    return error;
}

__attribute__((constructor)) static void control_start(void)
{
    atomic_store(&runtime_version, emu_abi_since);
    atomic_store(&driver_version, emu_abi_since);
    attributes_reset();
}
