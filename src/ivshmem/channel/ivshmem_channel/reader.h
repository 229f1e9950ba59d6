/* The reader of messages.
 *
 * Knows: what comes next from each writer, and what was lost. Does not know: what payloads mean.
 *
 * Invariants: what was copied counts only after its stamp was found unchanged; a tail is stored only
 * after what stands before it was read.
 */
#ifndef IVSHMEM_CHANNEL_READER_H
#define IVSHMEM_CHANNEL_READER_H

#include "writer.h"

/* What a reader knows of one writer. */
struct ivshmem_source {
    uint64_t next;  /* the position that is read next */
    uint64_t head;  /* as it was seen last: what stands before it was published */
    uint64_t tail;  /* as it was stored last */
    uint64_t lost;
    uint64_t untold; /* of these: since the last message that was taken */
    uint64_t held;  /* the oldest position that is being looked at, or `next` */
    unsigned epoch; /* of the writer's slot */
    int hurried;    /* a message was overwritten while it was copied */
};

/* One reader of a channel. One that has no slot (`slot` is IVSHMEM_NO_SLOT), since its memory is
 * mapped for reading only, is neither counted nor waited for, and overwritten. */
struct ivshmem_reader {
    struct ivshmem_channel *channel;
    struct ivshmem_member *member;
    unsigned slot, epoch;
    enum ivshmem_overflow overflow;
    unsigned turn;  /* the writer that is looked at first */
    uint32_t batch; /* messages after which the tail is stored */
    struct ivshmem_source sources[IVSHMEM_MOST_WRITERS];
    struct ivshmem_sleep sleep;
    struct ivshmem_rung rung;         /* writers */
    struct ivshmem_rung rung_readers; /* of a queue: the others */
};

#define IVSHMEM_NO_SLOT (~0u)

/* Where a reader finds a writer's head, and the entry at a position: in a backlog of its own, if it
 * discards. */
static inline uint64_t ivshmem_source_head_at(const struct ivshmem_reader *reader, unsigned writer)
{
    return reader->overflow == IVSHMEM_DISCARD
               ? ivshmem_backlog_at(reader->channel, writer, reader->slot)
               : reader->channel->layout.heads + (uint64_t)IVSHMEM_CACHE_LINE * writer;
}

static inline uint64_t ivshmem_source_entry_at(const struct ivshmem_reader *reader,
                                               unsigned writer, uint64_t position)
{
    return reader->overflow == IVSHMEM_DISCARD
               ? ivshmem_backlog_entry_at(reader->channel,
                                          ivshmem_backlog_at(reader->channel, writer, reader->slot),
                                          position)
               : ivshmem_entry_at(reader->channel, writer, position);
}

/* Store how far a reader is. If the channel lets readers block, a writer that sleeps is rung. */
static inline void ivshmem_reader_tail(struct ivshmem_reader *reader, unsigned writer)
{
    struct ivshmem_channel *channel = reader->channel;
    struct ivshmem_source *source = &reader->sources[writer];
    if (reader->slot == IVSHMEM_NO_SLOT || source->tail == source->held)
        return;
    source->tail = source->held;
    ivshmem_load_barrier(&channel->area.memory); /* what was read was read before it is given up */
    ivshmem_announce(&channel->area.memory,
                     channel->at + ivshmem_row_at(channel, reader->slot, writer),
                     ivshmem_word(source->tail, 0, reader->epoch));
    if (reader->overflow != IVSHMEM_BLOCK)
        return;
    ivshmem_wake_writers(reader->member, channel, &reader->rung);
}

/* Make all writers look at the readers before their next message. */
static inline int ivshmem_reader_count(struct ivshmem_reader *reader)
{
    struct ivshmem_channel *channel = reader->channel;
    for (unsigned tries = 0;; tries++) {
        uint64_t joins = ivshmem_get(channel, IVSHMEM_JOINS);
        if (ivshmem_exchange(&channel->area.memory, channel->at + IVSHMEM_JOINS, joins, joins + 1))
            return 0;
        if (tries == 10000)
            return ivshmem_corrupt(channel, "joins", IVSHMEM_JOINS, joins, 0);
    }
}

