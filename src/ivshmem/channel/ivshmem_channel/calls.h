/* Calls: a message of a queue, and a reply.
 */
#ifndef IVSHMEM_CHANNEL_CALLS_H
#define IVSHMEM_CHANNEL_CALLS_H

#include "queue.h"

/* A call is a message of a queue whose reader, the server, writes a reply into a second cell. The
 * caller is an ivshmem_writer: ivshmem_queue_ready, ivshmem_queue_publish. A call is never given to
 * a second server: what a server that ended had begun is not repeated.
 *
 * The word beside each claim of a call: the reply's length (31 bits) | status (4) | epoch of the
 * server's slot.
 */
static inline uint64_t ivshmem_reply_word_at(const struct ivshmem_channel *channel,
                                             unsigned caller, uint64_t position)
{
    return channel->layout.replies + ivshmem_claim_at(channel, caller, position) -
           channel->layout.claims;
}

/* Where the reply to a call goes: an offset in the region, of as many bytes as the limit. */
static inline uint64_t ivshmem_reply_offset(const struct ivshmem_channel *channel, unsigned caller,
                                            uint64_t position)
{
    uint64_t slots = channel->record.geometry.slots;
    return channel->at + ivshmem_cell_at(channel, caller,
                                         (uint32_t)(channel->layout.cells_each / 2 +
                                                    (position & (slots - 1))));
}

/* Send the reply, which stands in its cell. IVSHMEM_OVERTAKEN: the caller is gone. */
static inline int ivshmem_reply(struct ivshmem_reader *server, const struct ivshmem_taken *call,
                                uint32_t length, unsigned status)
{
    struct ivshmem_channel *channel = server->channel;
    unsigned caller = call->message.writer;
    uint64_t position = call->message.position;
    if (length > channel->record.geometry.limit)
        return IVSHMEM_TOO_LONG;
    ivshmem_announce(&channel->area.memory,
                     channel->at + ivshmem_reply_word_at(channel, caller, position),
                     ivshmem_word(length, status, server->epoch));
    if (!ivshmem_claim_exchange(channel, call->claim_at, call->claim,
                                ivshmem_claim_word(position, server->slot, IVSHMEM_CLAIM_REPLIED,
                                                   server->epoch)))
        return IVSHMEM_OVERTAKEN;
    ivshmem_full_fence(&channel->area.memory);
    ivshmem_wake_one(server->member, channel, ivshmem_writer_owner_at(channel, caller),
                     channel->layout.writer_sleepers + 8u * caller, &server->rung.words[caller]);
    return 0;
}

/* Whether a call has neither a reply nor lost its server, by one look: for a caller that spins. */
static inline int ivshmem_call_waits(const struct ivshmem_writer *caller, uint64_t position)
{
    uint64_t claim =
        ivshmem_get(caller->channel, ivshmem_claim_at(caller->channel, caller->slot, position));
    return ivshmem_flags(claim) == IVSHMEM_CLAIM_OPEN || ivshmem_flags(claim) == IVSHMEM_CLAIM_TAKEN;
}

/* Look at a call. 0: the reply is there; after it was copied, ivshmem_call_end. IVSHMEM_AGAIN: not
 * yet. IVSHMEM_CLOSED: its server is gone, whether it did the work or not; the call is over. */
static inline int ivshmem_call_look(struct ivshmem_writer *caller, uint64_t position,
                                    uint32_t *length, unsigned *status)
{
    struct ivshmem_channel *channel = caller->channel;
    uint64_t at = ivshmem_claim_at(channel, caller->slot, position);
    uint64_t claim = ivshmem_get(channel, at), word;
    unsigned state = ivshmem_flags(claim);
    if (!ivshmem_claim_is_of(claim, position) || state == IVSHMEM_CLAIM_NONE)
        return ivshmem_corrupt(channel, "claim", at, claim,
                               ivshmem_writer_owner(channel, caller->slot));
    if (state == IVSHMEM_CLAIM_TAKEN &&
        ivshmem_is_gone(&channel->area, ivshmem_claimer(channel, claim)))
        return ivshmem_claim_exchange(channel, at, claim,
                                      ivshmem_claim_word(position, 0, IVSHMEM_CLAIM_NONE, 0))
                   ? IVSHMEM_CLOSED
                   : IVSHMEM_AGAIN;
    if (state != IVSHMEM_CLAIM_REPLIED)
        return IVSHMEM_AGAIN;
    ivshmem_load_barrier(&channel->area.memory);
    word = ivshmem_get(channel, ivshmem_reply_word_at(channel, caller->slot, position));
    if (ivshmem_epoch(word) != ivshmem_epoch(claim) ||
        ivshmem_value(word) > channel->record.geometry.limit)
        return ivshmem_corrupt(channel, "reply",
                               ivshmem_reply_word_at(channel, caller->slot, position), word,
                               ivshmem_claimer_owner(channel, claim));
    *length = (uint32_t)ivshmem_value(word);
    *status = ivshmem_flags(word);
    return 0;
}

/* End a call: its reply was read, or the caller gives up. Returns whether the slot is free. If not,
 * a server works on the call, and the caller must ask again later. `never`: no server has begun. */
static inline int ivshmem_call_end(struct ivshmem_writer *caller, uint64_t position, int *never)
{
    const struct ivshmem_channel *channel = caller->channel;
    uint64_t at = ivshmem_claim_at(channel, caller->slot, position);
    for (unsigned tries = 0; tries < 4; tries++) {
        uint64_t claim = ivshmem_get(channel, at);
        unsigned state = ivshmem_flags(claim);
        *never = 0;
        if (!ivshmem_claim_is_of(claim, position) || state == IVSHMEM_CLAIM_NONE)
            return 1;
        if (state == IVSHMEM_CLAIM_TAKEN &&
            !ivshmem_is_gone(&channel->area, ivshmem_claimer(channel, claim)))
            return 0;
        *never = state == IVSHMEM_CLAIM_OPEN;
        if (ivshmem_claim_exchange(channel, at, claim,
                                   ivshmem_claim_word(position, 0, IVSHMEM_CLAIM_NONE, 0)))
            return 1;
    }
    return 0;
}

#endif
