/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The kernels that a launch can run here: each a C function that does what the whole launch does.
 * Another one is a function of the type kernel_double, the sizes of its parameters, and a row.
 */
#include "runtime.h"

/* kvsig_emulated_add(uint32_t *numbers, uint32_t value, uint64_t count): adds to each number. */
static void add_double(void **params, const struct launch *shape)
{
    uint32_t *numbers = *(uint32_t **)params[0];
    uint32_t value = *(const uint32_t *)params[1];
    uint64_t count = *(const uint64_t *)params[2];
    (void)shape;
    for (uint64_t i = 0; i < count; i++)
        numbers[i] += value;
}

static const size_t add_sizes[] = {8, 4, 8};

void kvsig_double_wide(void **params, const struct launch *shape);
void kvsig_double_thin(void **params, const struct launch *shape);

/* One parameter, a struct kvsig_page_copy. */
static const size_t page_copy_sizes[] = {PAGE_COPY_BYTES};

static const struct kernel kernels[] = {
    {"kvsig_emulated_add", add_double, COUNT(add_sizes), add_sizes},
    {"kvsig_copy_wide", kvsig_double_wide, COUNT(page_copy_sizes), page_copy_sizes},
    {"kvsig_copy_thin", kvsig_double_thin, COUNT(page_copy_sizes), page_copy_sizes},
};

const struct kernel *kernel_at(size_t index)
{
    return index < COUNT(kernels) ? &kernels[index] : NULL;
}

const struct kernel *kernel_find(const char *name)
{
    for (size_t i = 0; i < COUNT(kernels); i++)
        if (strcmp(kernels[i].name, name) == 0)
            return &kernels[i];
    return NULL;
}