/* Make writers count with this reader, from its tails on; also after it was overtaken.
 *
 * A writer that has not yet noticed publishes at most the position that its head names now, over
 * what stands `slots` before it: what is newer than that stays. In a backlog, what is there was meant
 * for a former reader of the slot.
 */
static inline int ivshmem_reader_join(struct ivshmem_reader *reader)
{
    struct ivshmem_channel *channel = reader->channel;
    const struct ivshmem_memory *memory = &channel->area.memory;
    uint64_t most = reader->overflow == IVSHMEM_DISCARD ? 0 : channel->record.geometry.slots - 1;
    int code = ivshmem_reader_count(reader);
    if (code != 0)
        return code;
    ivshmem_full_fence(memory);
    for (unsigned i = 0; i < channel->record.geometry.writers; i++) {
        struct ivshmem_source *source = &reader->sources[i];
        uint64_t head = ivshmem_value(ivshmem_get(channel, ivshmem_source_head_at(reader, i)));
        uint64_t ahead = ivshmem_ahead(head, source->next);
        if (ahead > most && !ivshmem_is_behind(head, source->next)) {
            source->lost += ahead - most;
            source->untold += ahead - most;
            source->next = (head - most) & IVSHMEM_VALUE_MASK;
            source->held = source->next;
            ivshmem_reader_tail(reader, i);
        }
    }
    return 0;
}

/* Read the entry at a reader's next position of a writer. A new owner of the writer's slot gives its
 * own epoch to what a former one published, and then to the head: until then an entry has the epoch of
 * either. IVSHMEM_AGAIN: it is about to get it. */
static inline int ivshmem_source_read(struct ivshmem_reader *reader, unsigned writer,
                                      struct ivshmem_message *message)
{
    struct ivshmem_channel *channel = reader->channel;
    const struct ivshmem_source *source = &reader->sources[writer];
    uint64_t at = ivshmem_source_entry_at(reader, writer, source->next), owner;
    int code = ivshmem_entry_read(channel, at, writer, source->next, source->epoch, message);
    if (code != IVSHMEM_OVERTAKEN)
        return code;
    owner = ivshmem_writer_owner(channel, writer);
    if (ivshmem_epoch(owner) == source->epoch)
        return code;
    code = ivshmem_entry_read(channel, at, writer, source->next, ivshmem_epoch(owner), message);
    if (code == IVSHMEM_OVERTAKEN && ivshmem_is_owned(channel, owner) &&
        !ivshmem_is_silent(reader->member, ivshmem_place_of(owner)))
        return IVSHMEM_AGAIN;
    return code;
}

/* Whether the last position is that of a message which is there: then those from 0 on come after it. A
 * queue's readers find what is older by its claims. */
static inline int ivshmem_has_wrapped(const struct ivshmem_channel *channel, unsigned writer)
{
    return !ivshmem_has_claims(channel) &&
           ivshmem_value(ivshmem_get(channel, ivshmem_entry_at(channel, writer,
                                                               IVSHMEM_VALUE_MASK))) ==
               IVSHMEM_VALUE_MASK;
}

/* Pass over messages of the history that are not there. They are not lost: they were before this
 * reader was. */
static inline void ivshmem_reader_begin(struct ivshmem_reader *reader, unsigned writer,
                                        uint64_t head)
{
    struct ivshmem_source *source = &reader->sources[writer];
    struct ivshmem_message message;
    while (source->next != head &&
           ivshmem_source_read(reader, writer, &message) == IVSHMEM_OVERTAKEN)
        source->next = (source->next + 1) & IVSHMEM_VALUE_MASK;
}

/* Give the slot back. */
static inline void ivshmem_reader_close(struct ivshmem_reader *reader)
{
    const struct ivshmem_channel *channel = reader->channel;
    if (reader->slot == IVSHMEM_NO_SLOT)
        return;
    ivshmem_slot_free(channel, ivshmem_reader_owner_at(channel, reader->slot),
                      ivshmem_place_word(reader->member->place, IVSHMEM_SLOT_OPEN, reader->epoch));
    ivshmem_wake_writers(reader->member, channel, &reader->rung);
    for (unsigned i = 0; i < channel->record.geometry.writers; i++)
        ivshmem_writer_reap(reader->member, channel, i);
}

