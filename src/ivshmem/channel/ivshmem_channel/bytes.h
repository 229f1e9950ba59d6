/* Bytes: connections, with half-close and back pressure.
 */
#ifndef IVSHMEM_CHANNEL_BYTES_H
#define IVSHMEM_CHANNEL_BYTES_H

#include "slots.h"

/* A connection has two ends, the caller (0) and the acceptor (1), and three lines of words:
 *
 *      0  the caller's owner word    8  the acceptor's owner word   (compare-exchange)
 *     64  the caller's own words   128  the acceptor's own words:
 *           0  head     bytes that it has sent; IVSHMEM_FIN: it sends no more
 *           8  tail     bytes that it has received; IVSHMEM_FIN: it receives no more
 *          16  sleeper  with IVSHMEM_HAS_ROOM: what only makes room does not ring it
 *
 * Both begin at 0 with each connection. A connection can be used again when both its owner words
 * are free. A caller that closed before anybody accepted it is IVSHMEM_SLOT_CLOSING: it can still
 * be accepted and read.
 *
 * All words of a connection have the epoch of its caller's owner word, the acceptor's owner word
 * too: by that a caller knows that it was accepted. An acceptor that finds another caller after its
 * compare-exchange takes it back, and a caller that finds an acceptor of a former one does; neither
 * has touched more then.
 */
#define IVSHMEM_FIN 1u

struct ivshmem_listener {
    struct ivshmem_channel *channel;
    struct ivshmem_member *member;
    unsigned slot, epoch;
    unsigned turn;
    struct ivshmem_sleep sleep;
    struct ivshmem_rung rung_listeners;
};

/* One end of a connection. */
struct ivshmem_stream {
    struct ivshmem_channel *channel;
    struct ivshmem_member *member;
    unsigned connection, end;
    unsigned epoch; /* of the connection */
    uint64_t sent, received;
    uint64_t passed; /* of what was sent: received by the other end, as this one saw it last */
    unsigned sends_no_more, receives_no_more;
    struct ivshmem_sleep sleep;
    uint64_t rung;
    struct ivshmem_rung rung_listeners;
};

static inline uint64_t ivshmem_end_at(const struct ivshmem_channel *channel, unsigned connection,
                                      unsigned end)
{
    return channel->layout.heads + (uint64_t)IVSHMEM_CONNECTION_BYTES * connection +
           IVSHMEM_CACHE_LINE * (1u + end);
}

/* The bytes that an end sends: an offset in the region. */
static inline uint64_t ivshmem_stream_buffer(const struct ivshmem_stream *stream, unsigned end)
{
    const struct ivshmem_channel *channel = stream->channel;
    return channel->at + channel->layout.cells +
           channel->layout.cell_bytes * (2u * (uint64_t)stream->connection + end);
}

static inline void ivshmem_stream_store(const struct ivshmem_stream *stream)
{
    const struct ivshmem_channel *channel = stream->channel;
    uint64_t at = channel->at + ivshmem_end_at(channel, stream->connection, stream->end);
    ivshmem_load_barrier(&channel->area.memory); /* what was received was read before */
    ivshmem_announce(&channel->area.memory, at,
                     ivshmem_word(stream->sent, stream->sends_no_more, stream->epoch));
    ivshmem_announce(&channel->area.memory, at + 8u,
                     ivshmem_word(stream->received, stream->receives_no_more, stream->epoch));
}

/* Ring the other end, if it sleeps; after what only makes room: if it waits for that. */
static inline void ivshmem_stream_wake_for(struct ivshmem_stream *stream, int room)
{
    const struct ivshmem_channel *channel = stream->channel;
    unsigned other = 1u - stream->end;
    ivshmem_full_fence(&channel->area.memory);
    if (room && (ivshmem_flags(ivshmem_get(channel, ivshmem_end_at(channel, stream->connection,
                                                                   other) + 16u)) &
                 IVSHMEM_HAS_ROOM))
        return;
    ivshmem_wake_one(stream->member, channel,
                     ivshmem_end_owner_at(channel, stream->connection, other),
                     ivshmem_end_at(channel, stream->connection, other) + 16u, &stream->rung);
}

static inline void ivshmem_stream_wake(struct ivshmem_stream *stream)
{
    ivshmem_stream_wake_for(stream, 0);
}

