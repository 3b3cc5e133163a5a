/* SPDX-License-Identifier: Apache-2.0 */
/* Copies that come as lists, with attributes. */
#include "runtime.h"

atomic_llong batches_taken;

enum { ORDER_STREAM = 1, ORDER_DURING_CALL = 2, ORDER_ANY = 3 };

/* The layout of struct cudaMemcpyAttributes in every release. */
struct attributes {
    int order;
    struct {
        int type, id;
    } src_hint, dst_hint;
    unsigned flags;
};

static int order_known(int order)
{
    return order == ORDER_STREAM || order == ORDER_DURING_CALL || order == ORDER_ANY;
}

/* What batch calls ask of a stream: not the legacy one, not captured. */
static int check_batch_stream(void *handle)
{
    return !handle || handle == LEGACY_STREAM ? INVALID_VALUE : refuse_captured(handle);
}

/* Reads the sources that may be read early, at once, where ORDER says so. */
static void read_early(struct work *work, const int *orders)
{
    size_t count = work->copies.count, total = 0, at = 0;
    struct copy *copy = work_copies(work);
    for (size_t i = 0; i < count; i++)
        total += orders[i] == ORDER_STREAM ? 0 : copy[i].size;
    if (!total)
        return;
    work->copies.early = must(malloc(total));
    for (size_t i = 0; i < count; i++) {
        if (orders[i] == ORDER_STREAM)
            continue;
        memcpy(work->copies.early + at, copy[i].src, copy[i].size);
        copy[i].src = work->copies.early + at;
        at += copy[i].size;
    }
}

static void observe_numbers(struct call *call, const char *name, const size_t *values, size_t count)
{
    text_add(&call->observed, ", \"%s\": [", name);
    for (size_t i = 0; values && i < count; i++)
        text_add(&call->observed, "%s%zu", i ? ", " : "", values[i]);
    text_add(&call->observed, "]");
}

static void observe_attributes(struct call *call, const struct attributes *attributes, size_t count)
{
    text_add(&call->observed, ", \"attributes\": [");
    for (size_t i = 0; attributes && i < count; i++) {
        text_add(&call->observed, "%s{\"srcAccessOrder\": %d, \"flags\": %u, \"bytes\": ",
                 i ? ", " : "", attributes[i].order, attributes[i].flags);
        text_hex(&call->observed, &attributes[i], sizeof attributes[i]);
        text_add(&call->observed, "}");
    }
    text_add(&call->observed, "]");
}

int do_memcpy_batch_async(struct call *call)
{
    enum { SHOWN = 1024 };
    void *const *dsts = arg_pointer(call, "dsts");
    const void *const *srcs = arg_pointer(call, "srcs");
    const size_t *sizes = arg_pointer(call, "sizes");
    size_t count = arg_u64(call, "count", 0);
    const struct attributes *attributes = arg_pointer(call, "attrs");
    /* A prototype may come without either: one attribute for all copies, then. */
    size_t attribute_count = arg_u64(call, "numAttrs", 1);
    const size_t *starts = arg_pointer(call, "attrsIdxs");
    size_t *fail_index = arg_pointer(call, "failIdx");
    void *stream = arg_stream(call);
    int has_attributes = find_arg(call, "attrs") != NULL;
    int has_starts = find_arg(call, "attrsIdxs") != NULL;

    if (fail_index)
        *fail_index = SIZE_MAX;
    if (call->recording) {
        size_t shown = count < SHOWN ? count : SHOWN;
        size_t shown_attributes = attribute_count < SHOWN ? attribute_count : SHOWN;
        text_add(&call->observed, "\"copies\": %zu", count);
        observe_numbers(call, "dsts", (const size_t *)(const void *)dsts, shown);
        observe_numbers(call, "srcs", (const size_t *)(const void *)srcs, shown);
        observe_numbers(call, "sizes", sizes, shown);
        observe_attributes(call, attributes, shown_attributes);
        observe_numbers(call, "attrsIdxs", starts, shown_attributes);
    }
    int error = check_batch_stream(stream);
    if (error)
        return error;
    if (!count || !dsts || !srcs || !sizes)
        return INVALID_VALUE;
    if (count > SIZE_MAX / 64)
        return OUT_OF_MEMORY;
    if (has_attributes && (!attributes || !attribute_count || attribute_count > count))
        return INVALID_VALUE;
    if (has_starts && (!starts || starts[0] != 0))
        return INVALID_VALUE;
    for (size_t i = 0; has_attributes && i < attribute_count; i++)
        if (!order_known(attributes[i].order) ||
            (has_starts && i && (starts[i] <= starts[i - 1] || starts[i] >= count)))
            return INVALID_VALUE;

    struct work *work = work_new(WORK_COPIES, count, 0);
    struct copy *copies = work_copies(work);
    int *orders = NULL;
    size_t taken = 0, attribute = 0;
    for (; taken < count; taken++) {
        if (call->fault_index >= 0 && taken == (size_t)call->fault_index) {
            error = call->fault_error;
            break;
        }
        if (!dsts[taken] || !srcs[taken] || !sizes[taken] ||
            leaves_block(dsts[taken], sizes[taken]) || leaves_block(srcs[taken], sizes[taken])) {
            error = INVALID_VALUE;
            break;
        }
        copies[taken] = (struct copy){dsts[taken], srcs[taken], sizes[taken]};
        if (!has_attributes)
            continue;
        while (has_starts && attribute + 1 < attribute_count && starts[attribute + 1] <= taken)
            attribute++;
        if (attributes[attribute].order != ORDER_STREAM && !orders) {
            orders = must(malloc(count * sizeof *orders));
            for (size_t i = 0; i < taken; i++)
                orders[i] = ORDER_STREAM;
        }
        if (orders)
            orders[taken] = attributes[attribute].order;
    }
    if (!error && call->fault_index >= 0)
        error = call->fault_error; /* an index behind the last copy */
    if (error && fail_index)
        *fail_index = taken;
    /* The copies before the refused one are made, as real runtimes do. */
    work->copies.count = taken;
    if (orders)
        read_early(work, orders);
    free(orders);
    int submitted = SUCCESS;
    if (taken)
        submitted = submit(stream, work);
    else
        work_drop(work);
    if (!error)
        error = submitted;
    if (!error)
        atomic_fetch_add_explicit(&batches_taken, 1, memory_order_relaxed);
    return error;
}

