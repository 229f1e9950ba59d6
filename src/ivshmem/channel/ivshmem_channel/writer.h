/* The writer of messages, and of a value.
 *
 * Knows: free cells, which readers block, backlogs of readers that discard. Does not know: who sleeps
 * how.
 *
 * Invariants: a cell is written only when no stamp that a reader could accept names it; the head
 * announces an entry after all of it was stored.
 */
#ifndef IVSHMEM_CHANNEL_WRITER_H
#define IVSHMEM_CHANNEL_WRITER_H

#include "claims.h"

/* What a writer knows of the backlog of one reader that discards. */
struct ivshmem_backlog {
    uint64_t head, tail;
    unsigned epoch; /* of the reader's slot */
    int is_open;
};

/* The tables of a writer are the user's memory. */
struct ivshmem_writer_tables {
    uint32_t *cell_of;    /* `slots` of them: the cell of each */
    uint32_t *free;       /* `cells_each`: those that hold no message */
    uint16_t *references; /* `cells_each`: in how many places a cell stands. Only if the channel */
    uint32_t *pinned;     /* lets readers discard; and `readers` * `slots`: the cells in backlogs, */
    struct ivshmem_backlog *backlogs; /* and one for each reader */
};

/* One writer of a channel of messages. */
struct ivshmem_writer {
    struct ivshmem_channel *channel;
    struct ivshmem_member *member;
    unsigned slot, epoch;
    uint64_t next;  /* the position of the next message */
    uint64_t bound; /* up to which blocking readers are known to have room */
    uint64_t joins; /* as it last looked at the readers */
    struct ivshmem_writer_tables tables;
    uint32_t free_cells, loaned;
    uint32_t missed; /* readers that discarded the message that was added last */
    uint64_t head_at, entries_at, cells_at; /* in the region */
    struct ivshmem_sleep sleep;
    struct ivshmem_rung rung;
    uint32_t blocks[IVSHMEM_MOST_READERS]; /* 1 + the epoch of the reader that blocks; 0: none does */
};

/* Free the slot of a writer that closed or is gone, if no reader still has something of it. */
static inline void ivshmem_writer_reap(const struct ivshmem_member *member,
                                       const struct ivshmem_channel *channel, unsigned slot)
{
    uint64_t at = ivshmem_writer_owner_at(channel, slot), owner = ivshmem_get(channel, at);
    if (ivshmem_flags(owner) == IVSHMEM_SLOT_FREE || ivshmem_is_owned(channel, owner))
        return;
    if (ivshmem_has_claims(channel)) {
        for (uint32_t i = 0; i < channel->record.geometry.slots; i++)
            if (!ivshmem_claim_ends(channel, slot, i, owner))
                return;
    } else if (channel->record.geometry.kind == IVSHMEM_MESSAGES)
        for (unsigned i = 0; i < channel->record.geometry.readers; i++) {
            uint64_t reader = ivshmem_reader_owner(channel, i);
            uint64_t tail;
            if (!ivshmem_is_owned(channel, reader) ||
                ivshmem_is_silent(member, ivshmem_place_of(reader)))
                continue;
            tail = ivshmem_get(channel, ivshmem_row_at(channel, i, slot));
            if (ivshmem_epoch(tail) != ivshmem_epoch(reader) ||
                ivshmem_value(tail) != ivshmem_value(ivshmem_head_for(channel, slot, i)))
                return;
        }
    ivshmem_slot_free(channel, at, owner);
}

/* A cell stands in one place less; in none: it is free. */
static inline void ivshmem_cell_drop(struct ivshmem_writer *writer, uint32_t cell)
{
    struct ivshmem_writer_tables *tables = &writer->tables;
    if (!(writer->channel->record.geometry.overflow & IVSHMEM_DISCARD) ||
        --tables->references[cell] == 0)
        tables->free[writer->free_cells++] = cell;
}

/* Take back the cells of a backlog that its reader has read, up to `tail`. */
static inline void ivshmem_backlog_advance(struct ivshmem_writer *writer, unsigned reader,
                                           uint64_t tail)
{
    struct ivshmem_backlog *backlog = &writer->tables.backlogs[reader];
    uint32_t slots = writer->channel->record.geometry.slots;
    /* A tail that is not between the two is a hostile reader's: its backlog stays full. */
    if (ivshmem_ahead(tail, backlog->tail) > ivshmem_ahead(backlog->head, backlog->tail))
        return;
    for (; backlog->tail != tail; backlog->tail = (backlog->tail + 1) & IVSHMEM_VALUE_MASK)
        ivshmem_cell_drop(writer, writer->tables.pinned[(uint64_t)reader * slots +
                                                        (backlog->tail & (slots - 1))]);
}

