/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Moves pages of a KV cache between mapped host memory and a GPU, or within a GPU: all layers in
 * one launch, with a flag for each layer. NVRTC and nvcc take this file as it is. The first part
 * is C as well: the emulated runtime's double and the core take the structures and the arithmetic
 * of tiles from here. Compile it with -DKVSIG_UNIT=16 (or 8, 4, 2, 1), and with at most 32
 * registers for what has no launch bounds: -maxrregcount=32.
 *
 * A page of a plane is `rows` rows of `units` units; the unit, 16 bytes down to 1, is what every
 * base, pitch and width of the table is a multiple of. Rows of all pages, in the order of the
 * list, are cut into tiles regardless of where one ends, and warps take tiles in turn.
 */
typedef unsigned int kvsig_u32;
typedef unsigned long long kvsig_u64;

enum {
    KVSIG_DEVICE = 0, /* sides: index of every pair below */
    KVSIG_HOST = 1,
    KVSIG_FEW = 256,        /* page numbers that a launch can carry itself */
    KVSIG_LANES = 32,       /* threads of a warp */
    KVSIG_CHUNKS = 8,       /* units that a lane of a wide block holds at a time */
    KVSIG_THIN_CHUNKS = 2,  /* the same in one-warp blocks, of which there are many */
    KVSIG_THREADS = 512,    /* of a wide block, at most; thin ones have KVSIG_LANES */
};

/* One layer's K or V; 64 bytes, in device memory. */
struct kvsig_plane {
    kvsig_u64 base[2];      /* address of row 0 of page 0 */
    kvsig_u64 pitch[2];     /* bytes from page to page */
    kvsig_u64 row_pitch[2]; /* bytes from row to row */
    kvsig_u64 inverse;      /* (2**64 - 1) / units */
    kvsig_u32 units;        /* of a row */
    kvsig_u32 rows;         /* of a page */
};

/* What a launch found wrong, in memory that both sides see; written while `state` is 0. */
struct kvsig_wrong {
    kvsig_u32 state;    /* 1: there is something */
    kvsig_u32 side;
    kvsig_u64 position; /* in the list */
    long long value;
};

/* The parameter of both kernels. */
struct kvsig_page_copy {
    const struct kvsig_plane *planes; /* in the order in which they are to be moved */
    const void *pages[2];             /* page numbers in device memory; NULL: in `few` */
    kvsig_u64 limit[2];               /* pages of each side; a number must be below it */
    kvsig_u32 *counts;                /* a word a layer, 0 between launches; NULL: no flags */
    kvsig_u32 *flags;                 /* a word a layer */
    struct kvsig_wrong *wrong;        /* NULL: page numbers have been checked already */
    kvsig_u32 page_count;
    kvsig_u32 plane_count;
    kvsig_u32 layer_planes; /* planes of a layer, side by side in the table */
    kvsig_u32 regular;      /* 1: all layers have the same rows and units, plane by plane */
    kvsig_u32 source;       /* the side to read */
    kvsig_u32 unit;         /* bytes: 16, 8, 4, 2 or 1 */
    kvsig_u32 number[2];    /* bytes of a page number: 4 or 8, signed */
    kvsig_u32 value;        /* what a flag becomes when its layer is there */
    kvsig_u32 pace;         /* ns from tile to tile of a warp; 0: as fast as it goes. Wide only */
    kvsig_u32 first_page;   /* place of this launch's first page in the lists of the request */
    kvsig_u32 list_count;   /* numbers of those lists, all of which are checked */
    int few[2][KVSIG_FEW];
};

#ifdef __CUDACC__
#define KVSIG_SHARED static __device__ __forceinline__
#define KVSIG_HIGH(x, y) __umul64hi(x, y)
#else
#define KVSIG_SHARED static inline
#define KVSIG_HIGH(x, y) ((kvsig_u64)(((unsigned __int128)(x) * (y)) >> 64))
#endif

/* Tiles of a plane. Rows of fewer units than a lane holds make tiles of as many rows as there are
 * lanes, so that a tile never has more rows than lanes: each lane knows the place of one row. */
KVSIG_SHARED kvsig_u32 kvsig_tiles(const struct kvsig_plane *plane, kvsig_u32 pages,
                                   kvsig_u32 chunks)
{
    const kvsig_u64 rows = (kvsig_u64)pages * plane->rows, tile = chunks * KVSIG_LANES;

    if (plane->units < chunks)
        return (kvsig_u32)((rows + KVSIG_LANES - 1) / KVSIG_LANES);
    return (kvsig_u32)((rows * plane->units + tile - 1) / tile);
}

