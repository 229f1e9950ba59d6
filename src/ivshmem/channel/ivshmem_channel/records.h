/* The table of channels: create, find, open.
 *
 * Knows: names, and who owns which unit of the area. Does not know: what passes through a channel.
 *
 * Invariants: no two channels share a unit or a name; what a creator that died left behind is free
 * again when its place is.
 */
#ifndef IVSHMEM_CHANNEL_RECORDS_H
#define IVSHMEM_CHANNEL_RECORDS_H

#include "places.h"
#include "geometry.h"

/* A channel's record, 512 bytes.
 *
 *      0  state    (compare-exchange) the place that makes, made or removes it | enum
 *                  ivshmem_state | epoch
 *      8  named    a word of the state's epoch: the name is valid
 *     16  name     64 bytes
 *     80  frozen   geometry, first unit, units, time of creation; type (256 bytes); CRC-32 of all
 *                  these and the name
 */
enum ivshmem_state {
    IVSHMEM_FREE = 0,
    IVSHMEM_MAKING = 1,
    IVSHMEM_READY = 2,
    IVSHMEM_REMOVING = 3
};

#define IVSHMEM_RECORD_STATE 0u
#define IVSHMEM_RECORD_NAMED 8u
#define IVSHMEM_RECORD_NAME 16u
#define IVSHMEM_RECORD_FROZEN 80u
#define IVSHMEM_FROZEN_WORDS 7u
#define IVSHMEM_RECORD_TYPE (IVSHMEM_RECORD_FROZEN + 8u * IVSHMEM_FROZEN_WORDS)
#define IVSHMEM_RECORD_CRC (IVSHMEM_RECORD_TYPE + IVSHMEM_CHANNEL_TYPE)

/* A record, copied and checked; what a process uses from then on. */
struct ivshmem_record {
    unsigned index;
    uint64_t state;
    char name[IVSHMEM_CHANNEL_NAME]; /* ends with a zero */
    struct ivshmem_geometry geometry;
    uint32_t first_unit, units;
    uint64_t created; /* nanoseconds since 1970, or 0 */
    char type[IVSHMEM_CHANNEL_TYPE];
};

/* A channel that is open in this process. */
struct ivshmem_channel {
    struct ivshmem_area area;
    struct ivshmem_record record;
    struct ivshmem_layout layout;
    uint64_t at; /* in the region */
    struct ivshmem_fault fault;
};

static inline uint64_t ivshmem_place_word(struct ivshmem_place place, unsigned flags,
                                          unsigned epoch)
{
    return ivshmem_word((uint64_t)place.index << 20 | place.epoch, flags, epoch);
}

static inline struct ivshmem_place ivshmem_place_of(uint64_t word)
{
    struct ivshmem_place place;
    place.index = (unsigned)(ivshmem_value(word) >> 20) & 0xfffu;
    place.epoch = (unsigned)ivshmem_value(word) & IVSHMEM_EPOCH_MASK;
    return place;
}

static inline uint64_t ivshmem_record_at(const struct ivshmem_area *area, unsigned index)
{
    return area->records_at + (uint64_t)index * IVSHMEM_RECORD_BYTES;
}

static inline void ivshmem_load_bytes(const struct ivshmem_memory *memory, uint64_t offset,
                                      void *bytes, size_t size)
{
    for (size_t i = 0; i < size; i += 8) {
        uint64_t word = ivshmem_load(memory, offset + i);
        IVSHMEM_COPY((char *)bytes + i, &word, 8);
    }
}

static inline void ivshmem_store_bytes(const struct ivshmem_memory *memory, uint64_t offset,
                                       const void *bytes, size_t size)
{
    for (size_t i = 0; i < size; i += 8) {
        uint64_t word;
        IVSHMEM_COPY(&word, (const char *)bytes + i, 8);
        ivshmem_store(memory, offset + i, word);
    }
}

/* Copy a record and check it. IVSHMEM_NOT_FOUND: there is no channel, or not yet.
 *
 * IVSHMEM_CORRUPT: there is one, and another process has spoiled what its record says. It keeps its
 * name and its memory until a process removes it by force: `index`, `state` and `name` are filled in. */
