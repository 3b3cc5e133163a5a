/* SPDX-License-Identifier: Apache-2.0 */
/* The driver's entry points by name and version. */
#define _GNU_SOURCE
#include "runtime.h"

#include <dlfcn.h>

static void *self; /* this very library: an entry point never comes from another one */

/* Names that the driver gives a newer prototype of the same function. */
static const struct {
    const char *symbol;
    int since;
    const char *exported;
} driver_symbols[] = {
    {"cuMemcpyBatchAsync", 13000, "cuMemcpyBatchAsync_v2"},
    {"cuMemcpyBatchAsync", 12080, "cuMemcpyBatchAsync"},
    {"cuStreamWaitValue32", 12000, "cuStreamWaitValue32_v2"},
    {"cuStreamWaitValue32", 0, "cuStreamWaitValue32"},
    {"cuStreamWriteValue32", 12000, "cuStreamWriteValue32_v2"},
    {"cuStreamWriteValue32", 0, "cuStreamWriteValue32"},
};

/* The symbol itself, or where the registry's name for it has a number behind it, that. */
static void *exported_symbol(const char *symbol)
{
    char numbered[128];
    void *found = dlsym(self, symbol);
    for (int version = 2; !found && version < 5; version++)
        if (snprintf(numbered, sizeof numbered, "%s_v%d", symbol, version) <
            (int)sizeof numbered)
            found = dlsym(self, numbered);
    return found;
}

int do_entry_point(struct call *call)
{
    const char *symbol = arg_pointer(call, "symbol");
    void **out = arg_pointer2(call, "pfn", "funcPtr");
    int newest = driver_shown();
    int version = arg_int(call, "cudaVersion", newest);
    int *status = arg_pointer2(call, "symbolStatus", "driverStatus");
    if (!symbol || !out)
        return INVALID_VALUE;
    *out = NULL;
    const char *exported = symbol;
    int too_old = version > newest;
    for (size_t i = 0; i < COUNT(driver_symbols); i++) {
        if (strcmp(driver_symbols[i].symbol, symbol))
            continue;
        too_old = too_old || version < driver_symbols[i].since;
        if (version >= driver_symbols[i].since) {
            exported = driver_symbols[i].exported;
            too_old = version > newest;
            break;
        }
    }
    if (!too_old && self)
        *out = exported_symbol(exported);
    if (status)
        *status = *out ? 0 : too_old ? 2 : 1;
    return *out ? SUCCESS : NOT_FOUND;
}

int do_initialise(struct call *call)
{
    return arg_u64(call, "Flags", 0) ? INVALID_VALUE : SUCCESS;
}

/* Found while the path still holds; never unmapped, since queues run code of this library. */
__attribute__((constructor)) static void driver_start(void)
{
    Dl_info info;
    if (dladdr((void *)(uintptr_t)emu_dispatch, &info) && info.dli_fname)
        self = dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD | RTLD_NODELETE);
}