struct kvsig_tile {
    kvsig_u32 row;   /* its first row, counted over all pages */
    kvsig_u32 first; /* unit of that row with which it begins */
    kvsig_u32 units; /* how many it has */
};

KVSIG_SHARED struct kvsig_tile kvsig_tile_at(const struct kvsig_plane *plane, kvsig_u32 pages,
                                             kvsig_u32 index, kvsig_u32 chunks)
{
    const kvsig_u32 units = plane->units;
    const kvsig_u32 size = (units < chunks ? units : chunks) * KVSIG_LANES;
    const kvsig_u64 start = (kvsig_u64)index * size;
    const kvsig_u64 left = (kvsig_u64)pages * plane->rows * units - start;
    kvsig_u64 row = KVSIG_HIGH(start, plane->inverse), first = start - row * units;
    struct kvsig_tile tile;

    if (first >= units) { /* the inverse is rounded down, which can be one short */
        row++;
        first -= units;
    }
    tile.row = (kvsig_u32)row;
    tile.first = (kvsig_u32)first;
    tile.units = left < size ? (kvsig_u32)left : size;
    return tile;
}

#ifdef __CUDACC__

#define ALL 0xffffffffu

template <int BYTES> struct word;
template <> struct word<16> {
    uint4 w;
    __device__ __forceinline__ void load(kvsig_u64 from)
    {
        asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w) : "l"(from));
    }
    __device__ __forceinline__ void store(kvsig_u64 to) const
    {
        asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};"
                     :: "l"(to), "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w) : "memory");
    }
};
template <> struct word<8> {
    uint2 w;
    __device__ __forceinline__ void load(kvsig_u64 from)
    {
        asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
                     : "=r"(w.x), "=r"(w.y) : "l"(from));
    }
    __device__ __forceinline__ void store(kvsig_u64 to) const
    {
        asm volatile("st.global.cs.v2.u32 [%0], {%1, %2};"
                     :: "l"(to), "r"(w.x), "r"(w.y) : "memory");
    }
};
#define SMALL_WORD(BYTES, TYPE)                                                                  \
    template <> struct word<BYTES> {                                                             \
        kvsig_u32 w;                                                                             \
        __device__ __forceinline__ void load(kvsig_u64 from)                                     \
        {                                                                                        \
            asm volatile("ld.global.L1::no_allocate." TYPE " %0, [%1];" : "=r"(w) : "l"(from));  \
        }                                                                                        \
        __device__ __forceinline__ void store(kvsig_u64 to) const                                \
        {                                                                                        \
            asm volatile("st.global.cs." TYPE " [%0], %1;" :: "l"(to), "r"(w) : "memory");       \
        }                                                                                        \
    };
SMALL_WORD(4, "u32")
SMALL_WORD(2, "u16")
SMALL_WORD(1, "u8")

static __device__ __forceinline__ kvsig_u64 nanoseconds()
{
    kvsig_u64 now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    return now;
}

/* A page number of the list; of a long one the lower half, which is all of it once checked. */
static __device__ __forceinline__ const int *number_at(const kvsig_page_copy &a, kvsig_u32 side,
                                                       kvsig_u32 position)
{
    const void *list = a.pages[side] ? a.pages[side] : a.few[side];
    return reinterpret_cast<const int *>(static_cast<const char *>(list) +
                                         (kvsig_u64)position * a.number[side]);
}

/* A page number in device memory, by its place in the list of the request. */
static __device__ __forceinline__ long long whole_number(const kvsig_page_copy &a, kvsig_u32 side,
                                                         kvsig_u32 position)
{
    const kvsig_u64 offset = ((kvsig_u64)position - a.first_page) * a.number[side];
    const int *at = reinterpret_cast<const int *>(static_cast<const char *>(a.pages[side]) + offset);
    const int high = a.number[side] == 8 ? at[1] : at[0] >> 31;
    return (long long)high << 32 | (kvsig_u32)at[0];
}

/* Address of a row on one side, which lies on page `position` of the list. */
static __device__ __forceinline__ kvsig_u64 place(const kvsig_page_copy &a,
                                                  const kvsig_plane &plane, kvsig_u32 side,
                                                  kvsig_u32 position, kvsig_u32 row)
{
    return plane.base[side] + (kvsig_u32)*number_at(a, side, position) * plane.pitch[side] +
           row * plane.row_pitch[side];
}

/* One tile as a lane sees it: where the row lies that is the lane's to know, and the way from one
 * of its units to the next. */
struct view {
    kvsig_u64 from, to;
    kvsig_u32 units, limit, first;

