/* Slots: who has which role in a channel; sleeping and waking.
 *
 * Knows: owner words, sleeper words. Does not know: messages.
 *
 * Invariants: a ring is sent only to a slot that says that it sleeps, and once for each sleep. It is
 * never relied upon: a sleeper looks again at each beat.
 */
#ifndef IVSHMEM_CHANNEL_SLOTS_H
#define IVSHMEM_CHANNEL_SLOTS_H

#include "records.h"

/* The owner word of a slot: place (32 bits) | enum ivshmem_slot | the slot's epoch. */
enum ivshmem_slot {
    IVSHMEM_SLOT_FREE = 0,
    IVSHMEM_SLOT_OPEN = 1,
    IVSHMEM_SLOT_CLOSING = 2 /* a writer that writes no more; what it wrote is still read */
};

static inline uint64_t ivshmem_get(const struct ivshmem_channel *channel, uint64_t offset)
{
    return ivshmem_load(&channel->area.memory, channel->at + offset);
}

static inline uint64_t ivshmem_writer_owner_at(const struct ivshmem_channel *channel, unsigned slot)
{
    return channel->layout.writer_owners + 8u * slot;
}

static inline uint64_t ivshmem_reader_owner_at(const struct ivshmem_channel *channel, unsigned slot)
{
    return channel->layout.reader_owners + 8u * slot;
}

static inline uint64_t ivshmem_writer_owner(const struct ivshmem_channel *channel, unsigned slot)
{
    return ivshmem_get(channel, ivshmem_writer_owner_at(channel, slot));
}

static inline uint64_t ivshmem_reader_owner(const struct ivshmem_channel *channel, unsigned slot)
{
    return ivshmem_get(channel, ivshmem_reader_owner_at(channel, slot));
}

/* Whether a slot's owner is there, at work or silent. */
static inline int ivshmem_is_owned(const struct ivshmem_channel *channel, uint64_t owner)
{
    return ivshmem_flags(owner) == IVSHMEM_SLOT_OPEN &&
           !ivshmem_is_gone(&channel->area, ivshmem_place_of(owner));
}

/* Free a slot whose owner word is this one; whether this process did it. */
static inline int ivshmem_slot_free(const struct ivshmem_channel *channel, uint64_t at,
                                    uint64_t owner)
{
    return ivshmem_exchange(&channel->area.memory, channel->at + at, owner,
                            ivshmem_word(0, IVSHMEM_SLOT_FREE, ivshmem_epoch(owner)));
}

/* Whether the channel is still the one that was opened. A process that takes a slot asks this
 * afterwards. A process that removes a channel changes the record first, and looks at the slots
 * afterwards. So one of the two sees the other. */
static inline int ivshmem_is_there(const struct ivshmem_channel *channel)
{
    ivshmem_full_fence(&channel->area.memory);
    return ivshmem_load(&channel->area.memory,
                        ivshmem_record_at(&channel->area, channel->record.index)) ==
           channel->record.state;
}

/* Take a slot whose owner word is this one. IVSHMEM_TAKEN: another process was faster.
 *
 * IVSHMEM_CLOSED: another process removes the channel. It may find this owner and let the channel be,
 * so the slot is given back. */
static inline int ivshmem_slot_take(const struct ivshmem_channel *channel, uint64_t at,
                                    uint64_t owner, uint64_t mine)
{
    if (!ivshmem_exchange(&channel->area.memory, channel->at + at, owner, mine))
        return IVSHMEM_TAKEN;
    if (ivshmem_is_there(channel))
        return 0;
    ivshmem_slot_free(channel, at, mine);
    return IVSHMEM_CLOSED;
}

/* Where the owner word of a connection's end is: 0 is the caller's, 1 the acceptor's. */
static inline uint64_t ivshmem_end_owner_at(const struct ivshmem_channel *channel,
                                            unsigned connection, unsigned end)
{
    return channel->layout.heads + (uint64_t)IVSHMEM_CONNECTION_BYTES * connection + 8u * end;
}

static inline int ivshmem_has_owner(const struct ivshmem_channel *channel, uint64_t at)
{
    uint64_t owner = ivshmem_get(channel, at);
    return ivshmem_flags(owner) != IVSHMEM_SLOT_FREE &&
           !ivshmem_is_gone(&channel->area, ivshmem_place_of(owner));
}

/* Whether some slot's owner is not proven to be gone. */
static inline int ivshmem_is_in_use(const struct ivshmem_channel *channel)
{
    const struct ivshmem_geometry *g = &channel->record.geometry;
    int of_bytes = g->kind == IVSHMEM_BYTES;
    for (unsigned i = 0; i < g->readers; i++)
        if (ivshmem_has_owner(channel, ivshmem_reader_owner_at(channel, i)))
            return 1;
    for (unsigned i = 0; i < (of_bytes ? 0 : g->writers); i++)
        if (ivshmem_has_owner(channel, ivshmem_writer_owner_at(channel, i)))
            return 1;
    for (unsigned i = 0; i < (of_bytes ? 2u * g->writers : 0); i++)
        if (ivshmem_has_owner(channel, ivshmem_end_owner_at(channel, i / 2, i % 2)))
            return 1;
    return 0;
}

