/* SPDX-License-Identifier: Apache-2.0 */
/* Memory: which addresses are whose. */
#include <sys/mman.h>

#include "runtime.h"

pthread_mutex_t memory = PTHREAD_MUTEX_INITIALIZER;

enum origin { ALLOCATED, REGISTERED, MARKED };

struct block {
    uintptr_t start, end;
    uint64_t id; /* no two blocks ever have the same */
    int type, device;
    enum origin origin;
};

static struct block *blocks; /* sorted by address, none overlap */
static size_t block_count, block_room;
static atomic_size_t block_total;
static void **graveyard; /* freed while queues were at work: given back when they are not */
static size_t graveyard_count, graveyard_room;

/* The first block that ends behind ADDRESS. Called with `memory` held, as all of these. */
static size_t block_index(uintptr_t address)
{
    size_t low = 0, high = block_count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (blocks[middle].end <= address)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static struct block *block_of(uintptr_t address)
{
    size_t i = block_index(address);
    return i < block_count && blocks[i].start <= address ? &blocks[i] : NULL;
}

static int block_add(void *pointer, size_t size, int type, int device, enum origin origin)
{
    static uint64_t next_id = 1;
    uintptr_t start = (uintptr_t)pointer;
    size_t i = block_index(start);
    if (size > UINTPTR_MAX - start || (i < block_count && blocks[i].start < start + size))
        return 0;
    if (block_count == block_room) {
        block_room = block_room ? block_room * 2 : 64;
        blocks = must(realloc(blocks, block_room * sizeof *blocks));
    }
    memmove(&blocks[i + 1], &blocks[i], (block_count - i) * sizeof *blocks);
    blocks[i] = (struct block){start, start + size, next_id++, type, device, origin};
    atomic_store(&block_total, ++block_count);
    return 1;
}

static void block_remove(struct block *block)
{
    size_t i = (size_t)(block - blocks);
    memmove(&blocks[i], &blocks[i + 1], (block_count - i - 1) * sizeof *blocks);
    atomic_store(&block_total, --block_count);
}

/* Memory of the runtime's own lies far from everybody else's, as a GPU's does: copies whose rows are
 * evenly spaced over several tensors of a program would otherwise run over it by chance. */
#define FAR ((uintptr_t)0x6f0000000000)
#define HEAD 4096 /* before each range: its length */

static void *take_memory(size_t size)
{
    static uintptr_t next = FAR;
    size_t length = (HEAD + size + 4095) / 4096 * 4096;
    if (length < size)
        return NULL;
    pthread_mutex_lock(&memory);
    void *hint = (void *)next;
    next += length + HEAD;
    pthread_mutex_unlock(&memory);
    char *start = mmap(hint, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED)
        return NULL;
    memcpy(start, &length, sizeof length);
    return start + HEAD;
}

static void give_memory(void *pointer)
{
    size_t length;
    memcpy(&length, (char *)pointer - HEAD, sizeof length);
    munmap((char *)pointer - HEAD, length);
}

static int allocate(void **out, size_t size, int type)
{
    if (!out)
        return INVALID_VALUE;
    *out = NULL;
    int error = unsafe_call();
    if (error || !size)
        return error;
    void *pointer = take_memory(size);
    if (!pointer)
        return OUT_OF_MEMORY;
    pthread_mutex_lock(&memory);
    int added = block_add(pointer, size, type, current_device, ALLOCATED);
    pthread_mutex_unlock(&memory);
    if (!added) { /* the caller registered or marked memory that it has since freed */
        give_memory(pointer);
        return OUT_OF_MEMORY;
    }
    *out = pointer;
    return SUCCESS;
}

/* Takes a block out of the table; the caller frees it. */
static int disown(void *pointer, int host)
{
    pthread_mutex_lock(&memory);
    struct block *block = block_of((uintptr_t)pointer);
    int found = block && block->origin == ALLOCATED && block->start == (uintptr_t)pointer &&
                (block->type == MEMORY_HOST) == host;
    if (found)
        block_remove(block);
    pthread_mutex_unlock(&memory);
    return found;
}

static int release_block(void *pointer, int host)
{
    if (!pointer)
        return SUCCESS;
    int error = unsafe_call();
    if (error)
        return error;
    if (!disown(pointer, host))
        return INVALID_VALUE;
    /* A real runtime waits for the device here; a queue that is held would make that forever. */
    int pending = any_pending();
    pthread_mutex_lock(&memory);
    if (graveyard_count == graveyard_room) {
        graveyard_room = graveyard_room ? graveyard_room * 2 : 16;
        graveyard = must(realloc(graveyard, graveyard_room * sizeof *graveyard));
    }
    graveyard[graveyard_count++] = pointer;
    while (!pending && graveyard_count)
        give_memory(graveyard[--graveyard_count]);
    pthread_mutex_unlock(&memory);
    return SUCCESS;
}

int leaves_block(const void *pointer, size_t size)
{
    if (!atomic_load_explicit(&block_total, memory_order_relaxed))
        return 0;
    uintptr_t start = (uintptr_t)pointer;
    pthread_mutex_lock(&memory);
    size_t i = block_index(start);
    int leaves = 0;
    if (i < block_count && blocks[i].start <= start)
        leaves = size > blocks[i].end - start;
    else if (i < block_count)
        leaves = size > blocks[i].start - start;
    pthread_mutex_unlock(&memory);
    return leaves;
}

int memory_type(const void *pointer)
{
    if (!atomic_load_explicit(&block_total, memory_order_relaxed))
        return MEMORY_UNREGISTERED;
    pthread_mutex_lock(&memory);
    const struct block *block = block_of((uintptr_t)pointer);
    int type = block ? block->type : MEMORY_UNREGISTERED;
    pthread_mutex_unlock(&memory);
    return type;
}

/* Untracked memory stands for either side; tracked memory must be on the side that KIND says. */
int check_direction(int kind, const void *dst, const void *src)
{
    if (kind < 0 || kind > 4)
        return INVALID_DIRECTION;
    if (kind > 2)
        return SUCCESS;
    int to = memory_type(dst), from = memory_type(src);
    if ((kind == 1 ? to == MEMORY_HOST : to == MEMORY_DEVICE) ||
        (kind == 2 ? from == MEMORY_HOST : from == MEMORY_DEVICE))
        return INVALID_VALUE;
    return SUCCESS;
}

int do_malloc(struct call *call)
{
    return allocate(arg_pointer(call, "devPtr"), arg_u64(call, "size", 0), MEMORY_DEVICE);
}

int do_malloc_managed(struct call *call)
{
    return allocate(arg_pointer(call, "devPtr"), arg_u64(call, "size", 0), MEMORY_MANAGED);
}

int do_malloc_host(struct call *call)
{
    return allocate(arg_pointer2(call, "ptr", "pHost"), arg_u64(call, "size", 0), MEMORY_HOST);
}

int do_free(struct call *call)
{
    return release_block(arg_pointer(call, "devPtr"), 0);
}

int do_free_host(struct call *call)
{
    return release_block(arg_pointer(call, "ptr"), 1);
}

int do_host_register(struct call *call)
{
    void *pointer = arg_pointer(call, "ptr");
    size_t size = arg_u64(call, "size", 0);
    if (!pointer || !size)
        return INVALID_VALUE;
    int error = unsafe_call();
    if (error)
        return error;
    pthread_mutex_lock(&memory);
    int added = block_add(pointer, size, MEMORY_HOST, current_device, REGISTERED);
    pthread_mutex_unlock(&memory);
    return added ? SUCCESS : ALREADY_REGISTERED;
}

int do_host_unregister(struct call *call)
{
    void *pointer = arg_pointer(call, "ptr");
    if (!pointer)
        return INVALID_VALUE;
    int error = unsafe_call();
    if (error)
        return error;
    pthread_mutex_lock(&memory);
    struct block *block = block_of((uintptr_t)pointer);
    int found = block && block->origin != ALLOCATED && block->type == MEMORY_HOST &&
                block->start == (uintptr_t)pointer;
    if (found)
        block_remove(block);
    pthread_mutex_unlock(&memory);
    return found ? SUCCESS : NOT_REGISTERED;
}

int do_host_get_device_pointer(struct call *call)
{
    void **out = arg_pointer2(call, "pDevice", "pdptr");
    void *host = arg_pointer2(call, "pHost", "p");
    if (!out || memory_type(host) != MEMORY_HOST)
        return INVALID_VALUE;
    *out = host;
    return SUCCESS;
}

int do_pointer_get_attributes(struct call *call)
{
    struct {
        int type, device;
        const void *device_pointer, *host_pointer;
    } answer = {MEMORY_UNREGISTERED, -2, NULL, NULL};
    char *out = arg_pointer(call, "attributes");
    const void *pointer = arg_pointer(call, "ptr");
    if (!out || !pointer)
        return INVALID_VALUE;
    pthread_mutex_lock(&memory);
    const struct block *block = block_of((uintptr_t)pointer);
    if (block) {
        answer.type = block->type;
        answer.device = block->device;
        answer.device_pointer = pointer;
    }
    pthread_mutex_unlock(&memory);
    if (answer.type != MEMORY_DEVICE)
        answer.host_pointer = pointer;
    memcpy(out, &answer, sizeof answer);
    if (emu_abi_since >= 13000) /* eight longs more from 13.0 on */
        memset(out + sizeof answer, 0, 8 * sizeof(long));
    return SUCCESS;
}

enum { /* CUpointer_attribute */
    POINTER_MEMORY_TYPE = 2,
    POINTER_DEVICE_POINTER = 3,
    POINTER_HOST_POINTER = 4,
    POINTER_BUFFER_ID = 7,
    POINTER_IS_MANAGED = 8,
    POINTER_DEVICE_ORDINAL = 9,
    POINTER_RANGE_START = 11,
    POINTER_RANGE_SIZE = 12,
    POINTER_MAPPED = 13,
};

/* The answer about a block and its size in bytes; 0 where there is none. */
static size_t pointer_fact(const struct block *block, int what, uintptr_t pointer, uint64_t *fact)
{
    switch (what) {
    case POINTER_MEMORY_TYPE:
        *fact = block->type == MEMORY_HOST ? 1 : 2; /* CU_MEMORYTYPE_HOST, _DEVICE */
        return sizeof(unsigned);
    case POINTER_DEVICE_POINTER:
        *fact = pointer;
        return sizeof(uint64_t);
    case POINTER_HOST_POINTER:
        *fact = pointer;
        return block->type == MEMORY_DEVICE ? 0 : sizeof(uint64_t);
    case POINTER_BUFFER_ID:
        *fact = block->id;
        return sizeof(uint64_t);
    case POINTER_IS_MANAGED:
        *fact = block->type == MEMORY_MANAGED;
        return sizeof(unsigned);
    case POINTER_DEVICE_ORDINAL:
        *fact = (uint64_t)block->device;
        return sizeof(int);
    case POINTER_RANGE_START:
        *fact = block->start;
        return sizeof(uint64_t);
    case POINTER_RANGE_SIZE:
        *fact = block->end - block->start;
        return sizeof(uint64_t);
    case POINTER_MAPPED:
        *fact = 1;
        return sizeof(unsigned);
    default:
        return 0;
    }
}

/* Memory that no call allocated or registered is INVALID_VALUE, and nothing is written. */
int do_pointer_get_attribute(struct call *call)
{
    void *out = arg_pointer(call, "data");
    uintptr_t pointer = (uintptr_t)arg_pointer(call, "ptr");
    uint64_t fact = 0;
    size_t size = 0;
    if (!out || !pointer)
        return INVALID_VALUE;
    pthread_mutex_lock(&memory);
    const struct block *block = block_of(pointer);
    if (block)
        size = pointer_fact(block, arg_int(call, "attribute", 0), pointer, &fact);
    pthread_mutex_unlock(&memory);
    memcpy(out, &fact, size); /* little-endian */
    return size ? SUCCESS : INVALID_VALUE;
}

int do_mem_get_info(struct call *call)
{
    size_t *available = arg_pointer(call, "free"), *total = arg_pointer(call, "total");
    size_t used = 0;
    pthread_mutex_lock(&memory);
    for (size_t i = 0; i < block_count; i++)
        if (blocks[i].type == MEMORY_DEVICE)
            used += blocks[i].end - blocks[i].start;
    pthread_mutex_unlock(&memory);
    size_t all = (size_t)80 << 30;
    if (available)
        *available = used < all ? all - used : 0;
    if (total)
        *total = all;
    return SUCCESS;
}

/* What was marked may have been freed meanwhile. */
void memory_reset(void)
{
    pthread_mutex_lock(&memory);
    for (size_t i = block_count; i-- > 0;)
        if (blocks[i].origin == MARKED)
            block_remove(&blocks[i]);
    pthread_mutex_unlock(&memory);
}

int kvsig_emulated_mark(void *pointer, size_t size, int host, int device)
{
    if (!pointer || !size || device < 0 || device >= MAX_DEVICES)
        return INVALID_VALUE;
    pthread_mutex_lock(&memory);
    int added = block_add(pointer, size, host ? MEMORY_HOST : MEMORY_DEVICE, device, MARKED);
    pthread_mutex_unlock(&memory);
    return added ? SUCCESS : ALREADY_REGISTERED;
}

int kvsig_emulated_unmark(void *pointer)
{
    pthread_mutex_lock(&memory);
    struct block *block = block_of((uintptr_t)pointer);
    int found = block && block->origin == MARKED && block->start == (uintptr_t)pointer;
    if (found)
        block_remove(block);
    pthread_mutex_unlock(&memory);
    return found ? SUCCESS : NOT_REGISTERED;
}