static inline int ivshmem_record_read(const struct ivshmem_area *area, unsigned index,
                                      struct ivshmem_record *record)
{
    const struct ivshmem_memory *memory = &area->memory;
    uint64_t at = ivshmem_record_at(area, index);
    unsigned char bytes[IVSHMEM_RECORD_CRC - IVSHMEM_RECORD_NAME];
    uint64_t frozen[IVSHMEM_FROZEN_WORDS];
    struct ivshmem_layout layout;
    struct ivshmem_geometry *g = &record->geometry;
    uint64_t crc;
    int ends;
    record->index = index;
    record->state = ivshmem_load(memory, at);
    if (ivshmem_flags(record->state) != IVSHMEM_READY)
        return IVSHMEM_NOT_FOUND;
    ivshmem_load_barrier(memory);
    ivshmem_load_bytes(memory, at + IVSHMEM_RECORD_NAME, bytes, sizeof bytes);
    crc = ivshmem_load(memory, at + IVSHMEM_RECORD_CRC);
    ivshmem_load_barrier(memory);
    if (ivshmem_load(memory, at) != record->state)
        return IVSHMEM_NOT_FOUND;
    IVSHMEM_COPY(record->name, bytes, sizeof record->name);
    ends = record->name[IVSHMEM_CHANNEL_NAME - 1] == 0;
    record->name[IVSHMEM_CHANNEL_NAME - 1] = 0;
    if (crc != ivshmem_crc32(bytes, sizeof bytes))
        return IVSHMEM_CORRUPT;
    IVSHMEM_COPY(frozen, bytes + (IVSHMEM_RECORD_FROZEN - IVSHMEM_RECORD_NAME), sizeof frozen);
    IVSHMEM_COPY(record->type, bytes + (IVSHMEM_RECORD_TYPE - IVSHMEM_RECORD_NAME),
                 sizeof record->type);
    g->kind = (uint32_t)frozen[0] & 0xffu;
    g->overflow = (uint32_t)(frozen[0] >> 8) & 0xffu;
    g->options = (uint32_t)(frozen[0] >> 16) & 0xffffu;
    g->writers = (uint32_t)(frozen[1]);
    g->readers = (uint32_t)(frozen[1] >> 32);
    g->slots = (uint32_t)(frozen[2]);
    g->loans = (uint32_t)(frozen[2] >> 32) & 0xffffu;
    g->views = (uint32_t)(frozen[3] >> 32);
    g->limit = frozen[4];
    record->first_unit = (uint32_t)frozen[5];
    record->units = (uint32_t)(frozen[5] >> 32);
    record->created = frozen[6];
    if (record->name[0] == 0 || !ends ||
        record->type[IVSHMEM_CHANNEL_TYPE - 1] != 0 || ivshmem_lay_out(g, &layout) != 0 ||
        record->units > area->units || record->first_unit > area->units - record->units ||
        layout.size > record->units * area->unit)
        return IVSHMEM_CORRUPT;
    return 0;
}

/* The word by which a unit says whose it is. */
static inline uint64_t ivshmem_unit_word(unsigned index, uint64_t state)
{
    return ivshmem_word((uint64_t)index + 1, 0, ivshmem_epoch(state));
}

/* Whether a unit is free: the record that it names is free, or another channel's by now. So one
 * compare-exchange of a record's state frees all its units. */
static inline int ivshmem_unit_is_free(const struct ivshmem_area *area, uint64_t owner)
{
    uint64_t index = ivshmem_value(owner) - 1, state;
    if (owner == 0 || index >= area->records)
        return 1;
    state = ivshmem_load(&area->memory, ivshmem_record_at(area, (unsigned)index));
    return ivshmem_flags(state) == IVSHMEM_FREE || ivshmem_epoch(state) != ivshmem_epoch(owner);
}

/* Free a record, and its units. A process may do so if it knows that no process uses them: the
 * creator before the record is ready; a process that knows that the creator is gone; a process that
 * removes the channel. */
static inline void ivshmem_record_free(const struct ivshmem_area *area, unsigned index,
                                       uint64_t state)
{
    ivshmem_exchange(&area->memory, ivshmem_record_at(area, index), state,
                     ivshmem_word(0, IVSHMEM_FREE, ivshmem_epoch(state)));
}

/* Find `units` units in a row and take them; the first one's number, or IVSHMEM_NO_ROOM. */
static inline int64_t ivshmem_units_take(const struct ivshmem_area *area, uint32_t units,
                                         uint64_t owner)
{
    const struct ivshmem_memory *memory = &area->memory;
    uint32_t free = 0;
    for (uint32_t unit = 0; unit < area->units; unit++) {
        uint32_t taken = unit + 1 - units;
        if (!ivshmem_unit_is_free(area, ivshmem_load(memory, area->units_at + 8u * unit))) {
            free = 0;
            continue;
        }
        if (++free < units)
            continue;
        for (; taken <= unit; taken++) {
            uint64_t at = area->units_at + 8u * taken, before = ivshmem_load(memory, at);
            if (!ivshmem_unit_is_free(area, before) ||
                !ivshmem_exchange(memory, at, before, owner))
                break;
        }
        if (taken > unit)
            return unit + 1 - units;
        /* Another creator was faster there. */
        for (uint32_t i = unit + 1 - units; i < taken; i++)
            ivshmem_exchange(memory, area->units_at + 8u * i, owner, 0);
        unit = taken;
        free = 0;
    }
    return IVSHMEM_NO_ROOM;
}

