/* SPDX-License-Identifier: Apache-2.0 */
/* Copies of one range or of evenly spaced rows, and what else is done to memory. */
#include "runtime.h"

/* Copies to the device of up to so many bytes of pageable memory are read during the call, as CUDA
 * documents it ("API synchronization behavior" of its runtime). */
#define STAGED 65536

static int is_staged(void *stream, const void *dst, const void *src, size_t size)
{
    return size <= STAGED && memory_type(dst) == MEMORY_DEVICE &&
           memory_type(src) == MEMORY_UNREGISTERED && refuse_captured(stream) == SUCCESS;
}

static int one_copy(void *stream, void *dst, const void *src, size_t size)
{
    struct work *work = work_new(WORK_COPIES, 1, 0);
    if (is_staged(stream, dst, src, size)) {
        work->copies.early = must(malloc(size));
        src = memcpy(work->copies.early, src, size);
    }
    work_copies(work)[0] = (struct copy){dst, src, size};
    return submit(stream, work);
}

static int check_copy(const struct call *call, void *dst, const void *src, size_t size)
{
    if (!dst || !src)
        return INVALID_VALUE;
    int error = check_direction(arg_int(call, "kind", 4), dst, src);
    if (!error && (leaves_block(dst, size) || leaves_block(src, size)))
        error = INVALID_VALUE;
    return error;
}

int do_memcpy_async(struct call *call)
{
    void *dst = arg_pointer(call, "dst");
    const void *src = arg_pointer(call, "src");
    size_t size = arg_u64(call, "count", 0);
    if (!size)
        return SUCCESS;
    int error = check_copy(call, dst, src, size);
    return error ? error : one_copy(arg_stream(call), dst, src, size);
}

int do_memcpy_2d_async(struct call *call)
{
    struct rows row = {
        .dst = arg_pointer(call, "dst"),
        .src = arg_pointer(call, "src"),
        .dst_row = arg_u64(call, "dpitch", 0),
        .src_row = arg_u64(call, "spitch", 0),
        .width = arg_u64(call, "width", 0),
        .height = arg_u64(call, "height", 0),
        .depth = 1,
    };
    if (!row.width || !row.height)
        return SUCCESS;
    if (row.dst_row < row.width || row.src_row < row.width || row.dst_row > INT32_MAX ||
        row.src_row > INT32_MAX)
        return INVALID_PITCH;
    if (!row.dst || !row.src)
        return INVALID_VALUE;
    int error = check_direction(arg_int(call, "kind", 4), row.dst, row.src);
    if (error)
        return error;
    if (leaves_block(row.dst, (row.height - 1) * row.dst_row + row.width) ||
        leaves_block(row.src, (row.height - 1) * row.src_row + row.width))
        return INVALID_VALUE;
    struct work *work = work_new(WORK_ROWS, 0, 1);
    work_rows(work)[0] = row;
    return submit(arg_stream(call), work);
}

struct pitched {
    char *ptr;
    size_t pitch, xsize, ysize;
};

struct parameters_3d { /* cudaMemcpy3DParms */
    void *src_array;
    size_t src_pos[3];
    struct pitched src;
    void *dst_array;
    size_t dst_pos[3];
    struct pitched dst;
    size_t width, height, depth;
    int kind;
};

static char *first_byte(const struct pitched *side, const size_t *pos)
{
    return side->ptr + (pos[2] * side->ysize + pos[1]) * side->pitch + pos[0];
}

int do_memcpy_3d_async(struct call *call)
{
    const struct parameters_3d *p = arg_pointer(call, "p");
    if (!p)
        return INVALID_VALUE;
    if (p->src_array || p->dst_array)
        return NOT_SUPPORTED;
    if (!p->width || !p->height || !p->depth)
        return SUCCESS;
    if (!p->src.ptr || !p->dst.ptr)
        return INVALID_VALUE;
    struct rows row = {
        .dst = first_byte(&p->dst, p->dst_pos),
        .src = first_byte(&p->src, p->src_pos),
        .dst_row = p->dst.pitch,
        .src_row = p->src.pitch,
        .dst_layer = p->dst.pitch * p->dst.ysize,
        .src_layer = p->src.pitch * p->src.ysize,
        .width = p->width,
        .height = p->height,
        .depth = p->depth,
    };
    if (row.dst_row < row.width || row.src_row < row.width || row.dst_row > INT32_MAX ||
        row.src_row > INT32_MAX)
        return INVALID_PITCH;
    if (row.depth > 1 && (p->dst.ysize < row.height || p->src.ysize < row.height))
        return INVALID_VALUE;
    int error = check_direction(p->kind, row.dst, row.src);
    if (error)
        return error;
    size_t last = row.height - 1;
    if (leaves_block(row.dst, (row.depth - 1) * row.dst_layer + last * row.dst_row + row.width) ||
        leaves_block(row.src, (row.depth - 1) * row.src_layer + last * row.src_row + row.width))
        return INVALID_VALUE;
    struct work *work = work_new(WORK_ROWS, 0, 1);
    work_rows(work)[0] = row;
    return submit(arg_stream(call), work);
}

int do_memset_async(struct call *call)
{
    struct work *work;
    char *dst = arg_pointer(call, "devPtr");
    size_t size = arg_u64(call, "count", 0);
    if (!size)
        return SUCCESS;
    if (!dst || leaves_block(dst, size))
        return INVALID_VALUE;
    work = work_new(WORK_SET, 0, 0);
    work->set.dst = dst;
    work->set.value = arg_int(call, "value", 0);
    work->set.size = size;
    return submit(arg_stream(call), work);
}

int do_mem_prefetch_async(struct call *call)
{
    if (!arg_pointer(call, "devPtr") || !arg_u64(call, "count", 0))
        return INVALID_VALUE;
    return submit(arg_stream(call), work_new(WORK_NOTHING, 0, 0));
}

int do_mem_advise(struct call *call)
{
    return arg_pointer(call, "devPtr") && arg_u64(call, "count", 0) ? SUCCESS : INVALID_VALUE;
}
