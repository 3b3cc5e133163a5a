/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What stands for NVRTC: "compiling" finds which kernels of kernels.c a source speaks of and
 * writes their names down; a line with #error in it does not compile. No code is looked at.
 */
#include "runtime.h"

#include <ctype.h>

enum {
    NVRTC_SUCCESS = 0,
    NVRTC_INVALID_INPUT = 3,
    NVRTC_INVALID_PROGRAM = 4,
    NVRTC_INVALID_OPTION = 5,
    NVRTC_COMPILATION = 6,
};

enum { PROGRAM_MAGIC = 0x4b565052 };

struct program {
    unsigned magic;
    char *name, *source;
    struct text cubin, ptx, log; /* data is NULL until compiled */
};

static const int architectures[] = {50, 60, 70, 75, 80, 86, 89, 90, 100, 103, 120};

/* CUDA 13 dropped those before 75, and 12.8 brought 100 and 120. */
static int architecture_known(int number)
{
    int runtime = atomic_load(&runtime_version);
    if ((runtime >= 13000 && number < 75) || (runtime < 12080 && number >= 100))
        return 0;
    for (size_t i = 0; i < COUNT(architectures); i++)
        if (architectures[i] == number)
            return 1;
    return 0;
}

const char *nvrtc_error_text(int code)
{
    static const char *const names[] = {
        "NVRTC_SUCCESS",
        "NVRTC_ERROR_OUT_OF_MEMORY",
        "NVRTC_ERROR_PROGRAM_CREATION_FAILURE",
        "NVRTC_ERROR_INVALID_INPUT",
        "NVRTC_ERROR_INVALID_PROGRAM",
        "NVRTC_ERROR_INVALID_OPTION",
        "NVRTC_ERROR_COMPILATION",
        "NVRTC_ERROR_BUILTIN_OPERATION_FAILURE",
        "NVRTC_ERROR_NO_NAME_EXPRESSIONS_AFTER_COMPILATION",
        "NVRTC_ERROR_NO_LOWERED_NAMES_BEFORE_COMPILATION",
        "NVRTC_ERROR_NAME_EXPRESSION_NOT_VALID",
        "NVRTC_ERROR_INTERNAL_ERROR",
    };
    return code >= 0 && code < (int)COUNT(names) ? names[code] : "NVRTC_ERROR unknown";
}

int do_nvrtc_version(struct call *call)
{
    int version = atomic_load(&runtime_version);
    int error = store_int(call, "major", version / 1000);
    if (!error)
        error = store_int(call, "minor", version % 1000 / 10);
    return error ? NVRTC_INVALID_INPUT : NVRTC_SUCCESS;
}

int do_nvrtc_arch_count(struct call *call)
{
    int count = 0;
    for (size_t i = 0; i < COUNT(architectures); i++)
        count += architecture_known(architectures[i]);
    return store_int(call, "numArchs", count) ? NVRTC_INVALID_INPUT : NVRTC_SUCCESS;
}

int do_nvrtc_archs(struct call *call)
{
    int *out = arg_pointer(call, "supportedArchs");
    if (!out)
        return NVRTC_INVALID_INPUT;
    for (size_t i = 0; i < COUNT(architectures); i++)
        if (architecture_known(architectures[i]))
            *out++ = architectures[i];
    return NVRTC_SUCCESS;
}

static struct program *program_of(const struct call *call)
{
    struct program *program = arg_pointer(call, "prog");
    return program && program->magic == PROGRAM_MAGIC ? program : NULL;
}

int do_nvrtc_create(struct call *call)
{
    void **out = arg_pointer(call, "prog");
    const char *source = arg_pointer(call, "src"), *name = arg_pointer(call, "name");
    if (!out || !source)
        return NVRTC_INVALID_INPUT;
    struct program *program = must(calloc(1, sizeof *program));
    program->magic = PROGRAM_MAGIC;
    program->source = must(strdup(source));
    program->name = must(strdup(name ? name : "default_program"));
    text_bytes(&program->log, "", 0);
    *out = program;
    return NVRTC_SUCCESS;
}

static void program_forget(struct program *program)
{
    free(program->cubin.data);
    free(program->ptx.data);
    free(program->log.data);
    program->cubin = program->ptx = program->log = (struct text){0};
}

int do_nvrtc_destroy(struct call *call)
{
    void **handle = arg_pointer(call, "prog");
    struct program *program = handle ? *handle : NULL;
    if (!program || program->magic != PROGRAM_MAGIC)
        return NVRTC_INVALID_PROGRAM;
    program_forget(program);
    program->magic = 0;
    free(program->name);
    free(program->source);
    free(program);
    *handle = NULL;
    return NVRTC_SUCCESS;
}

