/* Entries: what a writer says of a message, and how a reader checks it.
 *
 * Knows: positions, cells, stamps. Does not know: which message comes next.
 */
#ifndef IVSHMEM_CHANNEL_ENTRIES_H
#define IVSHMEM_CHANNEL_ENTRIES_H

#include "slots.h"

static inline uint64_t ivshmem_entry_at(const struct ivshmem_channel *channel, unsigned writer,
                                        uint64_t position)
{
    const struct ivshmem_geometry *g = &channel->record.geometry;
    uint64_t each = ivshmem_rounded((uint64_t)IVSHMEM_ENTRY_BYTES * g->slots, IVSHMEM_CACHE_LINE);
    return channel->layout.entries + each * writer +
           (position & (g->slots - 1)) * IVSHMEM_ENTRY_BYTES;
}

static inline uint64_t ivshmem_cell_at(const struct ivshmem_channel *channel, unsigned writer,
                                       uint32_t cell)
{
    return channel->layout.cells +
           (channel->layout.cells_each * writer + cell) * channel->layout.cell_bytes;
}

static inline uint64_t ivshmem_row_at(const struct ivshmem_channel *channel, unsigned reader,
                                      unsigned writer)
{
    return channel->layout.rows + channel->layout.row_bytes * reader + 8u + 8u * writer;
}

static inline uint64_t ivshmem_head(const struct ivshmem_channel *channel, unsigned writer)
{
    return ivshmem_get(channel,
                       channel->layout.heads + (uint64_t)IVSHMEM_CACHE_LINE * writer);
}

/* Where the backlog of a reader is at a writer: a line with its head, then its entries. */
static inline uint64_t ivshmem_backlog_at(const struct ivshmem_channel *channel, unsigned writer,
                                          unsigned reader)
{
    uint64_t number = (uint64_t)writer * channel->record.geometry.readers + reader;
    return channel->layout.backlogs + channel->layout.backlog_bytes * number;
}

static inline uint64_t ivshmem_backlog_entry_at(const struct ivshmem_channel *channel,
                                                uint64_t backlog, uint64_t position)
{
    return backlog + IVSHMEM_CACHE_LINE +
           (position & (channel->record.geometry.slots - 1)) * IVSHMEM_ENTRY_BYTES;
}

/* The first word of a reader's row: enum ivshmem_overflow (8 bits) | messages that it lost (32). */
static inline uint64_t ivshmem_policy_word(unsigned overflow, uint64_t lost, unsigned epoch)
{
    return ivshmem_word((lost & 0xffffffffu) << 8 | overflow, 0, epoch);
}

static inline unsigned ivshmem_policy(uint64_t word)
{
    return (unsigned)ivshmem_value(word) & 0xffu;
}

/* Whether the reader in a slot says that it has a backlog of its own. */
static inline int ivshmem_discards(const struct ivshmem_channel *channel, unsigned reader)
{
    return (channel->record.geometry.overflow & IVSHMEM_DISCARD) != 0 &&
           ivshmem_policy(ivshmem_get(channel, channel->layout.rows +
                                                   channel->layout.row_bytes * reader)) ==
               IVSHMEM_DISCARD;
}

/* The head that counts for the reader in a slot. */
static inline uint64_t ivshmem_head_for(const struct ivshmem_channel *channel, unsigned writer,
                                        unsigned reader)
{
    return ivshmem_discards(channel, reader)
               ? ivshmem_get(channel, ivshmem_backlog_at(channel, writer, reader))
               : ivshmem_head(channel, writer);
}

/* What an entry says. */
struct ivshmem_entry {
    uint32_t cell, length;
    uint64_t time, user;
};

/* Store an entry; the stamp first, since it voids the message that was there. The head announces
 * the new one. */
static inline void ivshmem_entry_store(const struct ivshmem_memory *memory, uint64_t at,
                                       uint64_t position, unsigned epoch,
                                       const struct ivshmem_entry *entry)
{
    ivshmem_store(memory, at, ivshmem_word(position, 0, epoch));
    ivshmem_store_barrier(memory);
    ivshmem_store(memory, at + IVSHMEM_ENTRY_CELL,
                  ivshmem_cell_word(entry->cell, entry->length, epoch));
    ivshmem_store(memory, at + IVSHMEM_ENTRY_TIME, entry->time << 20 | epoch);
    ivshmem_store(memory, at + IVSHMEM_ENTRY_USER, entry->user << 20 | epoch);
}

/* A message, as a reader took it. Its bytes are at `offset` of the region, and may change. */
struct ivshmem_message {
    unsigned writer;
    uint64_t position, stamp, stamp_at;
    uint64_t offset;
    uint32_t length;
    uint64_t time, user;
    uint64_t lost; /* messages of this writer that were overwritten before this one was read */
};

/* Read the entry at a position, whose stamp has this epoch. IVSHMEM_OVERTAKEN: it is not there, or
 * a late store of a former owner spoiled it. */
static inline int ivshmem_entry_read(struct ivshmem_channel *channel, uint64_t at, unsigned writer,
                                     uint64_t position, unsigned epoch,
                                     struct ivshmem_message *message)
{
    uint64_t word;
    message->stamp = ivshmem_get(channel, at);
    if (message->stamp != ivshmem_word(position, 0, epoch))
        return IVSHMEM_OVERTAKEN;
    word = ivshmem_get(channel, at + IVSHMEM_ENTRY_CELL);
    message->time = ivshmem_get(channel, at + IVSHMEM_ENTRY_TIME);
    message->user = ivshmem_get(channel, at + IVSHMEM_ENTRY_USER);
    ivshmem_load_barrier(&channel->area.memory);
    if (ivshmem_get(channel, at) != message->stamp || ((word ^ epoch) & 0xffffu) != 0 ||
        ivshmem_epoch(message->time) != epoch || ivshmem_epoch(message->user) != epoch)
        return IVSHMEM_OVERTAKEN;
    message->time >>= 20;
    message->user >>= 20;
    message->writer = writer;
    message->position = position;
    message->stamp_at = channel->at + at;
    message->length = (uint32_t)(word >> 16) & 0x7fffffffu;
    message->lost = 0;
    if (word >> 47 >= channel->layout.cells_each ||
        message->length > channel->record.geometry.limit)
        return ivshmem_corrupt(channel, "cell", at + IVSHMEM_ENTRY_CELL, word,
                               ivshmem_writer_owner(channel, writer));
    message->offset = channel->at + ivshmem_cell_at(channel, writer, (uint32_t)(word >> 47));
    return 0;
}

/* Whether a message is still what it was when it was taken; IVSHMEM_OVERTAKEN: it is not, and what
 * was copied or seen of it since then may be torn. A new owner of the writer's slot that keeps the
 * message changes the epoch of its stamp alone. */
static inline int ivshmem_check(const struct ivshmem_channel *channel,
                                const struct ivshmem_message *message)
{
    uint64_t stamp;
    ivshmem_load_barrier(&channel->area.memory);
    stamp = ivshmem_load(&channel->area.memory, message->stamp_at);
    return ((stamp ^ message->stamp) & ~(uint64_t)IVSHMEM_EPOCH_MASK) == 0 ? 0 : IVSHMEM_OVERTAKEN;
}

#endif
