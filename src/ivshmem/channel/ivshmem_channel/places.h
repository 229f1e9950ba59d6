/* Places: which processes take part, and which of them are at work, silent or gone.
 *
 * Knows: joining, beats, proofs. Does not know: channels.
 *
 * Invariants: a place is freed by its owner, by a proof, or by a user's word, and never because it is
 * silent, except one that has not finished joining: that one has stored nothing outside its entry.
 */
#ifndef IVSHMEM_CHANNEL_PLACES_H
#define IVSHMEM_CHANNEL_PLACES_H

#include "area.h"

/* What the user of this header supplies. None of these may be NULL, except `ended`. */
struct ivshmem_user {
    void *context;
    /* Ring a peer's vector; of IVSHMEM_EVERY_PEER: that of each peer that one knows. It must not
     * wait, whatever other peers did to the doorbell. */
    void (*ring)(void *context, unsigned peer, unsigned vector);
    int64_t (*now)(void *context); /* nanoseconds of a clock that never goes back */
    /* Whether the process of this machine is known to have ended; NULL: unknown. */
    int (*ended)(void *context, uint64_t process, uint64_t started);
};

/* A place, 128 bytes: one process that takes part, known by its index and its epoch.
 *
 *      0  number   (compare-exchange) 40 random bits | IVSHMEM_JOINING, then IVSHMEM_LIVE | epoch;
 *                  value 0: free
 *      8  peer     id (16) | vector (16) << 16: whom to ring; or IVSHMEM_PEER_MUTE: it has no
 *               interrupts, and looks at the memory again and again
 *     16  machine  which kernel and PID namespace, as a hash; 0: unknown
 *     24  process  its PID there, and
 *     32  started  when it started: what proves its end, on that machine
 *     64  beat     a count; a place whose beat stands still for the lease is silent
 *     72  name     for people; never trusted
 */
#define IVSHMEM_PLACE_NUMBER 0u
#define IVSHMEM_PLACE_PEER 8u
#define IVSHMEM_PLACE_MACHINE 16u
#define IVSHMEM_PLACE_PROCESS 24u
#define IVSHMEM_PLACE_STARTED 32u
#define IVSHMEM_PLACE_BEAT 64u
#define IVSHMEM_PLACE_NAME 72u
#define IVSHMEM_NAME_WORDS 4u
#define IVSHMEM_PEER_MUTE (UINT64_C(1) << 32)
#define IVSHMEM_EVERY_PEER 0xffffffffu
#define IVSHMEM_NO_PEER (~UINT64_C(0))
#define IVSHMEM_LIVE 1u
#define IVSHMEM_JOINING 2u /* it has stored nothing outside this entry, and must still confirm it */

/* A place as slots name it: 12 bits of index, 20 of epoch. */
struct ivshmem_place {
    unsigned index, epoch;
};

/* What this process saw of another place's beat. */
struct ivshmem_pulse {
    uint64_t beat;
    int64_t since;
};

/* One process's membership. The pulses are the user's memory: one for each place of the area. */
struct ivshmem_member {
    struct ivshmem_area area;
    struct ivshmem_user user;
    struct ivshmem_place place;
    struct ivshmem_pulse *pulses;
    uint64_t number, peer, machine, process, started; /* what it stores of itself */
    uint64_t beats;
    int64_t lease;  /* nanoseconds */
    int64_t looked; /* when it last looked at the others */
};

static inline uint64_t ivshmem_place_at(const struct ivshmem_area *area, unsigned index)
{
    return area->places_at + (uint64_t)index * IVSHMEM_PLACE_BYTES;
}

/* Whether a place is gone: its entry is free, or another's. Sure, since only proof frees one. */
static inline int ivshmem_is_gone(const struct ivshmem_area *area, struct ivshmem_place place)
{
    uint64_t number;
    if (place.index >= area->places)
        return 1;
    number = ivshmem_load(&area->memory, ivshmem_place_at(area, place.index));
    return ivshmem_flags(number) != IVSHMEM_LIVE || ivshmem_epoch(number) != place.epoch;
}

/* Free an entry of the table of places, if `number` is still there. */
static inline int ivshmem_place_free(const struct ivshmem_area *area, unsigned index,
                                     uint64_t number)
{
    return ivshmem_exchange(&area->memory, ivshmem_place_at(area, index), number,
                            ivshmem_word(0, 0, ivshmem_epoch(number)));
}

/* Whom to ring for the process in an entry of the table: id | vector << 16, with IVSHMEM_PEER_MUTE if
 * it looks by itself. IVSHMEM_NO_PEER, which is mute, too: no process is there, or a late store of a
 * former one spoiled the word. */
