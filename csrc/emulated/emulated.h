/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The emulated CUDA runtime: what the generated glue of one ABI and the hand-written behaviour
 * (the C files beside this one) say to each other.
 *
 * The glue exports every function of the registry with its exact prototype for one interval of
 * runtime versions, and hands the arguments over by name:
 *
 *     int cudaStreamSynchronize(void *stream)
 *     {
 *         const struct emu_arg args[] = {{"stream", "cudaStream_t", &stream, sizeof stream}};
 *         return (int)emu_dispatch("cudaStreamSynchronize", "cudaStreamSynchronize",
 *                                  "11.0 and later", args, 1);
 *     }
 *
 * The behaviour reads arguments by name and has a default for each that is missing, so a prototype
 * that reorders, drops or adds parameters needs no change here.
 */
#ifndef KVSIG_EMULATED_H
#define KVSIG_EMULATED_H

#include <stddef.h>
#include <stdint.h>

/*
 * Hidden, so that two emulated runtimes in one process never answer for each other, even when both
 * are loaded RTLD_GLOBAL.
 */
#pragma GCC visibility push(hidden)

struct emu_arg {
    const char *name;  /* NVIDIA's parameter name */
    const char *type;  /* C type as declared; one that starts with "struct" travels by value */
    const void *value; /* where the argument itself lies */
    size_t size;       /* bytes of the argument */
};

/*
 * Does what FUNCTION does; the result is the error code. A function that the behaviour does not
 * know answers NotSupported. All strings must live as long as the library.
 */
int64_t emu_dispatch(const char *function, const char *symbol, const char *variant,
                     const struct emu_arg *args, size_t count);

/* The same for a function that returns a pointer; NULL where the behaviour does not know it. */
const void *emu_dispatch_pointer(const char *function, const char *symbol, const char *variant,
                                 const struct emu_arg *args, size_t count);

/* Ends the process: FUNCTION was called on a version for which no prototype was ever proven. */
_Noreturn void emu_trap(const char *function);

/* Defined by the glue: the half-open interval of runtime versions it serves; INT_MAX where open. */
extern const int emu_abi_since, emu_abi_before;

#pragma GCC visibility pop

/* Exported to kvsig/emulated.py. Streams are handles as CUDA has them; 0, 1 and 2 are special. */
#define KVSIG_EMULATED_API __attribute__((visibility("default")))

KVSIG_EMULATED_API void kvsig_emulated_abi(int *since, int *before);
KVSIG_EMULATED_API void kvsig_emulated_set_version(int runtime, int driver);
KVSIG_EMULATED_API int kvsig_emulated_set_state(const char *name);
KVSIG_EMULATED_API void kvsig_emulated_set_devices(int count);
KVSIG_EMULATED_API void kvsig_emulated_set_attribute(int attribute, int value);
KVSIG_EMULATED_API void kvsig_emulated_fault(const char *function, int error, long nth_call,
                                             long fail_index);
KVSIG_EMULATED_API void kvsig_emulated_stub(const char *function, int on);
KVSIG_EMULATED_API void kvsig_emulated_delay(const char *function, long microseconds);
KVSIG_EMULATED_API void kvsig_emulated_record(int on);
KVSIG_EMULATED_API char *kvsig_emulated_calls(void);
KVSIG_EMULATED_API void kvsig_emulated_free(void *text);
KVSIG_EMULATED_API long long kvsig_emulated_counter(const char *name);
KVSIG_EMULATED_API int kvsig_emulated_hold(void *stream);
KVSIG_EMULATED_API int kvsig_emulated_release(void *stream);
KVSIG_EMULATED_API long long kvsig_emulated_pending(void *stream);
KVSIG_EMULATED_API void *kvsig_emulated_stream_create(unsigned flags);
KVSIG_EMULATED_API int kvsig_emulated_stream_synchronize(void *stream);
KVSIG_EMULATED_API int kvsig_emulated_stream_query(void *stream);
KVSIG_EMULATED_API int kvsig_emulated_stream_destroy(void *stream);
KVSIG_EMULATED_API int kvsig_emulated_mark(void *pointer, size_t size, int host, int device);
KVSIG_EMULATED_API int kvsig_emulated_unmark(void *pointer);
KVSIG_EMULATED_API int kvsig_emulated_reset(void);

#endif
