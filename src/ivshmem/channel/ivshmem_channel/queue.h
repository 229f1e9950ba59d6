/* A queue: each message goes to one reader.
 */
#ifndef IVSHMEM_CHANNEL_QUEUE_H
#define IVSHMEM_CHANNEL_QUEUE_H

#include "reader.h"

/* Each message of a queue goes to one reader. The writer is an ivshmem_writer; a message whose
 * reader takes long keeps its slot, and the writer passes over it. */

/* Find the next position whose slot can be used. IVSHMEM_AGAIN: there is none.
 *
 * The writer passes over slots that readers have. It does not pass over a message that no reader has
 * taken yet: readers would take a later one first.
 */
static inline int ivshmem_queue_ready(struct ivshmem_writer *writer)
{
    const struct ivshmem_channel *channel = writer->channel;
    uint64_t slots = channel->record.geometry.slots;
    for (uint64_t i = 0; i < slots; i++) {
        uint64_t at = ivshmem_claim_at(channel, writer->slot, writer->next + i);
        uint64_t claim = ivshmem_get(channel, at);
        if (ivshmem_flags(claim) == IVSHMEM_CLAIM_ONCE &&
            ivshmem_is_gone(&channel->area, ivshmem_claimer(channel, claim)) &&
            ivshmem_claim_exchange(channel, at, claim,
                                   ivshmem_claim_word(0, 0, IVSHMEM_CLAIM_NONE, 0)))
            claim = 0; /* lost with the reader that was copying it */
        if (ivshmem_flags(claim) == IVSHMEM_CLAIM_OPEN)
            return IVSHMEM_AGAIN;
        if (ivshmem_flags(claim) == IVSHMEM_CLAIM_NONE) {
            writer->next = (writer->next + i) & IVSHMEM_VALUE_MASK;
            return 0;
        }
    }
    return IVSHMEM_AGAIN;
}

/* Publish a loan; the caller found the queue ready. The position that it got, for calls. */
static inline uint64_t ivshmem_queue_publish(struct ivshmem_writer *writer, uint32_t cell,
                                             uint32_t length, uint64_t time, uint64_t user)
{
    const struct ivshmem_channel *channel = writer->channel;
    uint64_t position = writer->next;
    ivshmem_writer_add(writer, cell, length, time, user);
    ivshmem_announce(&channel->area.memory,
                     channel->at + ivshmem_claim_at(channel, writer->slot, position),
                     ivshmem_claim_word(position, 0, IVSHMEM_CLAIM_OPEN, writer->epoch));
    ivshmem_announce(&channel->area.memory, writer->head_at,
                     ivshmem_word(writer->next, 0, writer->epoch));
    ivshmem_wake_readers(writer->member, channel, 1, &writer->rung);
    return position;
}

/* Copy a message in and publish it. */
static inline int ivshmem_queue_put(struct ivshmem_writer *writer, const void *data,
                                    uint32_t length, uint64_t time, uint64_t user)
{
    uint32_t cell;
    int code;
    if (length > writer->channel->record.geometry.limit)
        return IVSHMEM_TOO_LONG;
    code = ivshmem_queue_ready(writer);
    if (code == 0)
        code = ivshmem_loan(writer, &cell);
    if (code != 0)
        return code;
    ivshmem_copy_payload(writer->channel->area.memory.start + writer->cells_at +
                             cell * writer->channel->layout.cell_bytes,
                         data, length);
    ivshmem_queue_publish(writer, cell, length, time, user);
    return 0;
}

/* Before a writer without room, or one that waits for a reply, sleeps. The caller looks again
 * afterwards, and calls ivshmem_sleep_end. */
static inline void ivshmem_queue_writer_sleep(struct ivshmem_writer *writer)
{
    ivshmem_sleep_begin(writer->channel, &writer->sleep);
}

/* What a reader has of a queue, or a server of a call. */
struct ivshmem_taken {
    struct ivshmem_message message;
    uint64_t claim, claim_at; /* in the channel */
    int redelivered;          /* another reader had it before */
};

/* Try to take the message at a position, whose claim was read. All that counts of the position are
 * those bits that the claim has: the message is the one that is there. */
