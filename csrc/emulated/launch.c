/* SPDX-License-Identifier: Apache-2.0 */
/* Modules, their functions and the launch of kernels. */
#include "runtime.h"

enum { MODULE_MAGIC = 0x4b564d4f, FUNCTION_MAGIC = 0x4b564655 };
enum { FUNCTION_ATTRIBUTES = 16 };

struct function {
    unsigned magic;
    struct function *next;
    const struct kernel *kernel;
    int attributes[FUNCTION_ATTRIBUTES]; /* by CUfunction_attribute */
};

struct module {
    unsigned magic;
    char *image;
    struct function *functions; /* guarded by `memory` */
};

int do_module_load(struct call *call)
{
    void **out = arg_pointer(call, "module");
    const char *image = arg_pointer(call, "image");
    if (!out || !image)
        return INVALID_VALUE;
    if (strncmp(image, IMAGE_HEAD, strlen(IMAGE_HEAD)))
        return INVALID_IMAGE;
    struct module *module = must(calloc(1, sizeof *module));
    module->magic = MODULE_MAGIC;
    module->image = must(strdup(image));
    *out = module;
    return SUCCESS;
}

/* Launches that are still queued need only the kernel, so they outlive their module here. */
int do_module_unload(struct call *call)
{
    struct module *module = arg_pointer(call, "hmod");
    if (!module || module->magic != MODULE_MAGIC)
        return INVALID_HANDLE;
    while (module->functions) {
        struct function *function = module->functions;
        module->functions = function->next;
        function->magic = 0;
        free(function);
    }
    module->magic = 0;
    free(module->image);
    free(module);
    return SUCCESS;
}

static int image_has(const char *image, const char *name)
{
    size_t length = strlen(name);
    for (const char *line = image; line; line = strchr(line, '\n')) {
        line += *line == '\n';
        if (strncmp(line, name, length) == 0 && line[length] == '\n')
            return 1;
    }
    return 0;
}

static struct function *function_new(const struct kernel *kernel)
{
    struct function *function = must(calloc(1, sizeof *function));
    int major = 0, minor = 0;
    device_attribute(75, 0, &major);
    device_attribute(76, 0, &minor);
    function->magic = FUNCTION_MAGIC;
    function->kernel = kernel;
    function->attributes[0] = 1024;                           /* MAX_THREADS_PER_BLOCK */
    function->attributes[4] = 32;                             /* NUM_REGS */
    function->attributes[5] = major * 10 + minor;             /* PTX_VERSION */
    function->attributes[6] = function->attributes[5];        /* BINARY_VERSION */
    function->attributes[8] = 48 << 10;                       /* MAX_DYNAMIC_SHARED_SIZE_BYTES */
    function->attributes[9] = -1;                             /* PREFERRED_SHARED_MEMORY_CARVEOUT */
    return function;
}

int do_module_get_function(struct call *call)
{
    void **out = arg_pointer(call, "hfunc");
    struct module *module = arg_pointer(call, "hmod");
    const char *name = arg_pointer(call, "name");
    if (!out || !name)
        return INVALID_VALUE;
    if (!module || module->magic != MODULE_MAGIC)
        return INVALID_HANDLE;
    const struct kernel *kernel = kernel_find(name);
    if (!kernel || !image_has(module->image, name))
        return NOT_FOUND;
    pthread_mutex_lock(&memory);
    struct function *function = module->functions;
    while (function && function->kernel != kernel)
        function = function->next;
    pthread_mutex_unlock(&memory);
    if (!function) {
        function = function_new(kernel);
        pthread_mutex_lock(&memory);
        function->next = module->functions;
        module->functions = function;
        pthread_mutex_unlock(&memory);
    }
    *out = function;
    return SUCCESS;
}

static struct function *function_of(const struct call *call, const char *name)
{
    struct function *function = arg_pointer(call, name);
    return function && function->magic == FUNCTION_MAGIC ? function : NULL;
}

int do_function_get_attribute(struct call *call)
{
    const struct function *function = function_of(call, "hfunc");
    int attribute = arg_int(call, "attrib", -1);
    if (!function)
        return INVALID_HANDLE;
    if (attribute < 0 || attribute >= FUNCTION_ATTRIBUTES)
        return INVALID_VALUE;
    return store_int(call, "pi", function->attributes[attribute]);
}

/* From 8 on, the dynamic shared memory, a driver lets them be set. */
int do_function_set_attribute(struct call *call)
{
    struct function *function = function_of(call, "hfunc");
    int attribute = arg_int(call, "attrib", -1), value = arg_int(call, "value", 0);
    if (!function)
        return INVALID_HANDLE;
    if (attribute < 8 || attribute >= FUNCTION_ATTRIBUTES || (attribute == 8 && value > 227 << 10))
        return INVALID_VALUE;
    function->attributes[attribute] = value;
    return SUCCESS;
}

