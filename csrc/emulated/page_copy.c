/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a launch of the page-copy kernels does, for the emulated runtime: the same tiles in turn,
 * the same checks, flags and report, on memory that is the host's on both sides.
 */
#include <stddef.h>
#include <string.h>

#include "runtime.h"

#include "../page_copy.cu"

_Static_assert(sizeof(struct kvsig_plane) == 64, "size of struct kvsig_plane");
_Static_assert(sizeof(struct kvsig_wrong) == 24, "size of struct kvsig_wrong");
_Static_assert(sizeof(struct kvsig_page_copy) == PAGE_COPY_BYTES, "size of struct kvsig_page_copy");

static long long number_at(const struct kvsig_page_copy *a, unsigned side, long long position)
{
    if (!a->pages[side])
        return a->few[side][position];
    if (a->number[side] == 8)
        return ((const long long *)a->pages[side])[position];
    return ((const int *)a->pages[side])[position];
}

static char *place(const struct kvsig_page_copy *a, const struct kvsig_plane *plane, unsigned side,
                   kvsig_u32 row)
{
    return (char *)(plane->base[side] +
                    (kvsig_u64)number_at(a, side, row / plane->rows) * plane->pitch[side] +
                    row % plane->rows * plane->row_pitch[side]);
}

static void copy_tile(const struct kvsig_page_copy *a, const struct kvsig_plane *plane,
                      kvsig_u32 index, unsigned chunks)
{
    const struct kvsig_tile tile = kvsig_tile_at(plane, a->page_count, index, chunks);
    kvsig_u32 row = tile.row, first = tile.first, left = tile.units;

    while (left) {
        const kvsig_u32 units = left < plane->units - first ? left : plane->units - first;

        memcpy(place(a, plane, 1 - a->source, row) + (size_t)first * a->unit,
               place(a, plane, a->source, row) + (size_t)first * a->unit, (size_t)units * a->unit);
        left -= units;
        first = 0;
        row++;
    }
}

/* Raise the flag of a layer if all of its tiles have been counted. */
static void count(const struct kvsig_page_copy *a, kvsig_u32 layer, kvsig_u32 tiles, kvsig_u32 all)
{
    if (!a->counts || (a->counts[layer] += tiles) != all)
        return;
    a->counts[layer] = 0;
    __atomic_store_n(&a->flags[layer], a->value, __ATOMIC_RELEASE);
}

/* Check the lists of the request that are in device memory, of which this launch may be a part. */
static int refuse(const struct kvsig_page_copy *a)
{
    for (kvsig_u32 i = 0; i < a->list_count; i++)
        for (unsigned side = 0; side < 2; side++) {
            const long long place = (long long)i - a->first_page;
            const long long value = a->pages[side] ? number_at(a, side, place) : 0;

            if ((kvsig_u64)value < a->limit[side])
                continue;
            if (!a->wrong->state) {
                a->wrong->side = side;
                a->wrong->position = i;
                a->wrong->value = value;
                __atomic_store_n(&a->wrong->state, 1, __ATOMIC_RELEASE);
            }
            return 1;
        }
    return 0;
}

static void copy_pages(void **params, unsigned chunks)
{
    const struct kvsig_page_copy *a = params[0];
    const int refused = a->wrong && refuse(a);

    for (kvsig_u32 layer = 0; layer < a->plane_count / a->layer_planes; layer++) {
        const struct kvsig_plane *planes = a->planes + (size_t)layer * a->layer_planes;
        kvsig_u32 all = 0, tiles;

        for (kvsig_u32 i = 0; i < a->layer_planes; i++)
            all += kvsig_tiles(&planes[i], a->page_count, chunks);
        if (refused) {
            count(a, layer, all, all);
            continue;
        }
        for (kvsig_u32 i = 0; i < a->layer_planes; i++) {
            tiles = kvsig_tiles(&planes[i], a->page_count, chunks);
            for (kvsig_u32 tile = 0; tile < tiles; tile++)
                copy_tile(a, &planes[i], tile, chunks);
            count(a, layer, tiles, all);
        }
    }
}

void kvsig_double_wide(void **params, const struct launch *shape)
{
    (void)shape;
    copy_pages(params, KVSIG_CHUNKS);
}

void kvsig_double_thin(void **params, const struct launch *shape)
{
    (void)shape;
    copy_pages(params, KVSIG_THIN_CHUNKS);
}