static inline uint64_t ivshmem_peer_at(const struct ivshmem_area *area, unsigned index)
{
    uint64_t at = ivshmem_place_at(area, index);
    uint64_t number = ivshmem_load(&area->memory, at);
    uint64_t peer = ivshmem_load(&area->memory, at + IVSHMEM_PLACE_PEER);
    return ivshmem_flags(number) == IVSHMEM_LIVE && ivshmem_epoch(peer) == ivshmem_epoch(number)
               ? ivshmem_value(peer)
               : IVSHMEM_NO_PEER;
}

static inline void ivshmem_ring_peer(const struct ivshmem_member *member, uint64_t peer)
{
    if (!(peer & IVSHMEM_PEER_MUTE))
        member->user.ring(member->user.context, (unsigned)peer & 0xffffu,
                          (unsigned)(peer >> 16) & 0xffffu);
}

/* Ring each other process that is at work. A process that freed a place does that: the others may wait
 * for what the former owner had. Each of them also looks once a beat. */
static inline void ivshmem_ring_places(const struct ivshmem_member *member)
{
    for (unsigned index = 0; index < member->area.places; index++)
        if (index != member->place.index)
            ivshmem_ring_peer(member, ivshmem_peer_at(&member->area, index));
}

/* Whether this process can prove that a place is gone; it frees the place then. */
static inline int ivshmem_place_prove(const struct ivshmem_member *member, unsigned index)
{
    const struct ivshmem_memory *memory = &member->area.memory;
    uint64_t at = ivshmem_place_at(&member->area, index);
    uint64_t number = ivshmem_load(memory, at);
    uint64_t machine = ivshmem_load(memory, at + IVSHMEM_PLACE_MACHINE);
    uint64_t process = ivshmem_load(memory, at + IVSHMEM_PLACE_PROCESS);
    uint64_t started = ivshmem_load(memory, at + IVSHMEM_PLACE_STARTED);
    unsigned epoch = ivshmem_epoch(number);
    if (ivshmem_value(number) == 0)
        return 1;
    if (ivshmem_flags(number) != IVSHMEM_LIVE || ivshmem_epoch(machine) != epoch ||
        ivshmem_epoch(process) != epoch || ivshmem_epoch(started) != epoch)
        return 0; /* it joins, or a late store spoiled a word until its next beat */
    if (member->machine == 0 || ivshmem_value(machine) != member->machine ||
        member->user.ended == NULL ||
        !member->user.ended(member->user.context, ivshmem_value(process), ivshmem_value(started)))
        return 0;
    /* If another process has freed it already, that is as good. */
    ivshmem_place_free(&member->area, index, number);
    return 1;
}

/* Free each place that this process can prove to be gone, and ring the others then; how many it freed.
 *
 * A beat does the same when a place has been silent for the lease. What finds that all is taken does it
 * at once, so that a process which takes the part of one that was killed need not wait for that.
 */
static inline int ivshmem_prove_places(const struct ivshmem_member *member)
{
    int freed = 0;
    for (unsigned index = 0; index < member->area.places; index++) {
        uint64_t number =
            ivshmem_load(&member->area.memory, ivshmem_place_at(&member->area, index));
        if (ivshmem_value(number) != 0 && number != member->number)
            freed += ivshmem_place_prove(member, index);
    }
    if (freed > 0)
        ivshmem_ring_places(member);
    return freed;
}

/* Store the words of a place. Repeat it at each beat: a late store of a former owner may have
 * overwritten one. */
static inline void ivshmem_place_store(const struct ivshmem_member *member)
{
    const struct ivshmem_memory *memory = &member->area.memory;
    uint64_t at = ivshmem_place_at(&member->area, member->place.index);
    unsigned epoch = member->place.epoch;
    ivshmem_store(memory, at + IVSHMEM_PLACE_PEER, ivshmem_word(member->peer, 0, epoch));
    ivshmem_store(memory, at + IVSHMEM_PLACE_MACHINE, ivshmem_word(member->machine, 0, epoch));
    ivshmem_store(memory, at + IVSHMEM_PLACE_PROCESS, ivshmem_word(member->process, 0, epoch));
    ivshmem_store(memory, at + IVSHMEM_PLACE_STARTED, ivshmem_word(member->started, 0, epoch));
    ivshmem_announce(memory, at + IVSHMEM_PLACE_BEAT, ivshmem_word(member->beats, 0, epoch));
}

/* Join: take a place.
 *
 * The caller has set area, user, pulses (zeros), lease, peer (as in the table), machine, process
 * and started; each of the last three has at most 40 bits.
 * `random` must be drawn anew for each call, as from getrandom(2). IVSHMEM_TAKEN: no place is free,
 * and none is proven to be gone.
 */
