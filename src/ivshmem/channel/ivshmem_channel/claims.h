/* Claims: which reader has a message of a queue, or a call.
 */
#ifndef IVSHMEM_CHANNEL_CLAIMS_H
#define IVSHMEM_CHANNEL_CLAIMS_H

#include "entries.h"

/* In a queue, and in a channel of calls, each position of a writer has a claim, which the readers
 * (for calls: the servers) compare-exchange:
 *
 *     low 28 bits of the position | reader's slot (12) | enum ivshmem_claim | epoch of the reader; of
 *                                                     the writer, if the claim is open; or 0
 *
 * Only the writer changes IVSHMEM_CLAIM_NONE.
 */
enum ivshmem_claim {
    IVSHMEM_CLAIM_NONE = 0,    /* never used, or done: the writer may use it */
    IVSHMEM_CLAIM_OPEN = 1,    /* published, and not taken */
    IVSHMEM_CLAIM_AGAIN = 2,   /* the same, and a reader had it before */
    IVSHMEM_CLAIM_TAKEN = 3,   /* a reader has it until it says that it is done: at least once */
    IVSHMEM_CLAIM_ONCE = 4,    /* a reader copies it: at most once */
    IVSHMEM_CLAIM_REPLIED = 5  /* the reply to this call is there */
};

static inline int ivshmem_has_claims(const struct ivshmem_channel *channel)
{
    return channel->record.geometry.kind == IVSHMEM_QUEUE ||
           channel->record.geometry.kind == IVSHMEM_CALLS;
}

static inline uint64_t ivshmem_claim_word(uint64_t position, unsigned reader,
                                          enum ivshmem_claim claim, unsigned epoch)
{
    return ivshmem_word((position & 0xfffffffu) << 12 | (reader & 0xfffu), (unsigned)claim, epoch);
}

static inline int ivshmem_claim_is_of(uint64_t claim, uint64_t position)
{
    return ivshmem_value(claim) >> 12 == (position & 0xfffffffu);
}

static inline uint64_t ivshmem_claim_at(const struct ivshmem_channel *channel, unsigned writer,
                                        uint64_t position)
{
    uint64_t slots = channel->record.geometry.slots;
    return channel->layout.claims + ivshmem_rounded(8u * slots, IVSHMEM_CACHE_LINE) * writer +
           8u * (position & (slots - 1));
}

static inline int ivshmem_claim_exchange(const struct ivshmem_channel *channel, uint64_t at,
                                         uint64_t expected, uint64_t desired)
{
    return ivshmem_exchange(&channel->area.memory, channel->at + at, expected, desired);
}

/* The last position before the head that can be a claim's. A message that readers had for long may
 * be older: its entry has the whole position. */
static inline uint64_t ivshmem_claim_position(uint64_t head, uint64_t claim)
{
    uint64_t before = (head - 1 - (ivshmem_value(claim) >> 12)) & 0xfffffffu;
    return (head - 1 - before) & IVSHMEM_VALUE_MASK;
}

/* Whether the head has passed a claim, which is not IVSHMEM_CLAIM_NONE; else its message is not
 * published. A reader takes a claim only after that. The age of what a reader has, or had, tells
 * nothing: the writer may have passed over it for any number of messages. But no writer passes over
 * an open claim, so that its age is at most `slots`. */
static inline int ivshmem_claim_is_published(uint64_t head, uint64_t claim)
{
    return ivshmem_flags(claim) != IVSHMEM_CLAIM_OPEN ||
           ivshmem_ahead(head, ivshmem_claim_position(head, claim)) <= IVSHMEM_MOST_SLOTS;
}

/* The owner word of the reader's slot that a claim names; 0: there is no such slot. */
static inline uint64_t ivshmem_claimer_owner(const struct ivshmem_channel *channel, uint64_t claim)
{
    unsigned reader = (unsigned)ivshmem_value(claim) & 0xfffu;
    return reader < channel->record.geometry.readers ? ivshmem_reader_owner(channel, reader) : 0;
}

/* The place of the reader that has a claim; one that is gone, if its slot has another owner. */
static inline struct ivshmem_place ivshmem_claimer(const struct ivshmem_channel *channel,
                                                   uint64_t claim)
{
    const struct ivshmem_place gone = {~0u, 0};
    uint64_t owner = ivshmem_claimer_owner(channel, claim);
    if (ivshmem_flags(owner) != IVSHMEM_SLOT_OPEN || ivshmem_epoch(owner) != ivshmem_epoch(claim))
        return gone;
    return ivshmem_place_of(owner);
}

/* Whether a claim of a writer that closed or is gone needs no reader any more. A message that a
 * reader was copying (at most once) when it ended is lost; a reply that came too late is dropped.
 *
 * `owner` is the writer's owner word, as it was found. Another process may free the slot while this one
 * stands still, and a new owner may take it. So the word is looked at again: what was read of the claim
 * before is the former owner's. A new owner's claims have other epochs: no exchange meets them. */
static inline int ivshmem_claim_ends(const struct ivshmem_channel *channel, unsigned writer,
                                     uint64_t position, uint64_t owner)
{
    uint64_t at = ivshmem_claim_at(channel, writer, position);
    uint64_t claim = ivshmem_get(channel, at);
    unsigned state = ivshmem_flags(claim);
    int is_call = channel->record.geometry.kind == IVSHMEM_CALLS;
    if (state == IVSHMEM_CLAIM_NONE)
        return 1;
    if (state == IVSHMEM_CLAIM_REPLIED || (is_call && state == IVSHMEM_CLAIM_OPEN) ||
        !ivshmem_claim_is_published(ivshmem_value(ivshmem_head(channel, writer)), claim) ||
        ((state == IVSHMEM_CLAIM_ONCE || (is_call && state == IVSHMEM_CLAIM_TAKEN)) &&
         ivshmem_is_gone(&channel->area, ivshmem_claimer(channel, claim))))
        return ivshmem_writer_owner(channel, writer) == owner &&
               ivshmem_claim_exchange(channel, at, claim,
                                      ivshmem_claim_word(position, 0, IVSHMEM_CLAIM_NONE, 0));
    return 0;
}

#endif
