/* SPDX-License-Identifier: Apache-2.0 */
/* One call: its arguments by name, and the record of calls. */
#include "runtime.h"

#include <inttypes.h>

enum { MAX_CALLS = 1 << 16 };

atomic_llong recorded_dropped;
static atomic_int recording;
static char *recorded[MAX_CALLS]; /* a ring, guarded by `control` */
static size_t recorded_first, recorded_count;

const struct emu_arg *find_arg(const struct call *call, const char *name)
{
    for (size_t i = 0; i < call->count; i++)
        if (strcmp(call->args[i].name, name) == 0)
            return &call->args[i];
    return NULL;
}

uint64_t arg_u64(const struct call *call, const char *name, uint64_t missing)
{
    const struct emu_arg *arg = find_arg(call, name);
    if (!arg || arg->size > sizeof(uint64_t))
        return missing;
    uint64_t value = 0; /* little-endian, as every machine CUDA runs on */
    memcpy(&value, arg->value, arg->size);
    return value;
}

int arg_int(const struct call *call, const char *name, int missing)
{
    return (int)arg_u64(call, name, (uint64_t)(int64_t)missing);
}

void *arg_pointer(const struct call *call, const char *name)
{
    return (void *)(uintptr_t)arg_u64(call, name, 0);
}

void *arg_pointer2(const struct call *call, const char *name, const char *other)
{
    return arg_pointer(call, find_arg(call, name) ? name : other);
}

void *arg_stream(const struct call *call)
{
    void *stream = arg_pointer2(call, "stream", "hStream");
    size_t length = strlen(call->symbol);
    /* The _ptsz twins mean the calling thread's stream where the others mean the legacy one. */
    if (!stream && length > 5 && strcmp(call->symbol + length - 5, "_ptsz") == 0)
        return PER_THREAD_STREAM;
    return stream;
}

int store_int(const struct call *call, const char *name, int value)
{
    int *out = arg_pointer(call, name);
    if (!out)
        return INVALID_VALUE;
    *out = value;
    return SUCCESS;
}

static int is_signed(const char *type)
{
    static const char *const names[] = {"int",    "long",    "short", "char",
                                        "signed", "ssize_t", "enum"};
    if (strchr(type, '*'))
        return 0;
    while (strncmp(type, "const ", 6) == 0)
        type += 6;
    for (size_t i = 0; i < COUNT(names); i++)
        if (strncmp(type, names[i], strlen(names[i])) == 0)
            return 1;
    return 0;
}

static int by_value(const struct emu_arg *arg)
{
    const char *type = arg->type;
    while (strncmp(type, "const ", 6) == 0)
        type += 6;
    return arg->size > 8 ||
           ((strncmp(type, "struct", 6) == 0 || strncmp(type, "union", 5) == 0) &&
            !strchr(type, '*'));
}

void record_call(const struct call *call, int64_t result)
{
    struct text text = {0};
    text_add(&text, "{\"function\": ");
    text_string(&text, call->function);
    text_add(&text, ", \"symbol\": ");
    text_string(&text, call->symbol);
    text_add(&text, ", \"variant\": ");
    text_string(&text, call->variant);
    text_add(&text, ", \"arguments\": [");
    for (size_t i = 0; i < call->count; i++) {
        const struct emu_arg *arg = &call->args[i];
        text_add(&text, "%s{\"name\": ", i ? ", " : "");
        text_string(&text, arg->name);
        text_add(&text, ", \"type\": ");
        text_string(&text, arg->type);
        if (by_value(arg)) {
            text_add(&text, ", \"bytes\": ");
            text_hex(&text, arg->value, arg->size);
        } else if (strcmp(arg->type, "float") == 0) {
            float value;
            memcpy(&value, arg->value, sizeof value);
            text_add(&text, ", \"value\": %.9g", (double)value);
        } else if (strcmp(arg->type, "double") == 0) {
            double value;
            memcpy(&value, arg->value, sizeof value);
            text_add(&text, ", \"value\": %.17g", value);
        } else {
            uint64_t value = 0;
            memcpy(&value, arg->value, arg->size);
            unsigned unused = 64 - 8 * (unsigned)arg->size;
            if (is_signed(arg->type) && arg->size)
                text_add(&text, ", \"value\": %" PRId64, (int64_t)(value << unused) >> unused);
            else
                text_add(&text, ", \"value\": %" PRIu64, value);
        }
        text_add(&text, "}");
    }
    text_add(&text, "], \"result\": %" PRId64, result);
    if (call->observed.length) {
        text_add(&text, ", \"observed\": {");
        text_bytes(&text, call->observed.data, call->observed.length);
        text_add(&text, "}");
    }
    text_add(&text, "}");
    pthread_mutex_lock(&control);
    if (recorded_count == MAX_CALLS) { /* the newest are the ones worth keeping */
        free(recorded[recorded_first]);
        recorded_first = (recorded_first + 1) % MAX_CALLS;
        recorded_count--;
        atomic_fetch_add(&recorded_dropped, 1);
    }
    recorded[(recorded_first + recorded_count++) % MAX_CALLS] = text.data;
    pthread_mutex_unlock(&control);
}

static void record_clear(void)
{
    while (recorded_count) {
        free(recorded[recorded_first]);
        recorded_first = (recorded_first + 1) % MAX_CALLS;
        recorded_count--;
    }
    atomic_store(&recorded_dropped, 0);
}

void record_reset(void)
{
    atomic_store(&recording, 0);
    record_clear();
}

int recording_now(void)
{
    return atomic_load_explicit(&recording, memory_order_relaxed);
}

void kvsig_emulated_record(int on)
{
    pthread_mutex_lock(&control);
    if (on)
        record_clear();
    atomic_store(&recording, on != 0);
    pthread_mutex_unlock(&control);
}

char *kvsig_emulated_calls(void)
{
    struct text text = {0};
    text_bytes(&text, "[", 1);
    pthread_mutex_lock(&control);
    for (size_t i = 0; i < recorded_count; i++) {
        const char *entry = recorded[(recorded_first + i) % MAX_CALLS];
        if (i)
            text_bytes(&text, ",\n", 2);
        text_bytes(&text, entry, strlen(entry));
    }
    pthread_mutex_unlock(&control);
    text_bytes(&text, "]", 1);
    return text.data;
}

void kvsig_emulated_free(void *text)
{
    free(text);
}