/* Drop what a former reader of a slot left in its backlog, up to `tail`. That reader may live, though
 * a user took it for gone: its entries change before their cells are used again. */
static inline void ivshmem_backlog_drop(struct ivshmem_writer *writer, unsigned reader,
                                        uint64_t tail)
{
    const struct ivshmem_channel *channel = writer->channel;
    const struct ivshmem_memory *memory = &channel->area.memory;
    struct ivshmem_backlog *backlog = &writer->tables.backlogs[reader];
    uint64_t at = ivshmem_backlog_at(channel, writer->slot, reader), position = backlog->tail;
    if (ivshmem_ahead(tail, position) > ivshmem_ahead(backlog->head, position))
        tail = backlog->head;
    for (; position != tail; position = (position + 1) & IVSHMEM_VALUE_MASK)
        ivshmem_store(memory, channel->at + ivshmem_backlog_entry_at(channel, at, position),
                      ivshmem_word(position, IVSHMEM_VOID, writer->epoch));
    ivshmem_store_barrier(memory);
    ivshmem_backlog_advance(writer, reader, tail);
}

/* A new owner of a writer's slot: all backlogs are closed until their readers are looked at. */
static inline void ivshmem_backlogs_begin(struct ivshmem_writer *writer)
{
    const struct ivshmem_channel *channel = writer->channel;
    const struct ivshmem_memory *memory = &channel->area.memory;
    const struct ivshmem_geometry *g = &channel->record.geometry;
    for (uint32_t i = 0; i < channel->layout.cells_each; i++)
        writer->tables.references[i] = 0;
    for (uint32_t i = 0; i < g->slots; i++)
        writer->tables.references[writer->tables.cell_of[i]] = 1;
    for (unsigned i = 0; i < g->readers; i++) {
        uint64_t at = ivshmem_backlog_at(channel, writer->slot, i);
        struct ivshmem_backlog *backlog = &writer->tables.backlogs[i];
        backlog->is_open = 0;
        backlog->head = backlog->tail = ivshmem_value(ivshmem_get(channel, at));
        for (uint32_t j = 0; j < g->slots; j++)
            ivshmem_store(memory, channel->at + ivshmem_backlog_entry_at(channel, at, j),
                          ivshmem_word(backlog->head, IVSHMEM_VOID, writer->epoch));
        ivshmem_announce(memory, channel->at + at, ivshmem_word(backlog->head, 0, writer->epoch));
    }
}

/* Take a writer's slot: a free one, or that of a writer which ended and was read by all. */
static inline int ivshmem_writer_slot(const struct ivshmem_channel *channel,
                                      const struct ivshmem_member *member, unsigned *slot,
                                      unsigned *epoch)
{
    for (unsigned i = 0; i < channel->record.geometry.writers; i++) {
        uint64_t at = ivshmem_writer_owner_at(channel, i), owner;
        int code;
        ivshmem_writer_reap(member, channel, i);
        owner = ivshmem_get(channel, at);
        if (ivshmem_flags(owner) != IVSHMEM_SLOT_FREE)
            continue;
        *slot = i;
        *epoch = (ivshmem_epoch(owner) + 1) & IVSHMEM_EPOCH_MASK;
        code = ivshmem_slot_take(channel, at, owner,
                                 ivshmem_place_word(member->place, IVSHMEM_SLOT_OPEN, *epoch));
        if (code != IVSHMEM_TAKEN)
            return code;
    }
    return IVSHMEM_TAKEN;
}

#define IVSHMEM_NO_CELL (~UINT32_C(0))

/* Which cell holds the message that a former owner published at a position, or IVSHMEM_NO_CELL. The
 * entry gets the epoch of the present owner, with which readers find it; but not a value's, which is
 * read with any epoch, and must be whole also if this process dies here. */