static inline void ivshmem_stream_begin(struct ivshmem_stream *stream)
{
    const struct ivshmem_channel *channel = stream->channel;
    stream->sent = stream->received = stream->passed = 0;
    stream->sends_no_more = stream->receives_no_more = 0;
    stream->sleep.at = ivshmem_end_at(channel, stream->connection, stream->end) + 16u;
    stream->sleep.epoch = stream->epoch;
    stream->sleep.count = ivshmem_value(ivshmem_get(channel, stream->sleep.at));
    stream->sleep.more = 0;
    stream->rung = 0;
    ivshmem_rung_begin(&stream->rung_listeners);
}

/* Whether a connection can be used. If its caller was killed before an acceptor came, the bytes
 * that it had sent are dropped. */
static inline int ivshmem_connection_is_free(const struct ivshmem_channel *channel,
                                             unsigned connection)
{
    uint64_t at = ivshmem_end_owner_at(channel, connection, 0);
    uint64_t caller = ivshmem_get(channel, at), acceptor = ivshmem_get(channel, at + 8u);
    int has_acceptor = ivshmem_flags(acceptor) != IVSHMEM_SLOT_FREE;
    if (has_acceptor && !ivshmem_is_gone(&channel->area, ivshmem_place_of(acceptor)))
        return 0;
    if (ivshmem_flags(caller) == IVSHMEM_SLOT_OPEN
            ? !ivshmem_is_gone(&channel->area, ivshmem_place_of(caller))
            : ivshmem_flags(caller) == IVSHMEM_SLOT_CLOSING && !has_acceptor &&
                  ivshmem_epoch(acceptor) != ivshmem_epoch(caller)) /* it can still be accepted */
        return 0;
    /* The caller's word first: while it is not free, a listener may accept. */
    if (ivshmem_flags(caller) != IVSHMEM_SLOT_FREE &&
        !ivshmem_slot_free(channel, at, caller))
        return 0;
    return !has_acceptor || ivshmem_slot_free(channel, at + 8u, acceptor);
}

/* Listen: the caller has set channel and member. IVSHMEM_BAD: the channel is of another kind. */
static inline int ivshmem_listen(struct ivshmem_listener *listener)
{
    if (listener->channel->record.geometry.kind != IVSHMEM_BYTES)
        return IVSHMEM_BAD;
    if (listener->channel->area.memory.readonly)
        return IVSHMEM_READ_ONLY;
    listener->turn = 0;
    ivshmem_rung_begin(&listener->rung_listeners);
    return ivshmem_reader_slot(listener->channel, listener->member, &listener->slot,
                               &listener->epoch, &listener->sleep);
}

/* Whether a listener is at work. */
static inline int ivshmem_is_listened_to(const struct ivshmem_member *member,
                                         const struct ivshmem_channel *channel)
{
    for (unsigned i = 0; i < channel->record.geometry.readers; i++) {
        uint64_t owner = ivshmem_reader_owner(channel, i);
        if (ivshmem_is_owned(channel, owner) && !ivshmem_is_silent(member, ivshmem_place_of(owner)))
            return 1;
    }
    return 0;
}

/* Listen no more. If no other process listens, callers that have closed, and were not accepted, are
 * dropped with what they sent. The others wait for the next listener. */
static inline void ivshmem_listener_close(struct ivshmem_listener *listener)
{
    const struct ivshmem_channel *channel = listener->channel;
    ivshmem_slot_free(
        channel, ivshmem_reader_owner_at(channel, listener->slot),
        ivshmem_place_word(listener->member->place, IVSHMEM_SLOT_OPEN, listener->epoch));
    if (ivshmem_is_listened_to(listener->member, channel))
        return;
    for (unsigned i = 0; i < channel->record.geometry.writers; i++) {
        uint64_t at = ivshmem_end_owner_at(channel, i, 0);
        uint64_t caller = ivshmem_get(channel, at);
        if (ivshmem_flags(caller) == IVSHMEM_SLOT_CLOSING &&
            ivshmem_flags(ivshmem_get(channel, at + 8u)) == IVSHMEM_SLOT_FREE)
            ivshmem_slot_free(channel, at, caller);
    }
}