struct operand {
    int type;
    struct {
        void *pointer;
        size_t row_length, layer_height;
        int hint[2];
    } at;
};

struct batch_operation {
    struct operand src, dst;
    size_t width, height, depth;
    int order;
    unsigned flags;
};

/* What one 3-D operation copies, or the error that it answers. */
static int read_operation(const struct batch_operation *op, struct rows *row)
{
    if (op->src.type == 2 || op->dst.type == 2) /* CUDA arrays */
        return NOT_SUPPORTED;
    *row = (struct rows){
        .dst = op->dst.at.pointer,
        .src = op->src.at.pointer,
        .dst_row = op->dst.at.row_length ? op->dst.at.row_length : op->width,
        .src_row = op->src.at.row_length ? op->src.at.row_length : op->width,
        .width = op->width,
        .height = op->height,
        .depth = op->depth,
    };
    size_t dst_rows = op->dst.at.layer_height ? op->dst.at.layer_height : op->height;
    size_t src_rows = op->src.at.layer_height ? op->src.at.layer_height : op->height;
    row->dst_layer = row->dst_row * dst_rows;
    row->src_layer = row->src_row * src_rows;
    if (op->src.type != 1 || op->dst.type != 1 || !row->dst || !row->src || !op->width ||
        !op->height || !op->depth || !order_known(op->order) || row->dst_row < op->width ||
        row->src_row < op->width || row->dst_layer < row->dst_row * op->height ||
        row->src_layer < row->src_row * op->height)
        return INVALID_VALUE;
    size_t dst_end =
        (op->depth - 1) * row->dst_layer + (op->height - 1) * row->dst_row + op->width;
    size_t src_end =
        (op->depth - 1) * row->src_layer + (op->height - 1) * row->src_row + op->width;
    return leaves_block(row->dst, dst_end) || leaves_block(row->src, src_end) ? INVALID_VALUE
                                                                              : SUCCESS;
}

int do_memcpy_3d_batch_async(struct call *call)
{
    const struct batch_operation *list = arg_pointer(call, "opList");
    size_t count = arg_u64(call, "numOps", 0), taken = 0;
    size_t *fail_index = arg_pointer(call, "failIdx");
    void *stream = arg_stream(call);
    if (fail_index)
        *fail_index = SIZE_MAX;
    if (call->recording)
        text_add(&call->observed, "\"copies\": %zu", count);
    int error = check_batch_stream(stream);
    if (error)
        return error;
    if (!count || !list || arg_u64(call, "flags", 0))
        return INVALID_VALUE;
    if (count > SIZE_MAX / 128)
        return OUT_OF_MEMORY;
    struct work *work = work_new(WORK_ROWS, 0, count);
    while (taken < count && !error) {
        error = call->fault_index >= 0 && taken == (size_t)call->fault_index
                    ? call->fault_error
                    : read_operation(&list[taken], &work_rows(work)[taken]);
        taken += !error;
    }
    if (!error && call->fault_index >= 0)
        error = call->fault_error;
    if (error && fail_index)
        *fail_index = taken;
    work->rows = taken;
    int submitted = SUCCESS;
    if (taken)
        submitted = submit(stream, work);
    else
        work_drop(work);
    return error ? error : submitted;
}

int do_memcpy_3d_with_attributes_async(struct call *call)
{
    const struct batch_operation *op = arg_pointer(call, "op");
    struct rows row;
    if (!op || arg_u64(call, "flags", 0))
        return INVALID_VALUE;
    int error = read_operation(op, &row);
    if (error)
        return error;
    struct work *work = work_new(WORK_ROWS, 0, 1);
    work_rows(work)[0] = row;
    return submit(arg_stream(call), work);
}

int do_memcpy_with_attributes_async(struct call *call)
{
    void *dst = arg_pointer(call, "dst");
    const void *src = arg_pointer(call, "src");
    size_t size = arg_u64(call, "size", 0);
    const struct attributes *attributes = arg_pointer(call, "attr");
    if (call->recording) {
        text_add(&call->observed, "\"copies\": 1");
        observe_attributes(call, attributes, 1);
    }
    if (!attributes || !order_known(attributes->order) || !dst || !src || !size ||
        leaves_block(dst, size) || leaves_block(src, size))
        return INVALID_VALUE;
    struct work *work = work_new(WORK_COPIES, 1, 0);
    work_copies(work)[0] = (struct copy){dst, src, size};
    read_early(work, &attributes->order);
    return submit(arg_stream(call), work);
}