/* Take a reader's slot; the caller has set channel, member and, unless it is a queue or calls,
 * overflow.
 *
 * The reader begins with the last `history` messages of each writer, as far as they are there; not
 * one that discards.
 *
 * IVSHMEM_BAD: a channel of bytes, which has no readers; or one that does not allow this overflow.
 */
static inline int ivshmem_reader_open(struct ivshmem_reader *reader, uint32_t history)
{
    struct ivshmem_channel *channel = reader->channel;
    const struct ivshmem_memory *memory = &channel->area.memory;
    const struct ivshmem_geometry *g = &channel->record.geometry;
    uint64_t row;
    unsigned slot = 0;
    int joined;
    if (g->kind == IVSHMEM_BYTES)
        return IVSHMEM_BAD;
    reader->turn = 0;
    reader->batch = g->slots / 4 > 0 ? g->slots / 4 : 1;
    ivshmem_rung_begin(&reader->rung);
    ivshmem_rung_begin(&reader->rung_readers);
    if (memory->readonly) {
        reader->slot = IVSHMEM_NO_SLOT;
        reader->overflow = IVSHMEM_OVERWRITE;
    } else {
        int code;
        if (!ivshmem_has_claims(channel) && !(g->overflow & (unsigned)reader->overflow))
            return IVSHMEM_BAD;
        code = ivshmem_reader_slot(channel, reader->member, &reader->slot, &reader->epoch,
                                   &reader->sleep);
        if (code != 0)
            return code;
        slot = reader->slot;
    }
    if (ivshmem_has_claims(channel))
        history = g->slots; /* all that no reader has taken */
    else if (reader->overflow == IVSHMEM_DISCARD)
        history = 0; /* its backlog begins now */
    else if (history >= g->slots)
        history = g->slots - 1;
    for (unsigned i = 0; i < g->writers; i++) {
        struct ivshmem_source *source = &reader->sources[i];
        uint64_t head = ivshmem_get(channel, ivshmem_source_head_at(reader, i));
        source->epoch = ivshmem_epoch(head);
        source->next = (ivshmem_value(head) - history) & IVSHMEM_VALUE_MASK;
        if (ivshmem_value(head) < history && !ivshmem_has_wrapped(channel, i))
            source->next = 0; /* fewer messages were ever written */
        if (!ivshmem_has_claims(channel))
            ivshmem_reader_begin(reader, i, ivshmem_value(head));
        source->head = source->next;
        source->held = source->next;
        source->tail = source->next;
        source->lost = source->untold = 0;
        source->hurried = 0;
        if (reader->slot != IVSHMEM_NO_SLOT)
            ivshmem_store(memory, channel->at + ivshmem_row_at(channel, slot, i),
                          ivshmem_word(source->next, 0, reader->epoch));
    }
    if (reader->slot == IVSHMEM_NO_SLOT)
        return 0;
    row = channel->layout.rows + channel->layout.row_bytes * slot;
    ivshmem_announce(memory, channel->at + row,
                     ivshmem_policy_word((unsigned)reader->overflow, 0, reader->epoch));
    joined = ivshmem_has_claims(channel) ? 0 : ivshmem_reader_join(reader);
    for (unsigned i = 0; i < g->writers; i++) /* what came before it joined is not lost */
        reader->sources[i].lost = reader->sources[i].untold = 0;
    if (joined != 0)
        ivshmem_reader_close(reader); /* else writers would wait for a reader that is not there */
    return joined;
}

/* A message was overwritten while it was copied. The ones after it would be, too: the reader passes
 * over an eighth of the ring more than was overwritten. */
static inline void ivshmem_reader_lose(struct ivshmem_reader *reader, unsigned writer)
{
    reader->sources[writer].lost++;
    reader->sources[writer].untold++;
    reader->sources[writer].hurried = 1;
}