/* Take a connection that is free, as its caller. */
static inline int ivshmem_stream_take(struct ivshmem_stream *stream)
{
    const struct ivshmem_channel *channel = stream->channel;
    stream->end = 0;
    for (unsigned i = 0; i < channel->record.geometry.writers; i++) {
        uint64_t at = ivshmem_end_owner_at(channel, i, 0), owner, mine, acceptor, now;
        int code;
        if (!ivshmem_connection_is_free(channel, i))
            continue;
        owner = ivshmem_get(channel, at);
        acceptor = ivshmem_get(channel, at + 8u);
        if (ivshmem_flags(owner) != IVSHMEM_SLOT_FREE ||
            ivshmem_flags(acceptor) != IVSHMEM_SLOT_FREE)
            continue;
        stream->connection = i;
        stream->epoch = (ivshmem_epoch(owner) + 1) & IVSHMEM_EPOCH_MASK;
        mine = ivshmem_place_word(stream->member->place, IVSHMEM_SLOT_OPEN, stream->epoch);
        code = ivshmem_slot_take(channel, at, owner, mine);
        if (code == IVSHMEM_TAKEN)
            continue;
        if (code != 0)
            return code;
        now = ivshmem_get(channel, at + 8u);
        if (now != acceptor && ivshmem_epoch(now) != stream->epoch) {
            ivshmem_slot_free(channel, at, mine);
            continue;
        }
        return 0;
    }
    return IVSHMEM_TAKEN;
}

/* Connect: the caller has set channel and member. What it sends waits until a listener accepts.
 *
 * IVSHMEM_NOT_FOUND: no process listens. IVSHMEM_TAKEN: all connections are in use. IVSHMEM_BAD:
 * the channel is of another kind.
 */
static inline int ivshmem_stream_connect(struct ivshmem_stream *stream)
{
    const struct ivshmem_channel *channel = stream->channel;
    int code;
    if (channel->record.geometry.kind != IVSHMEM_BYTES)
        return IVSHMEM_BAD;
    if (channel->area.memory.readonly)
        return IVSHMEM_READ_ONLY;
    if (!ivshmem_is_listened_to(stream->member, channel))
        return IVSHMEM_NOT_FOUND;
    code = ivshmem_stream_take(stream);
    if (code == IVSHMEM_TAKEN && ivshmem_prove_places(stream->member) > 0)
        code = ivshmem_stream_take(stream);
    if (code != 0)
        return code;
    ivshmem_stream_begin(stream);
    ivshmem_stream_store(stream);
    ivshmem_wake_readers(stream->member, channel, 1, &stream->rung_listeners);
    return 0;
}

/* Whether a caller waits in a connection, with its words stored; what was read is not trusted. */
static inline int ivshmem_caller_waits(const struct ivshmem_channel *channel, unsigned connection)
{
    uint64_t at = ivshmem_end_owner_at(channel, connection, 1);
    uint64_t acceptor = ivshmem_get(channel, at), caller = ivshmem_get(channel, at - 8u);
    /* Else it is free, or accepted before, or its words are not stored yet. */
    return ivshmem_flags(caller) != IVSHMEM_SLOT_FREE &&
           ivshmem_flags(acceptor) == IVSHMEM_SLOT_FREE &&
           ivshmem_epoch(acceptor) != ivshmem_epoch(caller) &&
           ivshmem_epoch(ivshmem_get(channel, ivshmem_end_at(channel, connection, 0))) ==
               ivshmem_epoch(caller);
}

/* Whether ivshmem_accept would find a caller. */
static inline int ivshmem_listener_has_caller(const struct ivshmem_listener *listener)
{
    for (unsigned i = 0; i < listener->channel->record.geometry.writers; i++)
        if (ivshmem_caller_waits(listener->channel, i))
            return 1;
    return 0;
}

/* Accept the next caller. IVSHMEM_AGAIN: there is none. A listener that has slept calls
 * ivshmem_listener_pass_on afterwards. */