static inline uint32_t ivshmem_writer_adopt_one(struct ivshmem_writer *writer, uint64_t position)
{
    struct ivshmem_channel *channel = writer->channel;
    int is_value = channel->record.geometry.kind == IVSHMEM_VALUE;
    uint64_t at = ivshmem_entry_at(channel, writer->slot, position);
    struct ivshmem_message message;
    struct ivshmem_entry entry;
    if (ivshmem_has_claims(channel) || (is_value && ivshmem_ahead(writer->next, position) != 1) ||
        ivshmem_entry_read(channel, at, writer->slot, position,
                           ivshmem_epoch(ivshmem_get(channel, at)), &message) != 0)
        return IVSHMEM_NO_CELL;
    entry.cell = (uint32_t)((message.offset - writer->cells_at) / channel->layout.cell_bytes);
    entry.length = message.length;
    entry.time = message.time;
    entry.user = message.user;
    if (!is_value)
        ivshmem_entry_store(&channel->area.memory, channel->at + at, position, writer->epoch,
                            &entry);
    return entry.cell;
}

/* Take over what a former owner published, for late readers; and learn which cells are free. No entry
 * is left that a reader would accept and whose cell is used again. */
static inline void ivshmem_writer_adopt(struct ivshmem_writer *writer)
{
    struct ivshmem_channel *channel = writer->channel;
    const struct ivshmem_geometry *g = &channel->record.geometry;
    struct ivshmem_writer_tables *tables = &writer->tables;
    /* Of the cells of calls, the other half is for replies. */
    uint32_t cells = g->kind == IVSHMEM_CALLS ? g->slots + g->loans
                                              : (uint32_t)channel->layout.cells_each;
    uint32_t *is_used = tables->free, cell = 0;
    for (uint32_t i = 0; i < cells; i++)
        is_used[i] = 0;
    for (uint32_t i = 0; i < g->slots; i++) {
        uint64_t ahead = 1 + ((writer->next - 1 - i) & (g->slots - 1));
        uint32_t adopted =
            ivshmem_writer_adopt_one(writer, (writer->next - ahead) & IVSHMEM_VALUE_MASK);
        if (adopted < cells && !is_used[adopted])
            is_used[adopted] = 1;
        else {
            adopted = IVSHMEM_NO_CELL;
            ivshmem_store(&channel->area.memory,
                          writer->entries_at + (uint64_t)IVSHMEM_ENTRY_BYTES * i,
                          ivshmem_word(writer->next, IVSHMEM_VOID, writer->epoch));
        }
        tables->cell_of[i] = adopted;
    }
    for (uint32_t i = 0; i < g->slots; i++) {
        if (tables->cell_of[i] != IVSHMEM_NO_CELL)
            continue;
        while (is_used[cell])
            cell++;
        is_used[cell] = 1;
        tables->cell_of[i] = cell;
    }
    writer->free_cells = 0;
    for (uint32_t i = 0; i < cells; i++) /* the list takes the place of the marks */
        if (!is_used[i])
            tables->free[writer->free_cells++] = i;
}

/* Take a writer's slot. The caller has set channel, member and the tables.
 *
 * IVSHMEM_BAD: a channel of bytes, which has no writers.
 * IVSHMEM_TAKEN: every slot has an owner, or messages of a former owner that a reader has yet to
 * read.
 */
static inline int ivshmem_writer_open(struct ivshmem_writer *writer)
{
    struct ivshmem_channel *channel = writer->channel;
    const struct ivshmem_memory *memory = &channel->area.memory;
    const struct ivshmem_geometry *g = &channel->record.geometry;
    int code;
    if (g->kind == IVSHMEM_BYTES)
        return IVSHMEM_BAD;
    if (memory->readonly)
        return IVSHMEM_READ_ONLY;
    code = ivshmem_writer_slot(channel, writer->member, &writer->slot, &writer->epoch);
    if (code == IVSHMEM_TAKEN && ivshmem_prove_places(writer->member) > 0)
        code = ivshmem_writer_slot(channel, writer->member, &writer->slot, &writer->epoch);
    if (code != 0)
        return code;
    writer->head_at =
        channel->at + channel->layout.heads + (uint64_t)IVSHMEM_CACHE_LINE * writer->slot;
    writer->entries_at = channel->at + ivshmem_entry_at(channel, writer->slot, 0);
    writer->cells_at = channel->at + ivshmem_cell_at(channel, writer->slot, 0);
    writer->sleep.at = channel->layout.writer_sleepers + 8u * writer->slot;
    writer->sleep.epoch = writer->epoch;
    writer->sleep.count = ivshmem_value(ivshmem_get(channel, writer->sleep.at));
    writer->sleep.more = 0;
    for (unsigned i = 0; i < IVSHMEM_MOST_READERS; i++)
        writer->rung.words[i] = writer->blocks[i] = 0;
    /* Positions never begin anew: readers' tails stay right. */
    writer->next = ivshmem_value(ivshmem_load(memory, writer->head_at));
    writer->bound = writer->next;
    writer->joins = ~UINT64_C(0);
    writer->loaned = 0;
    writer->missed = 0;
    ivshmem_writer_adopt(writer);
    if (g->overflow & IVSHMEM_DISCARD)
        ivshmem_backlogs_begin(writer);
    ivshmem_announce(memory, writer->head_at, ivshmem_word(writer->next, 0, writer->epoch));
    return 0;
}