/* Free the records that a process left half made, or half removed, when it ended. */
static inline void ivshmem_records_sweep(const struct ivshmem_area *area)
{
    for (unsigned index = 0; index < area->records; index++) {
        uint64_t state = ivshmem_load(&area->memory, ivshmem_record_at(area, index));
        if ((ivshmem_flags(state) == IVSHMEM_MAKING ||
             ivshmem_flags(state) == IVSHMEM_REMOVING) &&
            ivshmem_is_gone(area, ivshmem_place_of(state)))
            ivshmem_record_free(area, index, state);
    }
}

/* Free all places, whatever became of their processes, and the records that were half made. The
 * caller knows that none of them is left: no other process has the memory, or its contents came from
 * a file or from another machine. How many places there were. */
static inline unsigned ivshmem_area_sweep(const struct ivshmem_area *area)
{
    unsigned freed = 0;
    for (unsigned index = 0; index < area->places; index++) {
        uint64_t number = ivshmem_load(&area->memory, ivshmem_place_at(area, index));
        if (ivshmem_value(number) != 0)
            freed += (unsigned)ivshmem_place_free(area, index, number);
    }
    ivshmem_records_sweep(area);
    return freed;
}

/* Whether a record has this name, which 64 bytes hold, padded with zeros. */
static inline int ivshmem_record_is_named(const struct ivshmem_area *area, unsigned index,
                                          const char *name)
{
    char other[IVSHMEM_CHANNEL_NAME];
    ivshmem_load_bytes(&area->memory, ivshmem_record_at(area, index) + IVSHMEM_RECORD_NAME, other,
                       sizeof other);
    for (unsigned i = 0; i < sizeof other; i++)
        if (other[i] != name[i])
            return 0;
    return 1;
}

/* The state of a record that has this name, or will have it; 0: it has another name, or is free. */
static inline uint64_t ivshmem_record_holds(const struct ivshmem_area *area, unsigned index,
                                            const char *name)
{
    uint64_t at = ivshmem_record_at(area, index);
    uint64_t state = ivshmem_load(&area->memory, at);
    uint64_t named = ivshmem_load(&area->memory, at + IVSHMEM_RECORD_NAMED);
    if (ivshmem_epoch(named) != ivshmem_epoch(state) ||
        (ivshmem_flags(state) != IVSHMEM_MAKING && ivshmem_flags(state) != IVSHMEM_READY) ||
        !ivshmem_record_is_named(area, index, name))
        return 0;
    return state;
}

/* Create a channel; `wanted` has name (padded with zeros), geometry, type and created.
 *
 * IVSHMEM_TAKEN: there is one of that name; of which place, ivshmem_place_of tells by the state of
 * the record that ivshmem_find finds, or finds spoiled. IVSHMEM_AGAIN: another process is just
 * creating one: try again later. IVSHMEM_NO_ROOM: no record, or no units in a row, are free.
 */