static inline int ivshmem_accept(struct ivshmem_listener *listener, struct ivshmem_stream *stream)
{
    struct ivshmem_channel *channel = listener->channel;
    unsigned connections = channel->record.geometry.writers;
    stream->channel = channel;
    stream->member = listener->member;
    stream->end = 1;
    for (unsigned i = 0; i < connections; i++) {
        unsigned connection = listener->turn;
        uint64_t at = ivshmem_end_owner_at(channel, connection, 1), mine;
        uint64_t acceptor = ivshmem_get(channel, at);
        uint64_t caller = ivshmem_get(channel, at - 8u);
        listener->turn = connection + 1 < connections ? connection + 1 : 0;
        if (ivshmem_flags(caller) == IVSHMEM_SLOT_FREE ||
            ivshmem_flags(acceptor) != IVSHMEM_SLOT_FREE ||
            ivshmem_epoch(acceptor) == ivshmem_epoch(caller) ||
            ivshmem_epoch(ivshmem_get(channel, ivshmem_end_at(channel, connection, 0))) !=
                ivshmem_epoch(caller))
            continue; /* free, or accepted before, or its words are not stored yet */
        stream->connection = connection;
        stream->epoch = ivshmem_epoch(caller);
        mine = ivshmem_place_word(listener->member->place, IVSHMEM_SLOT_OPEN, stream->epoch);
        if (!ivshmem_exchange(&channel->area.memory, channel->at + at, acceptor, mine))
            continue;
        if (ivshmem_epoch(ivshmem_get(channel, at - 8u)) != stream->epoch) {
            ivshmem_slot_free(channel, at, mine);
            continue;
        }
        ivshmem_stream_begin(stream);
        ivshmem_stream_store(stream);
        ivshmem_stream_wake(stream);
        return 0;
    }
    return IVSHMEM_AGAIN;
}

/* After what followed a sleep: a caller that was accepted, or a wait that ended without one. A caller
 * rings one listener, and two callers perhaps the same one. */
static inline void ivshmem_listener_pass_on(struct ivshmem_listener *listener)
{
    ivshmem_full_fence(&listener->channel->area.memory);
    if (ivshmem_listener_has_caller(listener))
        ivshmem_wake_readers(listener->member, listener->channel, 1, &listener->rung_listeners);
}

/* What the other end says of itself. */
struct ivshmem_other_end {
    int closed; /* it has closed, or is gone */
    uint64_t sent, received;
    int sends_no_more, receives_no_more;
};

static inline int ivshmem_stream_look(struct ivshmem_stream *stream,
                                      struct ivshmem_other_end *other)
{
    struct ivshmem_channel *channel = stream->channel;
    uint64_t buffer = channel->layout.cell_bytes;
    unsigned end = 1u - stream->end;
    uint64_t at = ivshmem_end_at(channel, stream->connection, end), head, tail;
    uint64_t owner = ivshmem_get(channel, ivshmem_end_owner_at(channel, stream->connection, end));
    /* An acceptor's word of another epoch: no listener has accepted yet. A caller's: it was gone
     * when this end accepted, and somebody else has used, or tried to use, the connection since. */
    other->closed = ivshmem_epoch(owner) != stream->epoch
                        ? stream->end == 1
                        : ivshmem_flags(owner) == IVSHMEM_SLOT_FREE ||
                              ivshmem_is_gone(&channel->area, ivshmem_place_of(owner));
    /* Whether it is gone comes first: what it sent before that is found. */
    ivshmem_load_barrier(&channel->area.memory);
    head = ivshmem_get(channel, at);
    tail = ivshmem_get(channel, at + 8u);
    /* A word of another epoch is not stored yet, or is a late store: it tells nothing. */
    other->sent = stream->received;
    other->received = stream->passed;
    other->sends_no_more = other->receives_no_more = 0;
    if (ivshmem_epoch(head) == stream->epoch) {
        other->sent = ivshmem_value(head);
        other->sends_no_more = (ivshmem_flags(head) & IVSHMEM_FIN) != 0;
    }
    if (ivshmem_epoch(tail) == stream->epoch) {
        other->received = ivshmem_value(tail);
        other->receives_no_more = (ivshmem_flags(tail) & IVSHMEM_FIN) != 0;
    }
    if (ivshmem_ahead(other->sent, stream->received) > buffer)
        return ivshmem_corrupt(channel, "head", at, head, owner);
    if (ivshmem_ahead(stream->sent, other->received) > buffer)
        return ivshmem_corrupt(channel, "tail", at + 8u, tail, owner);
    return 0;
}

/* How long the other end's process has shown no sign of life, in nanoseconds; 0: there is none. */
static inline int64_t ivshmem_stream_silence(const struct ivshmem_stream *stream)
{
    uint64_t owner = ivshmem_get(stream->channel, ivshmem_end_owner_at(
                                     stream->channel, stream->connection, 1u - stream->end));
    if (ivshmem_epoch(owner) != stream->epoch || ivshmem_flags(owner) == IVSHMEM_SLOT_FREE)
        return 0;
    return ivshmem_silence(stream->member, ivshmem_place_of(owner));
}