/* Look at the readers. Those that discard get a backlog; those that block: up to which position do
 * they leave room?
 *
 * A reader that is silent does not hold up writers: it is looked at again before each message. One
 * that is farther behind than the channel is long is at work on its joining, or was silent and has
 * yet to notice what it lost: it is waited for.
 */
static inline int ivshmem_writer_look(struct ivshmem_writer *writer)
{
    struct ivshmem_channel *channel = writer->channel;
    const struct ivshmem_geometry *g = &channel->record.geometry;
    uint64_t slots = g->slots;
    writer->joins = ivshmem_get(channel, IVSHMEM_JOINS); /* first: a reader that joins later changes it */
    writer->bound = (writer->next + (IVSHMEM_VALUE_MASK >> 2)) & IVSHMEM_VALUE_MASK;
    if (!(g->overflow & (IVSHMEM_BLOCK | IVSHMEM_DISCARD)))
        return 0;
    for (unsigned i = 0; i < g->readers; i++) {
        uint64_t owner = ivshmem_reader_owner(channel, i);
        uint64_t row = channel->layout.rows + channel->layout.row_bytes * i;
        uint64_t policy, tail, ahead, room;
        if (!ivshmem_is_owned(channel, owner))
            continue;
        policy = ivshmem_get(channel, row);
        if (ivshmem_epoch(policy) == ivshmem_epoch(owner) &&
            ivshmem_policy(policy) == IVSHMEM_DISCARD && (g->overflow & IVSHMEM_DISCARD)) {
            struct ivshmem_backlog *backlog = &writer->tables.backlogs[i];
            if (!backlog->is_open || backlog->epoch != ivshmem_epoch(owner)) {
                /* What this writer added after the new reader had looked at the backlog stays. */
                tail = ivshmem_get(channel, ivshmem_row_at(channel, i, writer->slot));
                ivshmem_backlog_drop(writer, i,
                                     ivshmem_epoch(tail) == ivshmem_epoch(owner)
                                         ? ivshmem_value(tail)
                                         : backlog->head);
                backlog->is_open = 1;
                backlog->epoch = ivshmem_epoch(owner);
            }
            continue;
        }
        if (ivshmem_epoch(policy) == ivshmem_epoch(owner))
            writer->blocks[i] =
                ivshmem_policy(policy) == IVSHMEM_BLOCK ? ivshmem_epoch(owner) + 1u : 0;
        if (writer->blocks[i] != ivshmem_epoch(owner) + 1u)
            continue; /* if it is about to join, it changes `joins` when it has */
        tail = ivshmem_get(channel, ivshmem_row_at(channel, i, writer->slot));
        if (ivshmem_epoch(tail) != ivshmem_epoch(owner)) {
            /* A reader stores its tails before its policy: this is a former owner's late store.
             * The reader stores its own again at its next beat. */
            if (ivshmem_is_silent(writer->member, ivshmem_place_of(owner)))
                continue;
            writer->bound = writer->next;
            return IVSHMEM_AGAIN;
        }
        ahead = ivshmem_ahead(writer->next, ivshmem_value(tail));
        if (ahead >= slots && !ivshmem_is_silent(writer->member, ivshmem_place_of(owner))) {
            if (ivshmem_is_behind(writer->next, ivshmem_value(tail))) /* or silent for very long */
                return ivshmem_corrupt(channel, "tail", ivshmem_row_at(channel, i, writer->slot),
                                       tail, owner);
            writer->bound = writer->next;
            return IVSHMEM_AGAIN;
        }
        room = ahead < slots ? slots - ahead : 1;
        if (ivshmem_ahead(writer->bound, writer->next) > room)
            writer->bound = (writer->next + room) & IVSHMEM_VALUE_MASK;
    }
    return 0;
}