/* Remove a channel. IVSHMEM_TAKEN: it is in use, and `force` is 0. With `force` the user guarantees
 * that no process stores into its memory any more. */
static inline int ivshmem_remove(const struct ivshmem_member *member,
                                 const struct ivshmem_channel *channel, int force)
{
    const struct ivshmem_memory *memory = &member->area.memory;
    uint64_t at = ivshmem_record_at(&member->area, channel->record.index);
    uint64_t ready = channel->record.state;
    uint64_t removing =
        ivshmem_place_word(member->place, IVSHMEM_REMOVING, ivshmem_epoch(ready));
    if (!force && ivshmem_is_in_use(channel) &&
        (ivshmem_prove_places(member) == 0 || ivshmem_is_in_use(channel)))
        return IVSHMEM_TAKEN;
    if (!ivshmem_exchange(memory, at, ready, removing))
        return IVSHMEM_NOT_FOUND;
    ivshmem_full_fence(memory);
    if (!force && ivshmem_is_in_use(channel)) {
        ivshmem_exchange(memory, at, removing, ready);
        return IVSHMEM_TAKEN;
    }
    ivshmem_record_free(&member->area, channel->record.index, removing);
    return 0;
}

static inline int ivshmem_corrupt(struct ivshmem_channel *channel, const char *word,
                                  uint64_t offset, uint64_t seen, uint64_t owner)
{
    channel->fault.word = word;
    channel->fault.offset = channel->at + offset;
    channel->fault.seen = seen;
    channel->fault.owner = owner;
    return IVSHMEM_CORRUPT;
}

#define IVSHMEM_SLEEPING 1u
/* With it, of a connection's end: it waits for no room. What only makes room does not ring it. */
#define IVSHMEM_HAS_ROOM 2u

/* What one end of a channel remembers of the sleepers that it rang, so that it rings each sleep
 * once: the sleeper words as it saw them then. */
struct ivshmem_rung {
    uint64_t words[IVSHMEM_MOST_READERS];
};

static inline void ivshmem_rung_begin(struct ivshmem_rung *rung)
{
    for (unsigned i = 0; i < IVSHMEM_MOST_READERS; i++)
        rung->words[i] = 0;
}

/* Ring the owner of a slot, if it sleeps and was not yet rung in this sleep; whether that wakes it.
 * `rung` is the sleeper word as it was when this end rang it last. */
static inline int ivshmem_wake_one(const struct ivshmem_member *member,
                                   const struct ivshmem_channel *channel, uint64_t owner_at,
                                   uint64_t sleeper_at, uint64_t *rung)
{
    uint64_t sleeper = ivshmem_get(channel, sleeper_at), owner, peer;
    struct ivshmem_place place;
    if (!(ivshmem_flags(sleeper) & IVSHMEM_SLEEPING) || sleeper == *rung)
        return 0;
    owner = ivshmem_get(channel, owner_at);
    place = ivshmem_place_of(owner);
    if (!ivshmem_is_owned(channel, owner) || ivshmem_epoch(owner) != ivshmem_epoch(sleeper))
        return 0;
    *rung = sleeper;
    peer = ivshmem_peer_at(&channel->area, place.index);
    if (peer == IVSHMEM_NO_PEER)
        return 0;
    ivshmem_ring_peer(member, peer);
    /* A ring to a process that may have ended does not count: another one is rung as well. */
    return (peer & IVSHMEM_PEER_MUTE) != 0 || !ivshmem_is_silent(member, place);
}

/* Ring the owners of those slots that sleep, at most `most`. A full fence stands before. */
static inline void ivshmem_wake(const struct ivshmem_member *member,
                                const struct ivshmem_channel *channel, uint64_t owners,
                                uint64_t sleepers, unsigned slots, unsigned most,
                                struct ivshmem_rung *rung)
{
    uint64_t any = 0;
    for (unsigned i = 0; i < slots; i++)
        any |= ivshmem_get(channel, sleepers + 8u * i);
    if (!(ivshmem_flags(any) & IVSHMEM_SLEEPING))
        return;
    for (unsigned i = 0; i < slots && most > 0; i++)
        most -= (unsigned)ivshmem_wake_one(member, channel, owners + 8u * i, sleepers + 8u * i,
                                           &rung->words[i]);
}

/* The same for the readers, or the writers, of a channel. */
static inline void ivshmem_wake_readers(const struct ivshmem_member *member,
                                        const struct ivshmem_channel *channel, unsigned most,
                                        struct ivshmem_rung *rung)
{
    ivshmem_full_fence(&channel->area.memory);
    ivshmem_wake(member, channel, channel->layout.reader_owners, channel->layout.reader_sleepers,
                 channel->record.geometry.readers, most, rung);
}