static inline int ivshmem_join(struct ivshmem_member *member, uint64_t random, const char *name)
{
    const struct ivshmem_area *area = &member->area;
    const struct ivshmem_memory *memory = &area->memory;
    uint64_t value = (random & IVSHMEM_VALUE_MASK) != 0 ? random & IVSHMEM_VALUE_MASK : 1;
    uint64_t joining;
    int freed = 0;
    if (memory->readonly)
        return IVSHMEM_READ_ONLY;
    for (unsigned index = 0; index < area->places; index++) {
        uint64_t at = ivshmem_place_at(area, index);
        uint64_t number = ivshmem_load(memory, at);
        if (ivshmem_value(number) != 0) {
            if (!ivshmem_place_prove(member, index))
                continue;
            freed = 1;
            number = ivshmem_load(memory, at);
            if (ivshmem_value(number) != 0)
                continue;
        }
        member->place.index = index;
        member->place.epoch = (ivshmem_epoch(number) + 1) & IVSHMEM_EPOCH_MASK;
        joining = ivshmem_word(value, IVSHMEM_JOINING, member->place.epoch);
        if (!ivshmem_exchange(memory, at, number, joining))
            continue;
        member->beats = 0;
        for (unsigned i = 0, ended = 0; i < IVSHMEM_NAME_WORDS; i++) {
            uint64_t text = 0;
            for (unsigned j = 0; j < 8 && !ended; j++) {
                ended = name[8u * i + j] == 0;
                text |= (uint64_t)(unsigned char)name[8u * i + j] << 8u * j;
            }
            ivshmem_store(memory, at + IVSHMEM_PLACE_NAME + 8u * i, text);
        }
        ivshmem_place_store(member);
        member->number = ivshmem_word(value, IVSHMEM_LIVE, member->place.epoch);
        if (ivshmem_exchange(memory, at, joining, member->number)) {
            if (freed)
                ivshmem_ring_places(member);
            return 0;
        } /* else this took longer than a lease, and another process freed the place */
    }
    return IVSHMEM_TAKEN;
}

/* Give the place back. The slots were closed before. */
static inline void ivshmem_leave_area(struct ivshmem_member *member)
{
    ivshmem_place_free(&member->area, member->place.index, member->number);
}

/* How long a place's beat has stood still, in nanoseconds, as this process saw it at its own beats.
 * A process that was stopped starts to observe again: it has not seen whether the others beat. */
static inline int64_t ivshmem_silence(const struct ivshmem_member *member,
                                      struct ivshmem_place place)
{
    const struct ivshmem_pulse *pulse;
    if (place.index >= member->area.places)
        return INT64_MAX;
    pulse = &member->pulses[place.index];
    return ivshmem_epoch(pulse->beat) == place.epoch ? member->looked - pulse->since : 0;
}

/* Whether that is longer than the lease. */
static inline int ivshmem_is_silent(const struct ivshmem_member *member,
                                    struct ivshmem_place place)
{
    return ivshmem_silence(member, place) > member->lease;
}

/* One beat: show that this process is at work, look at the others, free those that are gone.
 *
 * IVSHMEM_CLOSED: another process freed the place of this one (a new server on the memory, or a
 * user's command). This process must close its slots and join again. Otherwise: the number of places
 * that were freed; unless it is 0, ivshmem_ring_places comes next.
 */
static inline int ivshmem_beat(struct ivshmem_member *member)
{
    const struct ivshmem_memory *memory = &member->area.memory;
    uint64_t own = ivshmem_place_at(&member->area, member->place.index);
    int64_t now = member->user.now(member->user.context);
    int was_away = now - member->looked > member->lease / 2; /* this process was stopped */
    int freed = 0;
    if (ivshmem_load(memory, own) != member->number)
        return IVSHMEM_CLOSED;
    member->beats++;
    ivshmem_place_store(member);
    for (unsigned index = 0; index < member->area.places; index++) {
        uint64_t at = ivshmem_place_at(&member->area, index);
        uint64_t number = ivshmem_load(memory, at);
        /* What joins does not beat yet; if it stays so, it needs no proof. */
        int joins = ivshmem_flags(number) == IVSHMEM_JOINING;
        uint64_t beat = joins ? number : ivshmem_load(memory, at + IVSHMEM_PLACE_BEAT);
        struct ivshmem_pulse *pulse = &member->pulses[index];
        if (ivshmem_value(number) == 0)
            continue;
        if (beat != pulse->beat || was_away) {
            pulse->beat = beat;
            pulse->since = now;
        } else if (now - pulse->since > member->lease) {
            freed += joins ? ivshmem_place_free(&member->area, index, number)
                           : ivshmem_place_prove(member, index);
        }
    }
    member->looked = now;
    return freed;
}

#endif