static inline int ivshmem_create(const struct ivshmem_member *member,
                                 struct ivshmem_record *wanted)
{
    const struct ivshmem_area *area = &member->area;
    const struct ivshmem_memory *memory = &area->memory;
    const struct ivshmem_geometry *g = &wanted->geometry;
    struct ivshmem_layout layout;
    uint64_t frozen[IVSHMEM_FROZEN_WORDS], at = 0, units, start, ready;
    unsigned char bytes[IVSHMEM_RECORD_CRC - IVSHMEM_RECORD_NAME];
    int64_t first;
    unsigned index;
    if (memory->readonly)
        return IVSHMEM_READ_ONLY;
    if (ivshmem_lay_out(g, &layout) != 0 || wanted->name[0] == 0)
        return IVSHMEM_BAD;
    units = (layout.size + area->unit - 1) / area->unit;
    if (units > area->units)
        return IVSHMEM_NO_ROOM;
    ivshmem_records_sweep(area);
    for (index = 0; index < area->records; index++) {
        uint64_t state;
        at = ivshmem_record_at(area, index);
        state = ivshmem_load(memory, at);
        if (ivshmem_flags(state) != IVSHMEM_FREE)
            continue;
        wanted->index = index;
        wanted->state =
            ivshmem_place_word(member->place, IVSHMEM_MAKING, ivshmem_epoch(state) + 1);
        if (ivshmem_exchange(memory, at, state, wanted->state))
            break;
    }
    if (index == area->records)
        return IVSHMEM_NO_ROOM;
    ivshmem_store_bytes(memory, at + IVSHMEM_RECORD_NAME, wanted->name, sizeof wanted->name);
    ivshmem_announce(memory, at + IVSHMEM_RECORD_NAMED,
                     ivshmem_word(1, 0, ivshmem_epoch(wanted->state)));
    /* Of two that create one name, at least one sees the other from here on. */
    ivshmem_full_fence(memory);
    for (unsigned other = 0; other < area->records; other++) {
        uint64_t state =
            other == index ? 0 : ivshmem_record_holds(area, other, wanted->name);
        if (state == 0)
            continue;
        /* Two creators that see each other both give up, and try again later. */
        ivshmem_record_free(area, index, wanted->state);
        return ivshmem_flags(state) == IVSHMEM_READY ? IVSHMEM_TAKEN : IVSHMEM_AGAIN;
    }
    first = ivshmem_units_take(area, (uint32_t)units, ivshmem_unit_word(index, wanted->state));
    if (first < 0) {
        ivshmem_record_free(area, index, wanted->state);
        return IVSHMEM_NO_ROOM;
    }
    wanted->first_unit = (uint32_t)first;
    wanted->units = (uint32_t)units;
    frozen[0] = g->kind | (uint64_t)g->overflow << 8 | (uint64_t)g->options << 16;
    frozen[1] = g->writers | (uint64_t)g->readers << 32;
    frozen[2] = g->slots | (uint64_t)g->loans << 32;
    frozen[3] = (uint64_t)g->views << 32;
    frozen[4] = g->limit;
    frozen[5] = wanted->first_unit | units << 32;
    frozen[6] = wanted->created;
    IVSHMEM_COPY(bytes, wanted->name, sizeof wanted->name);
    IVSHMEM_COPY(bytes + (IVSHMEM_RECORD_FROZEN - IVSHMEM_RECORD_NAME), frozen, sizeof frozen);
    IVSHMEM_COPY(bytes + (IVSHMEM_RECORD_TYPE - IVSHMEM_RECORD_NAME), wanted->type,
                 sizeof wanted->type);
    ivshmem_store_bytes(memory, at + IVSHMEM_RECORD_NAME, bytes, sizeof bytes);
    ivshmem_store(memory, at + IVSHMEM_RECORD_CRC, ivshmem_crc32(bytes, sizeof bytes));
    /* Everything but the cells, which hold nothing before an entry says so. */
    start = area->data_at + wanted->first_unit * area->unit;
    for (uint64_t offset = 0; offset < layout.cells; offset += 8)
        ivshmem_store(memory, start + offset, 0);
    ivshmem_store_barrier(memory);
    ready = ivshmem_place_word(member->place, IVSHMEM_READY, ivshmem_epoch(wanted->state));
    if (!ivshmem_exchange(memory, at, wanted->state, ready))
        return IVSHMEM_CLOSED; /* another process freed the place of this one */
    wanted->state = ready;
    return 0;
}

/* Open the channel of a record that was read and checked. */
static inline void ivshmem_channel_open(struct ivshmem_channel *channel,
                                        const struct ivshmem_area *area,
                                        const struct ivshmem_record *record)
{
    channel->area = *area;
    channel->record = *record;
    channel->at = area->data_at + record->first_unit * area->unit;
    ivshmem_lay_out(&record->geometry, &channel->layout);
    channel->fault.word = NULL;
}

/* Find a channel by its name, 64 bytes padded with zeros. IVSHMEM_CORRUPT: its record is spoiled, as
 * ivshmem_record_read says. */
static inline int ivshmem_find(const struct ivshmem_area *area, const char *name,
                               struct ivshmem_record *record)
{
    unsigned spoiled = area->records;
    for (unsigned index = 0; index < area->records; index++) {
        int code = ivshmem_record_read(area, index, record);
        unsigned i = 0;
        if (code == IVSHMEM_NOT_FOUND)
            continue;
        while (i < IVSHMEM_CHANNEL_NAME && record->name[i] == name[i])
            i++;
        if (i < IVSHMEM_CHANNEL_NAME)
            continue;
        if (code == 0)
            return 0;
        spoiled = index; /* another one may have this name in truth */
    }
    return spoiled < area->records &&
                   ivshmem_record_read(area, spoiled, record) == IVSHMEM_CORRUPT
               ? IVSHMEM_CORRUPT
               : IVSHMEM_NOT_FOUND;
}

#endif