/* A part of a ring: two pieces where it wraps, else the second one is empty. */
struct ivshmem_pieces {
    unsigned char *first, *second;
    uint64_t first_size, second_size;
};

static inline void ivshmem_stream_pieces(const struct ivshmem_stream *stream, unsigned end,
                                         uint64_t position, uint64_t size,
                                         struct ivshmem_pieces *pieces)
{
    uint64_t buffer = stream->channel->layout.cell_bytes, at = position & (buffer - 1);
    unsigned char *memory =
        stream->channel->area.memory.start + ivshmem_stream_buffer(stream, end);
    pieces->first = memory + at;
    pieces->second = memory;
    pieces->first_size = size < buffer - at ? size : buffer - at;
    pieces->second_size = size - pieces->first_size;
}

/* Find the room for at most `most` bytes, to be sent in place; how many bytes there is room for.
 * IVSHMEM_AGAIN: for none. IVSHMEM_CLOSED: the other end receives no more. */
static inline int64_t ivshmem_send_begin(struct ivshmem_stream *stream, uint64_t most,
                                         struct ivshmem_pieces *pieces)
{
    struct ivshmem_other_end other;
    uint64_t size;
    int code = ivshmem_stream_look(stream, &other);
    if (code != 0)
        return code;
    if (stream->sends_no_more || other.closed || other.receives_no_more)
        return IVSHMEM_CLOSED;
    stream->passed = other.received;
    size = stream->channel->layout.cell_bytes - ivshmem_ahead(stream->sent, other.received);
    size = size < most ? size : most;
    if (size == 0)
        return IVSHMEM_AGAIN;
    ivshmem_stream_pieces(stream, stream->end, stream->sent, size, pieces);
    return (int64_t)size;
}

/* Send the first `size` bytes of the room that was found. */
static inline void ivshmem_send_end(struct ivshmem_stream *stream, uint64_t size)
{
    stream->sent = (stream->sent + size) & IVSHMEM_VALUE_MASK;
    ivshmem_stream_store(stream);
    ivshmem_stream_wake(stream);
}

/* Find what was received, at most `most` bytes, to be used in place; how many. 0: the other end
 * sends no more. IVSHMEM_AGAIN: nothing yet. IVSHMEM_CLOSED: the other end ended without saying
 * so. */
static inline int64_t ivshmem_receive_begin(struct ivshmem_stream *stream, uint64_t most,
                                            struct ivshmem_pieces *pieces)
{
    struct ivshmem_other_end other;
    uint64_t size;
    int code = ivshmem_stream_look(stream, &other);
    if (code != 0)
        return code;
    size = ivshmem_ahead(other.sent, stream->received);
    if (stream->receives_no_more)
        return 0;
    if (size == 0)
        return other.sends_no_more ? 0 : other.closed ? IVSHMEM_CLOSED : IVSHMEM_AGAIN;
    size = size < most ? size : most;
    ivshmem_stream_pieces(stream, 1u - stream->end, stream->received, size, pieces);
    return (int64_t)size;
}

/* Free the first `size` bytes of what was found. */
static inline void ivshmem_receive_end(struct ivshmem_stream *stream, uint64_t size)
{
    stream->received = (stream->received + size) & IVSHMEM_VALUE_MASK;
    ivshmem_stream_store(stream);
    ivshmem_stream_wake_for(stream, 1);
}

/* Send as much as there is room for; how many bytes. Errors as of ivshmem_send_begin. */
static inline int64_t ivshmem_send(struct ivshmem_stream *stream, const void *data, uint64_t size)
{
    struct ivshmem_pieces pieces = {NULL, NULL, 0, 0};
    int64_t found = ivshmem_send_begin(stream, size, &pieces);
    if (found <= 0)
        return found;
    IVSHMEM_COPY(pieces.first, data, pieces.first_size);
    IVSHMEM_COPY(pieces.second, (const unsigned char *)data + pieces.first_size,
                 pieces.second_size);
    ivshmem_send_end(stream, (uint64_t)found);
    return found;
}

/* Receive what there is, at most `room` bytes; how many. 0 and errors as of
 * ivshmem_receive_begin. */