/* Copies the parameters' values behind the pointers to them, each at a multiple of 16 bytes. */
static void **params_copy(const struct kernel *kernel, void *const *given)
{
    size_t head = (kernel->count * sizeof(void *) + 15) / 16 * 16, at = head;
    for (size_t i = 0; i < kernel->count; i++)
        at += (kernel->sizes[i] + 15) / 16 * 16;
    void **params = must(calloc(1, at + 16));
    at = head;
    for (size_t i = 0; i < kernel->count; i++) {
        params[i] = (char *)params + at;
        memcpy(params[i], given[i], kernel->sizes[i]);
        at += (kernel->sizes[i] + 15) / 16 * 16;
    }
    return params;
}

static void observe_three(struct call *call, const char *name, const unsigned *values)
{
    text_add(&call->observed, ", \"%s\": [%u, %u, %u]", name, values[0], values[1], values[2]);
}

static void observe_launch(struct call *call, const struct kernel *kernel,
                           const struct launch *shape, void *const *params)
{
    text_add(&call->observed, "\"kernel\": ");
    text_string(&call->observed, kernel->name);
    observe_three(call, "grid", shape->grid);
    observe_three(call, "block", shape->block);
    observe_three(call, "cluster", shape->cluster);
    text_add(&call->observed, ", \"shared\": %u, \"parameters\": [", shape->shared);
    for (size_t i = 0; i < kernel->count; i++) {
        text_add(&call->observed, "%s", i ? ", " : "");
        text_hex(&call->observed, params[i], kernel->sizes[i]);
    }
    text_add(&call->observed, "]");
}

/* Whether a device takes a launch of this shape. */
static int shape_fits(const struct launch *shape)
{
    uint64_t threads = 1, blocks = 1;
    for (int i = 0; i < 3; i++) {
        if (!shape->grid[i] || !shape->block[i] || !shape->cluster[i] ||
            shape->grid[i] % shape->cluster[i] || shape->grid[i] > INT32_MAX ||
            (i && shape->grid[i] > 65535) || shape->block[i] > 1024)
            return 0;
        threads *= shape->block[i];
        blocks *= shape->cluster[i];
    }
    return threads <= 1024 && blocks <= 16;
}

static int launch(struct call *call, void *stream, const struct launch *shape)
{
    const struct function *function = function_of(call, "f");
    void *const *given = arg_pointer(call, "kernelParams");
    if (!function)
        return INVALID_HANDLE;
    if (arg_pointer(call, "extra")) /* parameters in one buffer */
        return NOT_SUPPORTED;
    const struct kernel *kernel = function->kernel;
    if ((kernel->count && !given) || !shape_fits(shape) ||
        shape->shared > (unsigned)function->attributes[8])
        return INVALID_VALUE;
    if (call->recording)
        observe_launch(call, kernel, shape, given);
    struct work *work = work_new(WORK_LAUNCH, 0, 0);
    work->launch.kernel = kernel;
    work->launch.shape = *shape;
    work->launch.params = params_copy(kernel, given);
    return submit(stream, work);
}

int do_launch_kernel(struct call *call)
{
    const struct launch shape = {
        .grid = {(unsigned)arg_u64(call, "gridDimX", 1), (unsigned)arg_u64(call, "gridDimY", 1),
                 (unsigned)arg_u64(call, "gridDimZ", 1)},
        .block = {(unsigned)arg_u64(call, "blockDimX", 1), (unsigned)arg_u64(call, "blockDimY", 1),
                  (unsigned)arg_u64(call, "blockDimZ", 1)},
        .cluster = {1, 1, 1},
        .shared = (unsigned)arg_u64(call, "sharedMemBytes", 0),
    };
    return launch(call, arg_stream(call), &shape);
}

struct launch_attribute { /* CUlaunchAttribute */
    int id;
    char pad[4];
    union {
        unsigned cluster[3];
        char bytes[64];
    };
};

struct launch_config { /* CUlaunchConfig */
    unsigned grid[3], block[3], shared;
    void *stream;
    const struct launch_attribute *attributes;
    unsigned count;
};

/* Attributes but the cluster's size say how fast, not what, so they are taken and change nothing. */
int do_launch_kernel_ex(struct call *call)
{
    enum { CLUSTER_DIMENSION = 4 };
    const struct launch_config *config = arg_pointer(call, "config");
    if (!config || (config->count && !config->attributes))
        return INVALID_VALUE;
    struct launch shape = {.cluster = {1, 1, 1}, .shared = config->shared};
    memcpy(shape.grid, config->grid, sizeof shape.grid);
    memcpy(shape.block, config->block, sizeof shape.block);
    for (unsigned i = 0; i < config->count; i++)
        if (config->attributes[i].id == CLUSTER_DIMENSION)
            memcpy(shape.cluster, config->attributes[i].cluster, sizeof shape.cluster);
    return launch(call, config->stream, &shape);
}