static inline void ivshmem_wake_writers(const struct ivshmem_member *member,
                                        const struct ivshmem_channel *channel,
                                        struct ivshmem_rung *rung)
{
    ivshmem_full_fence(&channel->area.memory);
    ivshmem_wake(member, channel, channel->layout.writer_owners, channel->layout.writer_sleepers,
                 channel->record.geometry.writers, IVSHMEM_MOST_WRITERS, rung);
}

/* Whether a process of this machine that cannot say that it sleeps is nevertheless rung: each
 * writer is a process of this machine, which knows all peers, and rings them always. */
static inline int ivshmem_is_rung_always(const struct ivshmem_member *member,
                                         const struct ivshmem_channel *channel)
{
    const struct ivshmem_memory *memory = &channel->area.memory;
    if (!(channel->record.geometry.options & IVSHMEM_RING_ALWAYS))
        return 0;
    for (unsigned i = 0; i < channel->record.geometry.writers; i++) {
        uint64_t owner = ivshmem_writer_owner(channel, i);
        unsigned index = ivshmem_place_of(owner).index;
        uint64_t machine;
        if (!ivshmem_is_owned(channel, owner))
            continue;
        machine = ivshmem_load(memory, ivshmem_place_at(&channel->area, index) +
                                           IVSHMEM_PLACE_MACHINE);
        if (ivshmem_peer_at(&channel->area, index) & IVSHMEM_PEER_MUTE ||
            ivshmem_value(machine) != member->machine)
            return 0;
    }
    return 1;
}

/* A slot that sleeps, or not. */
struct ivshmem_sleep {
    uint64_t at; /* of its sleeper word, in the channel */
    uint64_t count;
    unsigned epoch;
    unsigned more; /* IVSHMEM_HAS_ROOM, or 0 */
};

/* Take a free slot among those of readers (for bytes: of listeners). */
static inline int ivshmem_take_reader_slot(const struct ivshmem_channel *channel,
                                      const struct ivshmem_member *member, unsigned *slot,
                                      unsigned *epoch, struct ivshmem_sleep *sleep)
{
    for (unsigned i = 0; i < channel->record.geometry.readers; i++) {
        uint64_t at = ivshmem_reader_owner_at(channel, i);
        uint64_t owner = ivshmem_get(channel, at);
        int code;
        if (ivshmem_is_owned(channel, owner))
            continue;
        *epoch = (ivshmem_epoch(owner) + 1) & IVSHMEM_EPOCH_MASK;
        code = ivshmem_slot_take(channel, at, owner,
                                 ivshmem_place_word(member->place, IVSHMEM_SLOT_OPEN, *epoch));
        if (code == IVSHMEM_TAKEN)
            continue;
        if (code != 0)
            return code;
        *slot = i;
        sleep->at = channel->layout.reader_sleepers + 8u * i;
        sleep->epoch = *epoch;
        sleep->count = ivshmem_value(ivshmem_get(channel, sleep->at));
        sleep->more = 0;
        return 0;
    }
    return IVSHMEM_TAKEN;
}

/* The same. If all have owners, some of these may have ended. */
static inline int ivshmem_reader_slot(const struct ivshmem_channel *channel,
                                      const struct ivshmem_member *member, unsigned *slot,
                                      unsigned *epoch, struct ivshmem_sleep *sleep)
{
    int code = ivshmem_take_reader_slot(channel, member, slot, epoch, sleep);
    if (code == IVSHMEM_TAKEN && ivshmem_prove_places(member) > 0)
        code = ivshmem_take_reader_slot(channel, member, slot, epoch, sleep);
    return code;
}

/* Say that one sleeps. A full fence comes next (one is enough for several that say it), and then
 * the caller looks once more whether there is something. */
static inline void ivshmem_sleep_say(const struct ivshmem_channel *channel,
                                     struct ivshmem_sleep *sleep)
{
    sleep->count++;
    ivshmem_announce(&channel->area.memory, channel->at + sleep->at,
                     ivshmem_word(sleep->count, IVSHMEM_SLEEPING | sleep->more, sleep->epoch));
}

/* The same, with the fence. */
static inline void ivshmem_sleep_begin(const struct ivshmem_channel *channel,
                                       struct ivshmem_sleep *sleep)
{
    ivshmem_sleep_say(channel, sleep);
    ivshmem_full_fence(&channel->area.memory);
}

static inline void ivshmem_sleep_end(const struct ivshmem_channel *channel,
                                     struct ivshmem_sleep *sleep)
{
    ivshmem_announce(&channel->area.memory, channel->at + sleep->at,
                     ivshmem_word(sleep->count, 0, sleep->epoch));
}

#endif
