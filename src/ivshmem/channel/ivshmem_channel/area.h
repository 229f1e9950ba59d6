/* The area: the part of a region that holds channels.
 *
 * Knows: where its tables are. Does not know: what stands in them.
 */
#ifndef IVSHMEM_CHANNEL_AREA_H
#define IVSHMEM_CHANNEL_AREA_H

#include "machine.h"
#include "words.h"

/* A part of a region, set aside for channels when the region is made:
 *
 *     header     a page; eight words: magic, version | places, records | units, bytes of a unit,
 *                bytes of the area, CRC-32 of these five
 *     places     128 bytes each: the processes that take part
 *     units      a word each (compare-exchange): the record that has this unit of data, or 0
 *     records    512 bytes each: the channels
 *     data       the units; a channel is a run of them
 */
#define IVSHMEM_AREA_MAGIC UINT64_C(0x4c4e4843484d5653) /* "SVMHCHNL" */
#define IVSHMEM_AREA_VERSION 1u
#define IVSHMEM_AREA_PAGE 4096u
#define IVSHMEM_FIRST_BYTES 8192u /* of the region: never part of an area */
#define IVSHMEM_MOST_PLACES 1024u
#define IVSHMEM_MOST_RECORDS 1024u
#define IVSHMEM_MOST_UNITS 8192u
#define IVSHMEM_PLACE_BYTES 128u
#define IVSHMEM_RECORD_BYTES 512u

struct ivshmem_area {
    struct ivshmem_memory memory;
    uint64_t at, size; /* in the region, of the area */
    uint64_t unit;     /* bytes */
    uint32_t places, records, units;
    uint64_t places_at, units_at, records_at, data_at; /* in the region */
};

/* Work out where everything is; IVSHMEM_BAD if it does not fit. */
static inline int ivshmem_area_lay_out(struct ivshmem_area *area)
{
    uint64_t end;
    if (area->at % IVSHMEM_AREA_PAGE != 0 || area->at < IVSHMEM_FIRST_BYTES ||
        area->size > area->memory.size || area->at > area->memory.size - area->size ||
        area->places < 1 || area->places > IVSHMEM_MOST_PLACES || area->records < 1 ||
        area->records > IVSHMEM_MOST_RECORDS || area->units < 1 ||
        area->units > IVSHMEM_MOST_UNITS || area->unit < IVSHMEM_AREA_PAGE ||
        (area->unit & (area->unit - 1)) != 0 || area->unit > UINT64_C(1) << 44)
        return IVSHMEM_BAD;
    area->places_at = area->at + IVSHMEM_AREA_PAGE;
    area->units_at = area->places_at + (uint64_t)area->places * IVSHMEM_PLACE_BYTES;
    area->records_at =
        ivshmem_rounded(area->units_at + (uint64_t)area->units * 8u, IVSHMEM_CACHE_LINE);
    area->data_at = ivshmem_rounded(
        area->records_at + (uint64_t)area->records * IVSHMEM_RECORD_BYTES, IVSHMEM_AREA_PAGE);
    end = area->data_at + area->unit * area->units;
    return end <= area->at + area->size ? 0 : IVSHMEM_BAD;
}

/* Find the area at an offset of a region, which the directory's trailer tells. */
static inline int ivshmem_area_open(struct ivshmem_area *area, const struct ivshmem_memory *memory,
                                    uint64_t at)
{
    uint64_t words[6];
    if (at % IVSHMEM_AREA_PAGE != 0 || at < IVSHMEM_FIRST_BYTES ||
        memory->size < IVSHMEM_AREA_PAGE || at > memory->size - IVSHMEM_AREA_PAGE)
        return IVSHMEM_NO_AREA;
    for (unsigned i = 0; i < 6; i++)
        words[i] = ivshmem_load(memory, at + 8u * i);
    if (words[0] != IVSHMEM_AREA_MAGIC || words[5] != ivshmem_crc32(words, 40))
        return IVSHMEM_NO_AREA;
    if ((uint32_t)words[1] != IVSHMEM_AREA_VERSION)
        return IVSHMEM_VERSION;
    area->memory = *memory;
    area->at = at;
    area->places = (uint32_t)(words[1] >> 32);
    area->records = (uint32_t)words[2];
    area->units = (uint32_t)(words[2] >> 32);
    area->unit = words[3];
    area->size = words[4];
    return ivshmem_area_lay_out(area) == 0 ? 0 : IVSHMEM_NO_AREA;
}

/* Make an area of `size` bytes at an offset. The caller ensures that nothing else uses the bytes.
 *
 * The unit is the smallest power of two of which the area has at most IVSHMEM_MOST_UNITS.
 */
static inline int ivshmem_area_make(struct ivshmem_area *area, const struct ivshmem_memory *memory,
                                    uint64_t at, uint64_t size, unsigned places, unsigned records)
{
    uint64_t words[6];
    area->memory = *memory;
    area->at = at;
    area->size = size;
    area->places = places;
    area->records = records;
    if (memory->readonly)
        return IVSHMEM_READ_ONLY;
    for (area->unit = IVSHMEM_AREA_PAGE; size / area->unit > IVSHMEM_MOST_UNITS; area->unit *= 2)
        ;
    area->units = (uint32_t)(size / area->unit);
    while (area->units != 0 && ivshmem_area_lay_out(area) != 0)
        area->units--;
    if (area->units == 0)
        return IVSHMEM_NO_ROOM;
    ivshmem_store(memory, at, 0); /* no area while the tables are not yet empty */
    ivshmem_store_barrier(memory);
    for (uint64_t offset = area->places_at; offset < area->data_at; offset += 8)
        ivshmem_store(memory, offset, 0);
    words[0] = IVSHMEM_AREA_MAGIC;
    words[1] = IVSHMEM_AREA_VERSION | (uint64_t)places << 32;
    words[2] = records | (uint64_t)area->units << 32;
    words[3] = area->unit;
    words[4] = size;
    words[5] = ivshmem_crc32(words, 40);
    for (unsigned i = 1; i < 6; i++)
        ivshmem_store(memory, at + 8u * i, words[i]);
    ivshmem_announce(memory, at, words[0]);
    return 0;
}

#endif
