/* SPDX-License-Identifier: Apache-2.0 */
/* From a function's name to what it does. */
#include "runtime.h"

atomic_llong calls_made, calls_unknown;

/*
 * A function that is not here answers NOT_SUPPORTED and is counted as unknown. Whatever should
 * succeed has a row; where doing nothing is right, that is said at its handler: cudaMemAdvise and
 * cudaMemPrefetchAsync are advice about where memory is, and all memory is the host's here; cuInit
 * and the reference counts of primary contexts have nothing to prepare or to give back.
 */
static const struct handler {
    const char *name;
    handler_function *run;
    int flags;
} handlers[] = { /* sorted by strcmp */
    {"cuCtxGetCurrent", do_context_get_current, DRIVER},
    {"cuCtxGetDevice", do_context_get_device, DRIVER},
    {"cuCtxSetCurrent", do_context_set_current, DRIVER},
    {"cuDeviceGet", do_device_get, DRIVER},
    {"cuDeviceGetAttribute", do_device_get_attribute, DRIVER},
    {"cuDevicePrimaryCtxRelease", do_context_release, DRIVER},
    {"cuDevicePrimaryCtxRetain", do_context_retain, DRIVER},
    {"cuDriverGetVersion", do_driver_get_version, ANY_TIME | ASKS_DRIVER | DRIVER},
    {"cuFuncGetAttribute", do_function_get_attribute, DRIVER},
    {"cuFuncSetAttribute", do_function_set_attribute, DRIVER},
    {"cuGetErrorName", do_driver_error_text, ANY_TIME | ASKS_DRIVER | DRIVER},
    {"cuGetErrorString", do_driver_error_text, ANY_TIME | ASKS_DRIVER | DRIVER},
    {"cuGetProcAddress", do_entry_point, DRIVER | ANY_TIME},
    {"cuInit", do_initialise, DRIVER},
    {"cuLaunchKernel", do_launch_kernel, DRIVER},
    {"cuLaunchKernelEx", do_launch_kernel_ex, DRIVER},
    {"cuMemHostGetDevicePointer", do_host_get_device_pointer, DRIVER},
    {"cuMemcpyBatchAsync", do_memcpy_batch_async, DRIVER | BATCH},
    {"cuModuleGetFunction", do_module_get_function, DRIVER},
    {"cuModuleLoadData", do_module_load, DRIVER},
    {"cuModuleUnload", do_module_unload, DRIVER},
    {"cuPointerGetAttribute", do_pointer_get_attribute, DRIVER},
    {"cuStreamWaitValue32", do_stream_wait_value, DRIVER},
    {"cuStreamWriteValue32", do_stream_write_value, DRIVER},
    {"cudaDeviceGetAttribute", do_device_get_attribute, 0},
    {"cudaDeviceSynchronize", do_device_synchronize, 0},
    {"cudaDriverGetVersion", do_driver_get_version, ANY_TIME | ASKS_DRIVER},
    {"cudaEventCreateWithFlags", do_event_create, 0},
    {"cudaEventDestroy", do_event_destroy, 0},
    {"cudaEventElapsedTime", do_event_elapsed_time, 0},
    {"cudaEventQuery", do_event_query, 0},
    {"cudaEventRecord", do_event_record, 0},
    {"cudaEventSynchronize", do_event_synchronize, 0},
    {"cudaFree", do_free, 0},
    {"cudaFreeHost", do_free_host, 0},
    {"cudaGetDevice", do_get_device, 0},
    {"cudaGetDeviceCount", do_get_device_count, 0},
    {"cudaGetLastError", do_get_last_error, ANY_TIME | QUIET},
    {"cudaGraphDestroy", do_graph_destroy, 0},
    {"cudaGraphExecDestroy", do_graph_exec_destroy, 0},
    {"cudaGraphGetEdges", do_graph_get_edges, 0},
    {"cudaGraphInstantiate", do_graph_instantiate, 0},
    {"cudaGraphLaunch", do_graph_launch, 0},
    {"cudaHostAlloc", do_malloc_host, 0},
    {"cudaHostGetDevicePointer", do_host_get_device_pointer, 0},
    {"cudaHostRegister", do_host_register, 0},
    {"cudaHostUnregister", do_host_unregister, 0},
    {"cudaLaunchHostFunc", do_launch_host_func, 0},
    {"cudaMalloc", do_malloc, 0},
    {"cudaMallocManaged", do_malloc_managed, 0},
    {"cudaMemAdvise", do_mem_advise, 0},
    {"cudaMemGetInfo", do_mem_get_info, 0},
    {"cudaMemPrefetchAsync", do_mem_prefetch_async, 0},
    {"cudaMemcpy2DAsync", do_memcpy_2d_async, 0},
    {"cudaMemcpy3DAsync", do_memcpy_3d_async, 0},
    {"cudaMemcpy3DBatchAsync", do_memcpy_3d_batch_async, BATCH},
    {"cudaMemcpy3DWithAttributesAsync", do_memcpy_3d_with_attributes_async, 0},
    {"cudaMemcpyAsync", do_memcpy_async, 0},
    {"cudaMemcpyBatchAsync", do_memcpy_batch_async, BATCH},
    {"cudaMemcpyWithAttributesAsync", do_memcpy_with_attributes_async, 0},
    {"cudaMemsetAsync", do_memset_async, 0},
    {"cudaPeekAtLastError", do_peek_at_last_error, ANY_TIME | QUIET},
    {"cudaPointerGetAttributes", do_pointer_get_attributes, 0},
    {"cudaRuntimeGetVersion", do_runtime_get_version, ANY_TIME},
    {"cudaSetDevice", do_set_device, 0},
    {"cudaStreamBeginCapture", do_stream_begin_capture, 0},
    {"cudaStreamCreateWithFlags", do_stream_create, 0},
    {"cudaStreamCreateWithPriority", do_stream_create_with_priority, 0},
    {"cudaStreamDestroy", do_stream_destroy, 0},
    {"cudaStreamEndCapture", do_stream_end_capture, 0},
    {"cudaStreamGetCaptureInfo", do_stream_is_capturing, 0},
    {"cudaStreamGetId", do_stream_get_id, 0},
    {"cudaStreamGetPriority", do_stream_get_priority, 0},
    {"cudaStreamIsCapturing", do_stream_is_capturing, 0},
    {"cudaStreamQuery", do_stream_query, 0},
    {"cudaStreamSynchronize", do_stream_synchronize, 0},
    {"cudaStreamWaitEvent", do_stream_wait_event, 0},
    {"nvrtcCompileProgram", do_nvrtc_compile, ANY_TIME | DRIVER},
    {"nvrtcCreateProgram", do_nvrtc_create, ANY_TIME | DRIVER},
    {"nvrtcDestroyProgram", do_nvrtc_destroy, ANY_TIME | DRIVER},
    {"nvrtcGetCUBIN", do_nvrtc_text, ANY_TIME | DRIVER},
    {"nvrtcGetCUBINSize", do_nvrtc_size, ANY_TIME | DRIVER},
    {"nvrtcGetNumSupportedArchs", do_nvrtc_arch_count, ANY_TIME | DRIVER},
    {"nvrtcGetPTX", do_nvrtc_text, ANY_TIME | DRIVER},
    {"nvrtcGetPTXSize", do_nvrtc_size, ANY_TIME | DRIVER},
    {"nvrtcGetProgramLog", do_nvrtc_text, ANY_TIME | DRIVER},
    {"nvrtcGetProgramLogSize", do_nvrtc_size, ANY_TIME | DRIVER},
    {"nvrtcGetSupportedArchs", do_nvrtc_archs, ANY_TIME | DRIVER},
    {"nvrtcVersion", do_nvrtc_version, ANY_TIME | DRIVER},
};