/* Look at one writer's next message.
 *
 * The head is read only when all that it announced was taken: its cache line is the one that the
 * writer stores into for each message. An entry that is not what an older head announced was
 * overwritten, and then the head is read again.
 */
static inline int ivshmem_look_at(struct ivshmem_reader *reader, unsigned writer,
                                  struct ivshmem_message *message)
{
    struct ivshmem_channel *channel = reader->channel;
    struct ivshmem_source *source = &reader->sources[writer];
    uint64_t slots = channel->record.geometry.slots, skipped = 0;
    /* Each round but the last passes over what was overwritten. A writer that overtakes all of
     * them leaves nothing that can be read. */
    for (unsigned tries = 0; tries < 16; tries++) {
        uint64_t ahead = ivshmem_ahead(source->head, source->next);
        uint64_t most = source->hurried && slots > 1 ? slots - (slots + 7) / 8 : slots;
        int code;
        if (tries > 0 || ahead == 0 || ahead > slots || source->hurried) {
            uint64_t head_at = ivshmem_source_head_at(reader, writer);
            uint64_t head = ivshmem_get(channel, head_at), owner;
            ahead = ivshmem_ahead(ivshmem_value(head), source->next);
            if (ahead == 0)
                break;
            owner = ivshmem_writer_owner(channel, writer);
            /* Not stored yet, or a former owner's late store. What was published before stays, if the
             * new owner ended, or was stopped, before it had stored a head of its own. */
            if (ivshmem_epoch(owner) != ivshmem_epoch(head) &&
                (ivshmem_epoch(head) != source->epoch ||
                 (ivshmem_is_owned(channel, owner) &&
                  !ivshmem_is_silent(reader->member, ivshmem_place_of(owner)))))
                break;
            source->epoch = ivshmem_epoch(head);
            if (ahead > IVSHMEM_VALUE_MASK / 2)
                return ivshmem_corrupt(channel, "head", head_at, head, owner);
            source->head = ivshmem_value(head);
        }
        if (ahead > most) { /* the more rounds, the nearer to the newest */
            uint64_t keep = most >> tries / 2 > 0 ? most >> tries / 2 : 1;
            skipped += ahead - keep;
            source->next = (source->head - keep) & IVSHMEM_VALUE_MASK;
        }
        source->hurried = 0;
        code = ivshmem_source_read(reader, writer, message);
        if (code == IVSHMEM_AGAIN) {
            source->head = source->next; /* so that the head is read again */
            break;
        }
        source->next = (source->next + 1) & IVSHMEM_VALUE_MASK;
        if (code != IVSHMEM_OVERTAKEN) {
            source->lost += skipped;
            message->lost = source->untold + skipped;
            source->untold = 0;
            return code;
        }
        skipped++;
    }
    source->lost += skipped;
    source->untold += skipped;
    return IVSHMEM_AGAIN;
}

/* Take the next message of any writer, in turn. Its memory stays the reader's until
 * ivshmem_release, as far as its way to overflow says so. */
static inline int ivshmem_take(struct ivshmem_reader *reader, struct ivshmem_message *message)
{
    unsigned writers = reader->channel->record.geometry.writers;
    for (unsigned i = 0; i < writers; i++) {
        unsigned writer = reader->turn;
        int code = ivshmem_look_at(reader, writer, message);
        reader->turn = writer + 1 < writers ? writer + 1 : 0;
        if (code != IVSHMEM_AGAIN) {
            if (code == 0 && message->lost != 0 && reader->overflow == IVSHMEM_BLOCK)
                ivshmem_reader_join(reader);
            return code;
        }
    }
    return IVSHMEM_AGAIN;
}

/* Say that nothing before `held` of a writer is looked at any more. */
static inline void ivshmem_release(struct ivshmem_reader *reader, unsigned writer, uint64_t held)
{
    struct ivshmem_source *source = &reader->sources[writer];
    source->held = held;
    if (ivshmem_ahead(held, source->tail) >= reader->batch)
        ivshmem_reader_tail(reader, writer);
}