static inline int ivshmem_queue_claim(struct ivshmem_reader *reader, unsigned writer,
                                      uint64_t position, uint64_t claim, enum ivshmem_claim as,
                                      struct ivshmem_taken *taken)
{
    struct ivshmem_channel *channel = reader->channel;
    uint64_t at = ivshmem_entry_at(channel, writer, position);
    unsigned epoch = reader->sources[writer].epoch;
    int code;
    taken->claim_at = ivshmem_claim_at(channel, writer, position);
    taken->claim = ivshmem_claim_word(position, reader->slot, as, reader->epoch);
    taken->redelivered = ivshmem_flags(claim) != IVSHMEM_CLAIM_OPEN;
    if (!ivshmem_claim_exchange(channel, taken->claim_at, claim, taken->claim))
        return IVSHMEM_AGAIN;
    code = ivshmem_entry_read(channel, at, writer, position, epoch, &taken->message);
    position = ivshmem_value(taken->message.stamp);
    if (code == IVSHMEM_OVERTAKEN && ivshmem_claim_is_of(taken->claim, position)) /* it is older */
        code = ivshmem_entry_read(channel, at, writer, position, epoch, &taken->message);
    if (code == IVSHMEM_OVERTAKEN && ivshmem_get(channel, taken->claim_at) != taken->claim)
        return IVSHMEM_AGAIN; /* this process was taken for silent, and another reader has it */
    if (code == IVSHMEM_OVERTAKEN) /* no writer overtakes a claim: a word is spoiled */
        code = ivshmem_corrupt(channel, "stamp", at, taken->message.stamp,
                               ivshmem_writer_owner(channel, writer));
    if (code != 0) /* no reader can read it: remove it */
        ivshmem_claim_exchange(channel, taken->claim_at, taken->claim,
                               ivshmem_claim_word(0, 0, IVSHMEM_CLAIM_NONE, 0));
    return code;
}

/* Whether a claim may be taken: no reader has it; or, if `thorough`, a reader of the queue has it
 * that is gone or silent. */
static inline int ivshmem_queue_may(const struct ivshmem_reader *reader, uint64_t claim,
                                    int thorough)
{
    const struct ivshmem_channel *channel = reader->channel;
    unsigned state = ivshmem_flags(claim);
    struct ivshmem_place claimer;
    if (state == IVSHMEM_CLAIM_OPEN || state == IVSHMEM_CLAIM_AGAIN)
        return 1;
    if (!thorough || state != IVSHMEM_CLAIM_TAKEN ||
        channel->record.geometry.kind != IVSHMEM_QUEUE)
        return 0;
    claimer = ivshmem_claimer(channel, claim);
    return ivshmem_is_gone(&channel->area, claimer) ||
           ivshmem_is_silent(reader->member, claimer);
}

/* Take a message: `as` is IVSHMEM_CLAIM_TAKEN or IVSHMEM_CLAIM_ONCE.
 *
 * With `thorough` also those that another reader gave back, or had when it ended or fell silent:
 * before a reader sleeps, and once a beat.
 */
static inline int ivshmem_queue_take(struct ivshmem_reader *reader, enum ivshmem_claim as,
                                     int thorough, struct ivshmem_taken *taken)
{
    struct ivshmem_channel *channel = reader->channel;
    const struct ivshmem_geometry *g = &channel->record.geometry;
    if (reader->slot == IVSHMEM_NO_SLOT)
        return IVSHMEM_READ_ONLY;
    if (!ivshmem_can_exchange(&channel->area.memory))
        return IVSHMEM_NO_ATOMICS;
    for (unsigned i = 0; i < g->writers; i++) {
        unsigned writer = reader->turn;
        struct ivshmem_source *source = &reader->sources[writer];
        uint64_t head = ivshmem_head(channel, writer), newest = ivshmem_value(head);
        reader->turn = writer + 1 < g->writers ? writer + 1 : 0;
        if (ivshmem_epoch(head) != source->epoch) {
            uint64_t owner = ivshmem_writer_owner(channel, writer);
            if (ivshmem_epoch(owner) != ivshmem_epoch(head))
                continue; /* not stored yet, or a former owner's late store */
            source->epoch = ivshmem_epoch(head);
        }
        if (ivshmem_ahead(newest, source->next) > g->slots)
            source->next = (newest - g->slots) & IVSHMEM_VALUE_MASK;
        while (source->next != newest) {
            uint64_t position = source->next;
            uint64_t claim = ivshmem_get(channel, ivshmem_claim_at(channel, writer, position));
            int code;
            source->next = (position + 1) & IVSHMEM_VALUE_MASK;
            if (!ivshmem_claim_is_of(claim, position) || !ivshmem_queue_may(reader, claim, 0))
                continue; /* another reader was faster, or the writer passed over this slot */
            code = ivshmem_queue_claim(reader, writer, position, claim, as, taken);
            if (code != IVSHMEM_AGAIN)
                return code;
        }
        /* What waits longer may be older than the slots say. */
        for (uint64_t slot = 0; thorough && slot < g->slots; slot++) {
            uint64_t claim = ivshmem_get(channel, ivshmem_claim_at(channel, writer, slot));
            int code;
            if (!ivshmem_claim_is_published(newest, claim) || !ivshmem_queue_may(reader, claim, 1))
                continue;
            code = ivshmem_queue_claim(reader, writer, ivshmem_claim_position(newest, claim), claim,
                                       as, taken);
            if (code != IVSHMEM_AGAIN)
                return code;
        }
    }
    return IVSHMEM_AGAIN;
}

