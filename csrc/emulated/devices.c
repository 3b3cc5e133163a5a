/* SPDX-License-Identifier: Apache-2.0 */
/* Versions, devices and their attributes. */
#include "runtime.h"

atomic_int runtime_version, driver_version, device_count = 1;
_Thread_local int current_device;

static int device_attributes[MAX_ATTRIBUTES]; /* guarded by `control` */
static const struct {
    int attribute, value;
} attribute_defaults[] = {
    {1, 1024},        /* MaxThreadsPerBlock */
    {10, 32},         /* WarpSize */
    {11, 2147483647}, /* MaxPitch */
    {13, 1000000},    /* ClockRate */
    {15, 1},          /* GpuOverlap */
    {16, 132},        /* MultiProcessorCount */
    {19, 1},          /* CanMapHostMemory */
    {31, 1},          /* ConcurrentKernels */
    {40, 3},          /* AsyncEngineCount */
    {41, 1},          /* UnifiedAddressing */
    {75, 9},          /* ComputeCapabilityMajor */
    {78, 1},          /* StreamPrioritiesSupported */
    {83, 1},          /* ManagedMemory */
    {89, 1},          /* ConcurrentManagedAccess */
    {90, 1},          /* ComputePreemptionSupported */
    {91, 1},          /* CanUseHostPointerForRegisteredMem */
    {95, 1},          /* CooperativeLaunch */
    {99, 1},          /* HostRegisterSupported */
    {115, 1},         /* MemoryPoolsSupported */
    {120, 1},         /* ClusterLaunch */
    {123, 1},         /* CanUseStreamWaitValueNor */
};

void attributes_reset(void)
{
    memset(device_attributes, 0, sizeof device_attributes);
    for (size_t i = 0; i < COUNT(attribute_defaults); i++)
        device_attributes[attribute_defaults[i].attribute] = attribute_defaults[i].value;
}

int do_runtime_get_version(struct call *call)
{
    return store_int(call, "runtimeVersion", atomic_load(&runtime_version));
}

int do_driver_get_version(struct call *call)
{
    return store_int(call, "driverVersion", driver_shown());
}

int do_get_device_count(struct call *call)
{
    int count = atomic_load(&device_count);
    int error = store_int(call, "count", count);
    return error ? error : count ? SUCCESS : NO_DEVICE;
}

int do_get_device(struct call *call)
{
    return store_int(call, "device", current_device);
}

int do_set_device(struct call *call)
{
    int device = arg_int(call, "device", 0);
    int count = atomic_load(&device_count);
    if (device < 0 || device >= count)
        return count ? INVALID_DEVICE : NO_DEVICE;
    current_device = device;
    return SUCCESS;
}

int device_attribute(int attribute, int device, int *value)
{
    if (device < 0 || device >= atomic_load(&device_count))
        return INVALID_DEVICE;
    if (attribute < 1 || attribute >= MAX_ATTRIBUTES)
        return INVALID_VALUE;
    pthread_mutex_lock(&control);
    *value = device_attributes[attribute];
    pthread_mutex_unlock(&control);
    return SUCCESS;
}

/* The runtime's and the driver's numbers of attributes are the same. */
int do_device_get_attribute(struct call *call)
{
    int value = 0;
    int error = device_attribute(arg_int(call, find_arg(call, "attr") ? "attr" : "attrib", -1),
                                 arg_int(call, find_arg(call, "device") ? "device" : "dev", 0),
                                 &value);
    return error ? error : store_int(call, find_arg(call, "value") ? "value" : "pi", value);
}

void set_device_attribute(int attribute, int value)
{
    if (attribute < 0 || attribute >= MAX_ATTRIBUTES)
        return;
    pthread_mutex_lock(&control);
    device_attributes[attribute] = value;
    pthread_mutex_unlock(&control);
}

/* ---- Contexts: the primary one of each device, which the runtime uses too ----------------- */

static char contexts[MAX_DEVICES];

int do_device_get(struct call *call)
{
    int ordinal = arg_int(call, "ordinal", -1);
    if (ordinal < 0 || ordinal >= atomic_load(&device_count))
        return INVALID_DEVICE;
    return store_int(call, "device", ordinal);
}

int do_context_get_current(struct call *call)
{
    void **out = arg_pointer(call, "pctx");
    if (!out)
        return INVALID_VALUE;
    *out = &contexts[current_device];
    return SUCCESS;
}

int do_context_set_current(struct call *call)
{
    const char *context = arg_pointer(call, "ctx");
    for (int device = 0; device < MAX_DEVICES; device++)
        if (context == &contexts[device])
            current_device = device;
    return !context || context == &contexts[current_device] ? SUCCESS : 201;
}

int do_context_get_device(struct call *call)
{
    return store_int(call, "device", current_device);
}

int do_context_retain(struct call *call)
{
    void **out = arg_pointer(call, "pctx");
    int device = arg_int(call, "dev", -1);
    if (device < 0 || device >= atomic_load(&device_count))
        return INVALID_DEVICE;
    if (!out)
        return INVALID_VALUE;
    *out = &contexts[device];
    return SUCCESS;
}

int do_context_release(struct call *call)
{
    int device = arg_int(call, "dev", -1);
    return device < 0 || device >= atomic_load(&device_count) ? INVALID_DEVICE : SUCCESS;
}
