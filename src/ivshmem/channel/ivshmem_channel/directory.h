/* The directory of names at a region's end: which peer has a name, and where the area is.
 *
 * Knows: the directory's trailer and slots (docs/reference/file-formats.md). Does not know: which
 * owners are alive, how a name is entered.
 *
 * Each byte is loaded once, and only the copy is examined.
 */
#ifndef IVSHMEM_CHANNEL_DIRECTORY_H
#define IVSHMEM_CHANNEL_DIRECTORY_H

#include "area.h"

#define IVSHMEM_NAMES_MAGIC UINT64_C(0x454d414e48535649) /* "IVSHNAME" */
#define IVSHMEM_NAMES_VERSION 1u
#define IVSHMEM_NAMES_SLOT 128u /* bytes of a slot, and of the trailer behind the last slot */
#define IVSHMEM_NAMES_MOST_SLOTS 4095u
#define IVSHMEM_NAMES_TEXT 48u /* bytes of a name with the zero at its end */
#define IVSHMEM_MOST_VECTORS 2048u

/* A slot or the trailer, as words:
 *
 *     word  slot                             trailer
 *        0  owner; 0: free                   IVSHMEM_NAMES_MAGIC
 *        1  beat                             0
 *        2  CRC-32, id (16), vector (16)     CRC-32, version
 *        3  number of vectors (16)           slots
 *        4  name (48 bytes)                  offset of the area; 0: there is none
 *        5                                   bytes of the area
 *       10  role (32 bytes)                  0
 *
 * The CRC covers all but the beat and itself.
 */
#define IVSHMEM_NAMES_WORDS (IVSHMEM_NAMES_SLOT / 8u)

/* Load a slot or the trailer; whether its checksum is right. */
static inline int ivshmem_names_load(const struct ivshmem_memory *memory, uint64_t at,
                                     uint64_t *words)
{
    unsigned char covered[IVSHMEM_NAMES_SLOT - 12u];
    for (unsigned i = 0; i < IVSHMEM_NAMES_WORDS; i++)
        words[i] = ivshmem_load(memory, at + 8u * i);
    IVSHMEM_COPY(covered, words, 8);
    IVSHMEM_COPY(covered + 8, (const unsigned char *)words + 20, sizeof covered - 8);
    return ivshmem_crc32(covered, sizeof covered) == (uint32_t)words[2];
}

/* How many slots the directory has, and where its first one is; IVSHMEM_NOT_FOUND: there is no
 * directory. `trailer` is what was loaded. */
static inline int ivshmem_names_open(const struct ivshmem_memory *memory, uint64_t *at,
                                     uint64_t *trailer)
{
    uint32_t slots;
    if (memory->size % IVSHMEM_NAMES_SLOT != 0 || memory->size < 2 * IVSHMEM_NAMES_SLOT)
        return IVSHMEM_NOT_FOUND;
    if (!ivshmem_names_load(memory, memory->size - IVSHMEM_NAMES_SLOT, trailer) ||
        trailer[0] != IVSHMEM_NAMES_MAGIC)
        return IVSHMEM_NOT_FOUND;
    if (trailer[2] >> 32 != IVSHMEM_NAMES_VERSION)
        return IVSHMEM_VERSION;
    slots = (uint32_t)trailer[3];
    if (slots < 1 || slots > IVSHMEM_NAMES_MOST_SLOTS ||
        (slots + UINT64_C(1)) * IVSHMEM_NAMES_SLOT > memory->size)
        return IVSHMEM_NOT_FOUND;
    *at = memory->size - (slots + UINT64_C(1)) * IVSHMEM_NAMES_SLOT;
    return (int)slots;
}

/* Find the area of a region: its offset, for ivshmem_area_open. */
static inline int ivshmem_find_area(const struct ivshmem_memory *memory, uint64_t *offset)
{
    uint64_t trailer[IVSHMEM_NAMES_WORDS], end;
    int slots = ivshmem_names_open(memory, &end, trailer);
    if (slots < 0)
        return slots == IVSHMEM_VERSION ? IVSHMEM_VERSION : IVSHMEM_NO_AREA;
    if (trailer[4] % IVSHMEM_AREA_PAGE != 0 || trailer[4] < IVSHMEM_FIRST_BYTES ||
        trailer[4] > end || trailer[5] < IVSHMEM_AREA_PAGE || trailer[5] > end - trailer[4])
        return IVSHMEM_NO_AREA;
    *offset = trailer[4];
    return 0;
}

/* What a peer says of itself. Any peer can write any byte: it is a claim. */
struct ivshmem_named {
    unsigned peer;
    unsigned first_vector, vectors;
    uint64_t beat; /* grows about every second while the owner is alive */
};

/* Look a name up, which ends with a zero and has at most 47 bytes before it. IVSHMEM_NOT_FOUND: no
 * slot has it. After a crash two slots can have one name: the caller looks at the beats. `first` is
 * the slot to begin with; the result is the slot that was found. */
static inline int ivshmem_lookup(const struct ivshmem_memory *memory, const char *name,
                                 unsigned first, struct ivshmem_named *named)
{
    uint64_t words[IVSHMEM_NAMES_WORDS], at;
    int slots = ivshmem_names_open(memory, &at, words);
    for (int slot = (int)first; slot < slots; slot++) {
        const char *found = (const char *)(words + 4);
        unsigned i;
        if (!ivshmem_names_load(memory, at + (uint64_t)slot * IVSHMEM_NAMES_SLOT, words) ||
            words[0] == 0)
            continue;
        for (i = 0; i < IVSHMEM_NAMES_TEXT && found[i] == name[i] && name[i] != 0; i++)
            ;
        if (i == 0 || i == IVSHMEM_NAMES_TEXT || found[i] != name[i])
            continue;
        named->peer = (unsigned)(words[2] >> 32) & 0xffffu;
        named->first_vector = (unsigned)(words[2] >> 48);
        named->vectors = (unsigned)words[3] & 0xffffu;
        named->beat = words[1];
        if (named->first_vector + named->vectors <= IVSHMEM_MOST_VECTORS)
            return slot;
    }
    return slots < 0 && slots != IVSHMEM_NOT_FOUND ? slots : IVSHMEM_NOT_FOUND;
}

#endif