    template <int CHUNKS>
    __device__ __forceinline__ void look(const kvsig_page_copy &a, kvsig_u32 index, kvsig_u32 tile)
    {
        const kvsig_plane &plane = a.planes[index];
        const kvsig_tile cut = kvsig_tile_at(&plane, a.page_count, tile, CHUNKS);
        const kvsig_u32 lane = threadIdx.x % KVSIG_LANES, rows = plane.rows;
        const kvsig_u32 last = a.page_count * rows - 1;
        kvsig_u32 position = min(cut.row + lane, last), inside = 0;

        if (rows > 1) {
            inside = position % rows;
            position /= rows;
        }
        from = place(a, plane, a.source, position, inside);
        to = place(a, plane, 1 - a.source, position, inside);
        units = plane.units;
        limit = cut.units;
        first = cut.first;
    }

    /* Walk this lane's units: their rows, as lanes that know the place, and offsets in them. */
    template <int CHUNKS, class Body> __device__ __forceinline__ void each(Body body) const
    {
        const kvsig_u32 rows = KVSIG_LANES / units, rest = KVSIG_LANES % units;
        const kvsig_u32 lane = threadIdx.x % KVSIG_LANES;
        kvsig_u32 at = lane / units, offset = first + lane % units;
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            if (offset >= units) {
                offset -= units;
                at++;
            }
            body(i, i * KVSIG_LANES + lane < limit, at, offset);
            at += rows;
            offset += rest;
        }
    }
};

/* Find the plane of a tile that is counted from the first tile of plane `index`. */
template <int CHUNKS>
static __device__ __forceinline__ void settle(const kvsig_page_copy &a, kvsig_u32 layer_tiles,
                                              kvsig_u32 &index, kvsig_u32 &tile)
{
#pragma unroll 1
    while (index < a.plane_count) {
        if (layer_tiles && tile >= layer_tiles && index % a.layer_planes == 0) {
            const kvsig_u32 layers = tile / layer_tiles;
            index += layers * a.layer_planes;
            tile -= layers * layer_tiles;
            continue;
        }
        const kvsig_u32 tiles = kvsig_tiles(&a.planes[index], a.page_count, CHUNKS);
        if (tile < tiles)
            return;
        tile -= tiles;
        index++;
    }
}

template <int CHUNKS>
static __device__ __forceinline__ kvsig_u32 tiles_of_layer(const kvsig_page_copy &a,
                                                           kvsig_u32 layer)
{
    kvsig_u32 sum = 0;
#pragma unroll 1
    for (kvsig_u32 i = 0; i < a.layer_planes; i++)
        sum += kvsig_tiles(&a.planes[layer * a.layer_planes + i], a.page_count, CHUNKS);
    return sum;
}

static __device__ __forceinline__ void fence(const kvsig_page_copy &a)
{
    if (a.source == KVSIG_DEVICE)
        asm volatile("fence.acq_rel.sys;" ::: "memory");
    else
        asm volatile("fence.acq_rel.gpu;" ::: "memory");
}

/* Add the tiles that this warp has stored of a layer; whoever completes it raises its flag, and
 * leaves the count as the next launch expects it. */
template <int CHUNKS>
static __device__ __forceinline__ void leave(const kvsig_page_copy &a, kvsig_u32 layer_tiles,
                                             kvsig_u32 layer, kvsig_u32 stored)
{
    fence(a);
    __syncwarp();
    if (threadIdx.x % KVSIG_LANES != 0)
        return;
    const kvsig_u32 all = layer_tiles ? layer_tiles : tiles_of_layer<CHUNKS>(a, layer);
    if (atomicAdd(&a.counts[layer], stored) + stored != all)
        return;
    a.counts[layer] = 0;
    fence(a);
    atomicExch(&a.flags[layer], a.value);
}