/* The architecture that an option asks for; 0 where it asks for none, -1 where for a wrong one. */
static int option_architecture(const char *option, int *virtual_only)
{
    static const char *const names[] = {"--gpu-architecture=", "-arch="};
    for (size_t i = 0; i < COUNT(names); i++) {
        if (strncmp(option, names[i], strlen(names[i])))
            continue;
        const char *value = option + strlen(names[i]);
        *virtual_only = strncmp(value, "compute_", 8) == 0;
        if (!*virtual_only && strncmp(value, "sm_", 3))
            return -1;
        char *end;
        long number = strtol(strchr(value, '_') + 1, &end, 10);
        int tail = *end == 0 || (strchr("af", *end) && !end[1]);
        return tail && number < 1000 && architecture_known((int)number) ? (int)number : -1;
    }
    return option[0] == '-' ? 0 : -1;
}

static int is_word(char c)
{
    return isalnum((unsigned char)c) || c == '_';
}

static int mentions(const char *source, const char *name)
{
    size_t length = strlen(name);
    for (const char *at = strstr(source, name); at; at = strstr(at + 1, name))
        if ((at == source || !is_word(at[-1])) && !is_word(at[length]))
            return 1;
    return 0;
}

/* Writes the log and answers the line of the first #error, 0 where there is none. */
static int find_error(struct program *program)
{
    int number = 1;
    for (const char *line = program->source; line; number++) {
        const char *at = line + strspn(line, " \t");
        if (strncmp(at, "#error", 6) == 0) {
            text_bytes(&program->log, program->name, strlen(program->name));
            text_add(&program->log, "(%d): error: ", number);
            text_bytes(&program->log, at, strcspn(at, "\n"));
            text_add(&program->log, "\n");
            return number;
        }
        line = strchr(line, '\n');
        line += line != NULL;
    }
    return 0;
}

int do_nvrtc_compile(struct call *call)
{
    struct program *program = program_of(call);
    const char *const *options = arg_pointer(call, "options");
    int count = arg_int(call, "numOptions", 0), virtual_only = 1;
    if (!program)
        return NVRTC_INVALID_PROGRAM;
    if (count < 0 || (count && !options))
        return NVRTC_INVALID_INPUT;
    program_forget(program);
    text_bytes(&program->log, "", 0);
    for (int i = 0; i < count; i++) {
        if (option_architecture(options[i], &virtual_only) >= 0)
            continue;
        text_add(&program->log, "nvrtc: error: invalid value for option: ");
        text_bytes(&program->log, options[i], strlen(options[i]));
        text_add(&program->log, "\n");
        return NVRTC_INVALID_OPTION;
    }
    if (find_error(program))
        return NVRTC_COMPILATION;
    struct text *images[] = {&program->ptx, virtual_only ? NULL : &program->cubin};
    for (size_t i = 0; i < COUNT(images) && images[i]; i++) {
        text_bytes(images[i], IMAGE_HEAD, strlen(IMAGE_HEAD));
        const struct kernel *kernel;
        for (size_t k = 0; (kernel = kernel_at(k)); k++)
            if (mentions(program->source, kernel->name)) {
                text_bytes(images[i], kernel->name, strlen(kernel->name));
                text_bytes(images[i], "\n", 1);
            }
    }
    return NVRTC_SUCCESS;
}

/* Which of a program's texts a function is about. A virtual architecture has no cubin: size 0. */
static const struct text *text_asked(const struct call *call, const struct program *program)
{
    return strstr(call->function, "CUBIN") ? &program->cubin
           : strstr(call->function, "PTX") ? &program->ptx
                                           : &program->log;
}

int do_nvrtc_size(struct call *call)
{
    static const char *const names[] = {"cubinSizeRet", "ptxSizeRet", "logSizeRet"};
    const struct program *program = program_of(call);
    size_t *out = NULL;
    for (size_t i = 0; i < COUNT(names) && !out; i++)
        out = arg_pointer(call, names[i]);
    if (!program)
        return NVRTC_INVALID_PROGRAM;
    if (!out)
        return NVRTC_INVALID_INPUT;
    const struct text *text = text_asked(call, program);
    if (!text->data && !program->ptx.data)
        return NVRTC_INVALID_PROGRAM; /* not compiled */
    *out = text->data ? text->length + 1 : 0;
    return NVRTC_SUCCESS;
}

int do_nvrtc_text(struct call *call)
{
    static const char *const names[] = {"cubin", "ptx", "log"};
    const struct program *program = program_of(call);
    char *out = NULL;
    for (size_t i = 0; i < COUNT(names) && !out; i++)
        out = arg_pointer(call, names[i]);
    if (!program)
        return NVRTC_INVALID_PROGRAM;
    if (!out)
        return NVRTC_INVALID_INPUT;
    const struct text *text = text_asked(call, program);
    if (!text->data)
        return NVRTC_INVALID_PROGRAM;
    memcpy(out, text->data, text->length + 1);
    return NVRTC_SUCCESS;
}