/* Whether a message can be published now; IVSHMEM_AGAIN: a reader that blocks has no room. */
static inline int ivshmem_writer_ready(struct ivshmem_writer *writer)
{
    if (writer->next != writer->bound &&
        ivshmem_get(writer->channel, IVSHMEM_JOINS) == writer->joins)
        return 0;
    return ivshmem_writer_look(writer);
}

/* Borrow a cell to write a message into: its offset in the region is `ivshmem_cell_at`. */
static inline int ivshmem_loan(struct ivshmem_writer *writer, uint32_t *cell)
{
    if (writer->loaned == writer->channel->record.geometry.loans || writer->free_cells == 0)
        return IVSHMEM_TOO_MANY;
    writer->loaned++;
    *cell = writer->tables.free[--writer->free_cells];
    return 0;
}

/* Give a loan back without publishing it. */
static inline void ivshmem_loan_drop(struct ivshmem_writer *writer, uint32_t cell)
{
    writer->loaned--;
    writer->tables.free[writer->free_cells++] = cell;
}

/* Put an entry into the backlogs of those that discard, as far as they have room. */
static inline void ivshmem_backlogs_add(struct ivshmem_writer *writer,
                                        const struct ivshmem_entry *entry)
{
    const struct ivshmem_channel *channel = writer->channel;
    uint32_t slots = channel->record.geometry.slots;
    writer->missed = 0;
    for (unsigned i = 0; i < channel->record.geometry.readers; i++) {
        struct ivshmem_backlog *backlog = &writer->tables.backlogs[i];
        uint64_t at = ivshmem_backlog_at(channel, writer->slot, i), tail, owner;
        if (!backlog->is_open)
            continue;
        tail = ivshmem_get(channel, ivshmem_row_at(channel, i, writer->slot));
        if (ivshmem_epoch(tail) == backlog->epoch)
            ivshmem_backlog_advance(writer, i, ivshmem_value(tail));
        if (ivshmem_ahead(backlog->head, backlog->tail) == slots) {
            owner = ivshmem_reader_owner(channel, i);
            if (!ivshmem_is_owned(channel, owner) || ivshmem_epoch(owner) != backlog->epoch) {
                ivshmem_backlog_drop(writer, i, backlog->head);
                backlog->is_open = 0;
            } else {
                writer->missed++;
            }
            continue;
        }
        ivshmem_entry_store(&channel->area.memory,
                            channel->at + ivshmem_backlog_entry_at(channel, at, backlog->head),
                            backlog->head, writer->epoch, entry);
        writer->tables.references[entry->cell]++;
        writer->tables.pinned[(uint64_t)i * slots + (backlog->head & (slots - 1))] = entry->cell;
        backlog->head = (backlog->head + 1) & IVSHMEM_VALUE_MASK;
        ivshmem_announce(&channel->area.memory, channel->at + at,
                         ivshmem_word(backlog->head, 0, writer->epoch));
    }
}

/* Put a loan at the next position. Others see it at the next ivshmem_writer_announce.
 *
 * The caller found the writer ready. `time` is in microseconds since 1970, or 0; of `user`, 44 bits
 * are kept.
 */
static inline void ivshmem_writer_add(struct ivshmem_writer *writer, uint32_t cell,
                                      uint32_t length, uint64_t time, uint64_t user)
{
    const struct ivshmem_geometry *g = &writer->channel->record.geometry;
    uint64_t slot = writer->next & (g->slots - 1);
    uint32_t before = writer->tables.cell_of[slot];
    struct ivshmem_entry entry;
    entry.cell = cell;
    entry.length = length;
    entry.time = time;
    entry.user = user;
    writer->loaned--;
    ivshmem_entry_store(&writer->channel->area.memory,
                        writer->entries_at + slot * IVSHMEM_ENTRY_BYTES, writer->next,
                        writer->epoch, &entry);
    if (g->overflow & IVSHMEM_DISCARD) {
        writer->tables.references[cell] = 1;
        ivshmem_backlogs_add(writer, &entry);
    }
    /* A reader of the former message of this slot sees its stamp change before its cell does. */
    ivshmem_cell_drop(writer, before);
    writer->tables.cell_of[slot] = cell;
    writer->next = (writer->next + 1) & IVSHMEM_VALUE_MASK;
    /* A reader's core has the lines of the next message: they come back while this one is announced. */
    slot = writer->next & (g->slots - 1);
    IVSHMEM_PREFETCH(writer->channel->area.memory.start + writer->entries_at +
                     slot * IVSHMEM_ENTRY_BYTES);
    if (writer->free_cells > 0)
        IVSHMEM_PREFETCH(writer->channel->area.memory.start + writer->cells_at +
                         writer->tables.free[writer->free_cells - 1] *
                             writer->channel->layout.cell_bytes);
}