template <int CHUNKS, bool WIDE>
static __device__ __forceinline__ void copy_tiles(const kvsig_page_copy &a)
{
    const kvsig_u32 warps = gridDim.x * blockDim.x / KVSIG_LANES;
    /* From one lane, so that the compiler knows that it is the same in all. */
    const kvsig_u32 warp =
        __shfl_sync(ALL, (blockIdx.x * blockDim.x + threadIdx.x) / KVSIG_LANES, 0);
    const kvsig_u32 layer_tiles = a.regular ? tiles_of_layer<CHUNKS>(a, 0) : 0;
    kvsig_u32 index = 0, tile = warp, stored = 0;
    kvsig_u64 start = 0;
    view now, next;

    settle<CHUNKS>(a, layer_tiles, index, tile);
    if (WIDE && a.pace)
        start = nanoseconds() + (kvsig_u64)a.pace * warp / warps;
    if (WIDE && index < a.plane_count)
        now.look<CHUNKS>(a, index, tile);
    while (index < a.plane_count) {
        word<KVSIG_UNIT> words[CHUNKS];
        kvsig_u32 then = index, after = tile + warps;

        if (!WIDE)
            now.look<CHUNKS>(a, index, tile);
        if (WIDE && a.pace) {
            while ((long long)(nanoseconds() - start) < 0)
                __nanosleep(100);
            start += a.pace;
        }
        /* Loads are never predicated: the compiler would move a predicated load's result at once,
         * and so wait for it. A lane that has nothing left reads the tile's first unit instead. */
        now.each<CHUNKS>([&](int i, bool mine, kvsig_u32 at, kvsig_u32 offset) {
            const kvsig_u64 row = __shfl_sync(ALL, now.from, mine ? at : 0);
            words[i].load(row + (mine ? offset : 0) * (kvsig_u64)KVSIG_UNIT);
        });
        settle<CHUNKS>(a, layer_tiles, then, after);
        if (WIDE && then < a.plane_count)
            next.look<CHUNKS>(a, then, after);
        /* Places are found again rather than kept. */
        asm volatile("" : "+r"(now.first), "+r"(now.units));
        now.each<CHUNKS>([&](int i, bool mine, kvsig_u32 at, kvsig_u32 offset) {
            const kvsig_u64 row = __shfl_sync(ALL, now.to, mine ? at : 0);
            if (mine)
                words[i].store(row + offset * (kvsig_u64)KVSIG_UNIT);
        });
        stored++;
        if (a.counts) {
            const kvsig_u32 layer = index / a.layer_planes;
            if (then >= a.plane_count || then / a.layer_planes != layer) {
                leave<CHUNKS>(a, layer_tiles, layer, stored);
                stored = 0;
            }
        }
        index = then;
        tile = after;
        if (WIDE)
            now = next;
    }
}

/* The first wrong page number that the threads of a block find, as twice its position plus its
 * side; ALL where there is none. Each block looks at all of them, so that none has to wait for
 * another, and all find the same. */
static __device__ __forceinline__ kvsig_u32 first_wrong(const kvsig_page_copy &a)
{
    kvsig_u32 found = ALL;
#pragma unroll 1
    for (kvsig_u32 side = 0; side < 2; side++) {
        if (a.pages[side] == nullptr)
            continue;
#pragma unroll 4
        for (kvsig_u32 i = threadIdx.x; i < a.list_count; i += blockDim.x)
            if ((kvsig_u64)whole_number(a, side, i) >= a.limit[side])
                found = min(found, 2 * i + side);
    }
    for (int step = KVSIG_LANES / 2; step; step /= 2)
        found = min(found, __shfl_xor_sync(ALL, found, step));
    return found;
}

/* Say what was wrong, and raise every flag: who waits for a layer must not wait for ever. */
static __device__ __forceinline__ void refuse(const kvsig_page_copy &a, kvsig_u32 found)
{
    if (blockIdx.x != 0 || threadIdx.x >= KVSIG_LANES)
        return;
    volatile kvsig_wrong *wrong = a.wrong;
    if (threadIdx.x == 0 && wrong->state == 0) {
        wrong->side = found % 2;
        wrong->position = found / 2;
        wrong->value = whole_number(a, found % 2, found / 2);
        __threadfence_system();
        wrong->state = 1;
        __threadfence_system();
    }
    __syncwarp();
    if (a.counts)
#pragma unroll 1
        for (kvsig_u32 i = threadIdx.x; i < a.plane_count / a.layer_planes; i += KVSIG_LANES)
            atomicExch(&a.flags[i], a.value);
}

/* Long transfers: a few blocks, launched as one cluster where there are clusters. */
extern "C" __global__ void __launch_bounds__(KVSIG_THREADS, 1)
    kvsig_copy_wide(const __grid_constant__ kvsig_page_copy a)
{
    if (a.wrong) {
        __shared__ kvsig_u32 found;
        if (threadIdx.x == 0)
            found = ALL;
        __syncthreads();
        const kvsig_u32 mine = first_wrong(a);
        if (mine != ALL)
            atomicMin(&found, mine);
        __syncthreads();
        if (found != ALL) {
            refuse(a, found);
            return;
        }
    }
    copy_tiles<KVSIG_CHUNKS, true>(a);
}

/* Short ones: one-warp blocks of few registers, which find room beside a kernel that fills every
 * multiprocessor. */
extern "C" __global__ void
    kvsig_copy_thin(const __grid_constant__ kvsig_page_copy a)
{
    if (a.wrong) {
        const kvsig_u32 found = first_wrong(a);
        if (found != ALL) {
            refuse(a, found);
            return;
        }
    }
    copy_tiles<KVSIG_THIN_CHUNKS, false>(a);
}

#endif