/* End with a message. IVSHMEM_OVERTAKEN: this process was taken for gone, and another reader has
 * the message, so that what was seen of it may be torn. */
static inline int ivshmem_queue_done(struct ivshmem_reader *reader,
                                     const struct ivshmem_taken *taken)
{
    struct ivshmem_channel *channel = reader->channel;
    uint64_t position = taken->message.position;
    ivshmem_load_barrier(&channel->area.memory);
    if (!ivshmem_claim_exchange(channel, taken->claim_at, taken->claim,
                                ivshmem_claim_word(position, 0, IVSHMEM_CLAIM_NONE, 0)))
        return IVSHMEM_OVERTAKEN;
    ivshmem_wake_writers(reader->member, channel, &reader->rung);
    return 0;
}

/* Give a message back, for another reader. */
static inline int ivshmem_queue_return(struct ivshmem_reader *reader,
                                       const struct ivshmem_taken *taken)
{
    struct ivshmem_channel *channel = reader->channel;
    if (!ivshmem_claim_exchange(
            channel, taken->claim_at, taken->claim,
            ivshmem_claim_word(taken->message.position, 0, IVSHMEM_CLAIM_AGAIN, 0)))
        return IVSHMEM_OVERTAKEN;
    ivshmem_wake_readers(reader->member, channel, 1, &reader->rung_readers);
    return 0;
}

/* Copy the next message out, at most once. */
static inline int ivshmem_queue_read(struct ivshmem_reader *reader, int thorough, void *data,
                                     uint32_t room, struct ivshmem_taken *taken)
{
    int code = ivshmem_queue_take(reader, IVSHMEM_CLAIM_ONCE, thorough, taken);
    if (code != 0)
        return code;
    if (taken->message.length > room) {
        ivshmem_queue_return(reader, taken);
        return IVSHMEM_TOO_LONG;
    }
    ivshmem_copy_payload(data, reader->channel->area.memory.start + taken->message.offset,
                         taken->message.length);
    return ivshmem_queue_done(reader, taken);
}

/* Whether there is something that a reader may take. */
static inline int ivshmem_queue_has_more(const struct ivshmem_reader *reader)
{
    const struct ivshmem_channel *channel = reader->channel;
    for (unsigned i = 0; i < channel->record.geometry.writers; i++) {
        uint64_t newest = ivshmem_value(ivshmem_head(channel, i));
        for (uint64_t slot = 0; slot < channel->record.geometry.slots; slot++) {
            uint64_t claim = ivshmem_get(channel, ivshmem_claim_at(channel, i, slot));
            if (ivshmem_claim_is_published(newest, claim) && ivshmem_queue_may(reader, claim, 1))
                return 1;
        }
    }
    return 0;
}

/* Before a reader that found nothing sleeps; 0: there is something now, so that it need not. It
 * calls ivshmem_queue_awake in any case, before it looks again. */
static inline int ivshmem_queue_sleep(struct ivshmem_reader *reader)
{
    ivshmem_sleep_begin(reader->channel, &reader->sleep);
    return ivshmem_queue_has_more(reader) ? 0 : IVSHMEM_AGAIN;
}

/* After a sleep, before the next look. A writer rings one reader for each message. A reader that was
 * rung, or may have been, calls ivshmem_queue_pass_on afterwards, so that a message that it does not
 * take wakes another reader. */
static inline void ivshmem_queue_awake(struct ivshmem_reader *reader)
{
    ivshmem_sleep_end(reader->channel, &reader->sleep);
}

/* After what followed a sleep: a message that was taken, or a wait that ended without one. */
static inline void ivshmem_queue_pass_on(struct ivshmem_reader *reader)
{
    ivshmem_full_fence(&reader->channel->area.memory);
    if (ivshmem_queue_has_more(reader))
        ivshmem_wake_readers(reader->member, reader->channel, 1, &reader->rung_readers);
}

#endif