/* Copy the next message out; `length` is what it has, also if that is more than `room`. */
static inline int ivshmem_read(struct ivshmem_reader *reader, struct ivshmem_message *message,
                               void *data, uint32_t room)
{
    for (unsigned tries = 0; tries < 8; tries++) {
        int code = ivshmem_take(reader, message);
        if (code != 0)
            return code;
        if (message->length > room)
            return IVSHMEM_TOO_LONG;
        ivshmem_copy_payload(data, reader->channel->area.memory.start + message->offset,
                             message->length);
        code = ivshmem_check(reader->channel, message);
        ivshmem_release(reader, message->writer, reader->sources[message->writer].next);
        if (code == 0)
            return 0;
        ivshmem_reader_lose(reader, message->writer);
        reader->sources[message->writer].untold += message->lost; /* nobody was told of them */
    }
    return IVSHMEM_AGAIN;
}

/* After a reader found nothing: store how far it is, and free the slots of writers that ended and
 * have nothing more for it. A reader that never sleeps, because it polls, calls this itself. */
static inline void ivshmem_reader_settle(struct ivshmem_reader *reader)
{
    struct ivshmem_channel *channel = reader->channel;
    for (unsigned i = 0; i < channel->record.geometry.writers; i++) {
        ivshmem_reader_tail(reader, i);
        if (reader->slot != IVSHMEM_NO_SLOT &&
            reader->sources[i].held ==
                ivshmem_value(ivshmem_get(channel, ivshmem_source_head_at(reader, i))))
            ivshmem_writer_reap(reader->member, channel, i); /* perhaps the last that read it */
    }
}

/* Before a reader that found nothing sleeps; 0: there is something now, so that it need not. */
static inline int ivshmem_reader_sleep(struct ivshmem_reader *reader)
{
    struct ivshmem_channel *channel = reader->channel;
    unsigned writers = channel->record.geometry.writers;
    ivshmem_reader_settle(reader);
    if (reader->slot == IVSHMEM_NO_SLOT)
        return IVSHMEM_AGAIN;
    ivshmem_sleep_begin(channel, &reader->sleep);
    for (unsigned i = 0; i < writers; i++)
        if (ivshmem_value(ivshmem_get(channel, ivshmem_source_head_at(reader, i))) !=
            reader->sources[i].next) {
            ivshmem_sleep_end(channel, &reader->sleep);
            return 0;
        }
    return IVSHMEM_AGAIN;
}

/* How many messages were overwritten before this reader took them. */
static inline uint64_t ivshmem_reader_lost(const struct ivshmem_reader *reader)
{
    uint64_t lost = 0;
    for (unsigned i = 0; i < reader->channel->record.geometry.writers; i++)
        lost += reader->sources[i].lost;
    return lost;
}

/* Once a beat: tell how much was lost, and store again what a late store of a former owner may have
 * spoiled. */
static inline void ivshmem_reader_beat(struct ivshmem_reader *reader)
{
    struct ivshmem_channel *channel = reader->channel;
    const struct ivshmem_memory *memory = &channel->area.memory;
    uint64_t at = channel->at + channel->layout.rows + channel->layout.row_bytes * reader->slot;
    uint64_t word = ivshmem_policy_word((unsigned)reader->overflow, ivshmem_reader_lost(reader),
                                        reader->epoch);
    uint64_t seen;
    int changed;
    if (reader->slot == IVSHMEM_NO_SLOT || ivshmem_has_claims(channel))
        return;
    seen = ivshmem_load(memory, at);
    changed = seen != word;
    if (changed) {
        ivshmem_announce(memory, at, word);
        if (ivshmem_epoch(seen) != reader->epoch)
            ivshmem_reader_count(reader); /* a writer that looked in between does not wait for it */
    }
    for (unsigned i = 0; i < channel->record.geometry.writers; i++) {
        at = channel->at + ivshmem_row_at(channel, reader->slot, i);
        word = ivshmem_word(reader->sources[i].tail, 0, reader->epoch);
        if (ivshmem_load(memory, at) == word)
            continue;
        ivshmem_announce(memory, at, word);
        changed = 1;
    }
    if (changed)
        ivshmem_wake_writers(reader->member, channel, &reader->rung);
}

#endif