static int compare_handlers(const void *key, const void *entry)
{
    return strcmp(key, ((const struct handler *)entry)->name);
}

static const struct handler *find_handler(const char *function)
{
    return bsearch(function, handlers, COUNT(handlers), sizeof handlers[0], compare_handlers);
}

/* A function that the table lacks belongs to the library that its name begins with. */
static int flags_of(const struct handler *handler, const char *function)
{
    return handler                            ? handler->flags
           : strncmp(function, "nvrtc", 5) == 0 ? ANY_TIME | DRIVER
           : strncmp(function, "cuda", 4)       ? DRIVER
                                                : 0;
}

static int64_t answer(struct call *call, const struct handler *handler, int flags)
{
    struct ordered ordered = orders_for(call->function);
    if (ordered.fault && ordered.fail_index < 0)
        return ordered.error;
    if (ordered.stub)
        return SUCCESS;
    int error = state_refuses(flags);
    if (error)
        return error;
    if (ordered.fault && !(flags & BATCH))
        return ordered.error;
    if (!handler) {
        atomic_fetch_add_explicit(&calls_unknown, 1, memory_order_relaxed);
        return NOT_SUPPORTED;
    }
    if (!(flags & ANY_TIME))
        process_initialised();
    call->fault_error = ordered.error;
    call->fault_index = ordered.fail_index;
    return handler->run(call);
}

static struct call call_begin(const char *function, const char *symbol, const char *variant,
                              const struct emu_arg *args, size_t count)
{
    atomic_fetch_add_explicit(&calls_made, 1, memory_order_relaxed);
    return (struct call){.function = function,
                         .symbol = symbol,
                         .variant = variant,
                         .args = args,
                         .count = count,
                         .recording = recording_now(),
                         .fault_index = -1};
}

static void call_end(struct call *call, int64_t result)
{
    if (call->recording)
        record_call(call, result);
    free(call->observed.data);
}

int64_t emu_dispatch(const char *function, const char *symbol, const char *variant,
                     const struct emu_arg *args, size_t count)
{
    struct call call = call_begin(function, symbol, variant, args, count);
    const struct handler *handler = find_handler(function);
    int flags = flags_of(handler, function);
    int64_t result = answer(&call, handler, flags);
    if (result && !(flags & (DRIVER | QUIET)))
        last_error = (int)result;
    call_end(&call, result);
    return result;
}

const void *emu_dispatch_pointer(const char *function, const char *symbol, const char *variant,
                                 const struct emu_arg *args, size_t count)
{
    struct call call = call_begin(function, symbol, variant, args, count);
    const void *result = NULL;
    if (strcmp(function, "cudaGetErrorName") == 0)
        result = error_text(arg_int(&call, "error", -1), 1);
    else if (strcmp(function, "cudaGetErrorString") == 0)
        result = error_text(arg_int(&call, "error", -1), 0);
    else if (strcmp(function, "nvrtcGetErrorString") == 0)
        result = nvrtc_error_text(arg_int(&call, "result", -1));
    else
        atomic_fetch_add_explicit(&calls_unknown, 1, memory_order_relaxed);
    call_end(&call, (int64_t)(intptr_t)result);
    return result;
}

_Noreturn void emu_trap(const char *function)
{
    fprintf(stderr,
            "kvsig emulated runtime: %s called by a prototype that was never proven for version "
            "%d.%d\n",
            function, atomic_load(&runtime_version) / 1000,
            atomic_load(&runtime_version) % 1000 / 10);
    fflush(stderr);
    abort();
}