static inline int64_t ivshmem_receive(struct ivshmem_stream *stream, void *data, uint64_t room)
{
    struct ivshmem_pieces pieces = {NULL, NULL, 0, 0};
    int64_t found = ivshmem_receive_begin(stream, room, &pieces);
    if (found <= 0)
        return found;
    IVSHMEM_COPY(data, pieces.first, pieces.first_size);
    IVSHMEM_COPY((unsigned char *)data + pieces.first_size, pieces.second, pieces.second_size);
    ivshmem_receive_end(stream, (uint64_t)found);
    return found;
}

/* Send no more (half-close), receive no more, or both. */
static inline void ivshmem_stream_shutdown(struct ivshmem_stream *stream, int sending,
                                           int receiving)
{
    stream->sends_no_more |= sending ? IVSHMEM_FIN : 0u;
    stream->receives_no_more |= receiving ? IVSHMEM_FIN : 0u;
    ivshmem_stream_store(stream);
    ivshmem_stream_wake(stream);
}

/* Before an end that can neither send nor receive sleeps. The caller looks again afterwards, and
 * calls ivshmem_sleep_end. */
static inline void ivshmem_stream_sleep(struct ivshmem_stream *stream)
{
    stream->sleep.more = 0;
    ivshmem_sleep_begin(stream->channel, &stream->sleep);
}

/* Once a beat: store again what a late store of a former owner may have spoiled. */
static inline void ivshmem_stream_beat(struct ivshmem_stream *stream)
{
    const struct ivshmem_channel *channel = stream->channel;
    uint64_t at = ivshmem_end_at(channel, stream->connection, stream->end);
    if (ivshmem_get(channel, at) ==
            ivshmem_word(stream->sent, stream->sends_no_more, stream->epoch) &&
        ivshmem_get(channel, at + 8u) ==
            ivshmem_word(stream->received, stream->receives_no_more, stream->epoch))
        return;
    ivshmem_stream_store(stream);
    ivshmem_stream_wake(stream);
}

/* Free one's own end. The other one finds it closed. */
static inline void ivshmem_stream_free(struct ivshmem_stream *stream)
{
    const struct ivshmem_channel *channel = stream->channel;
    uint64_t at = ivshmem_end_owner_at(channel, stream->connection, stream->end);
    uint64_t peer_at = ivshmem_end_owner_at(channel, stream->connection, 1u - stream->end);
    uint64_t peer = ivshmem_get(channel, peer_at);
    /* A caller that closed first left its end for the acceptor to free. */
    if (stream->end == 1 && ivshmem_flags(peer) == IVSHMEM_SLOT_CLOSING &&
        ivshmem_epoch(peer) == stream->epoch)
        ivshmem_slot_free(channel, peer_at, peer);
    ivshmem_slot_free(
        channel, at, ivshmem_place_word(stream->member->place, IVSHMEM_SLOT_OPEN, stream->epoch));
    ivshmem_stream_wake(stream);
}

/* Close by a reset: after what was sent, the other end gets IVSHMEM_CLOSED. That this end sends no
 * more is taken back, if it was said; the other one may have seen that already. */
static inline void ivshmem_stream_abort(struct ivshmem_stream *stream)
{
    stream->sends_no_more = 0;
    ivshmem_stream_store(stream);
    ivshmem_stream_free(stream);
}

/* Close. What was sent can still be received, also by a listener that accepts later; unless no
 * process listens now. */
static inline void ivshmem_stream_close(struct ivshmem_stream *stream)
{
    const struct ivshmem_channel *channel = stream->channel;
    uint64_t at = ivshmem_end_owner_at(channel, stream->connection, 0);
    struct ivshmem_place place = stream->member->place;
    uint64_t mine = ivshmem_place_word(place, IVSHMEM_SLOT_OPEN, stream->epoch);
    uint64_t closing = ivshmem_place_word(place, IVSHMEM_SLOT_CLOSING, stream->epoch);
    ivshmem_stream_shutdown(stream, 1, 1);
    if (stream->end == 1) {
        ivshmem_stream_free(stream);
        return;
    }
    if (!ivshmem_exchange(&channel->area.memory, channel->at + at, mine, closing))
        return;
    if (ivshmem_epoch(ivshmem_get(channel, at + 8u)) == stream->epoch || /* it was accepted */
        !ivshmem_is_listened_to(stream->member, channel))
        ivshmem_slot_free(channel, at, closing);
    ivshmem_stream_wake(stream);
}

#endif