/* Let readers see what was added, and ring those that sleep. */
static inline void ivshmem_writer_announce(struct ivshmem_writer *writer)
{
    const struct ivshmem_channel *channel = writer->channel;
    const struct ivshmem_memory *memory = &channel->area.memory;
    ivshmem_announce(memory, writer->head_at, ivshmem_word(writer->next, 0, writer->epoch));
    ivshmem_wake_readers(writer->member, channel, IVSHMEM_MOST_READERS, &writer->rung);
    if (channel->record.geometry.options & IVSHMEM_RING_ALWAYS)
        writer->member->user.ring(writer->member->user.context, IVSHMEM_EVERY_PEER,
                                  (unsigned)(writer->member->peer >> 16) & 0xffffu);
}

/* Publish a loan. IVSHMEM_AGAIN: there is no room now; the loan stays. */
static inline int ivshmem_publish(struct ivshmem_writer *writer, uint32_t cell, uint32_t length,
                                  uint64_t time, uint64_t user)
{
    int code = ivshmem_writer_ready(writer);
    if (code != 0)
        return code;
    ivshmem_writer_add(writer, cell, length, time, user);
    ivshmem_writer_announce(writer);
    return 0;
}

/* Copy a message in and publish it. */
static inline int ivshmem_put(struct ivshmem_writer *writer, const void *data, uint32_t length,
                              uint64_t time, uint64_t user)
{
    uint32_t cell;
    int code;
    if (length > writer->channel->record.geometry.limit)
        return IVSHMEM_TOO_LONG;
    code = ivshmem_writer_ready(writer);
    if (code != 0)
        return code;
    code = ivshmem_loan(writer, &cell);
    if (code != 0)
        return code;
    ivshmem_copy_payload(writer->channel->area.memory.start + writer->cells_at +
                             cell * writer->channel->layout.cell_bytes,
                         data, length);
    ivshmem_writer_add(writer, cell, length, time, user);
    ivshmem_writer_announce(writer);
    return 0;
}

/* Before a writer without room sleeps; 0: there is room now, so that it need not. */
static inline int ivshmem_writer_sleep(struct ivshmem_writer *writer)
{
    int code;
    ivshmem_sleep_begin(writer->channel, &writer->sleep);
    code = ivshmem_writer_look(writer);
    if (code != IVSHMEM_AGAIN)
        ivshmem_sleep_end(writer->channel, &writer->sleep);
    return code;
}

/* Once a beat: store again what a late store of a former owner may have spoiled. */
static inline void ivshmem_writer_beat(struct ivshmem_writer *writer)
{
    const struct ivshmem_memory *memory = &writer->channel->area.memory;
    uint64_t head = ivshmem_word(writer->next, 0, writer->epoch);
    if (!ivshmem_has_claims(writer->channel) && ivshmem_load(memory, writer->head_at) != head)
        ivshmem_writer_announce(writer);
}

/* Write no more. Loans are dropped; what was published is read, and the slot is free then. */
static inline void ivshmem_writer_close(struct ivshmem_writer *writer)
{
    const struct ivshmem_channel *channel = writer->channel;
    uint64_t at = channel->at + ivshmem_writer_owner_at(channel, writer->slot);
    struct ivshmem_place place = writer->member->place;
    ivshmem_exchange(&channel->area.memory, at,
                     ivshmem_place_word(place, IVSHMEM_SLOT_OPEN, writer->epoch),
                     ivshmem_place_word(place, IVSHMEM_SLOT_CLOSING, writer->epoch));
    ivshmem_writer_reap(writer->member, channel, writer->slot);
}

#endif
