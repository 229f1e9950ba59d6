/* A process is killed or stopped at each step that it makes with a channel of messages, or while it
 * creates or removes a channel; see steps.h. */
#include "steps.h"

enum { MESSAGES = 9 };

static const struct ivshmem_geometry geometry = {.kind = IVSHMEM_MESSAGES,
                                                 .overflow = IVSHMEM_OVERWRITE | IVSHMEM_BLOCK |
                                                             IVSHMEM_DISCARD,
                                                 .writers = 2,
                                                 .readers = READERS,
                                                 .slots = SLOTS,
                                                 .loans = LOANS,
                                                 .views = 2,
                                                 .limit = LONG};

static int put(struct peer *peer, uint64_t number)
{
    return ivshmem_put(&peer->writer, filled(number), LONG, number, number);
}

static int get(struct peer *peer, struct ivshmem_message *message, uint64_t *number)
{
    uint64_t words[WORDS];
    int code = ivshmem_read(&peer->reader, message, words, LONG);
    if (code != 0)
        return code;
    CHECK(message->length == LONG, message->length);
    *number = number_in(words);
    CHECK(message->user == *number && message->time == *number, message->user);
    return 0;
}

/* Read all that is there, from message `next` on: in order, and none is missing. The next one. */
static uint64_t drain(struct peer *peer, uint64_t next)
{
    struct ivshmem_message message;
    uint64_t number;
    while (get(peer, &message, &number) == 0) {
        CHECK(message.lost == 0, message.lost);
        CHECK(number == next, number);
        next++;
    }
    return next;
}

/* -- the child writes ---------------------------------------------------------------------------- */

static uint64_t drained;

static void listen_to_it(struct peer *peer)
{
    drained = 0;
    CHECK(open_reader(peer, IVSHMEM_BLOCK) == 0, 0);
}

static void write_messages(void)
{
    static struct peer peer;
    must(join(&peer));
    must(open_channel(&peer, channel_name));
    must(open_writer(&peer));
    for (uint64_t i = 0; i < MESSAGES; i++) {
        int code;
        aside->began = (int64_t)i + 1;
        code = put(&peer, i);
        if (code == IVSHMEM_AGAIN) {
            code = ivshmem_writer_sleep(&peer.writer);
            if (code == IVSHMEM_AGAIN) { /* no reader: enough */
                ivshmem_sleep_end(&peer.channel, &peer.writer.sleep);
                break;
            }
            must(code);
            code = put(&peer, i); /* there is room now */
        }
        must(code);
        aside->ended = (int64_t)i + 1;
        must(ivshmem_beat(&peer.member) < 0);
    }
    ivshmem_writer_close(&peer.writer);
    ivshmem_leave_area(&peer.member);
}

static void read_what_there_is(struct peer *peer)
{
    drained = drain(peer, drained);
    CHECK(drained >= (uint64_t)aside->ended, drained);
}

/* Two writers and a reader go on, in the slots that the child had. */
static void write_in_turn(struct peer *peer)
{
    static struct peer second;
    CHECK(join(&second) == 0, 0);
    CHECK(open_channel(&second, channel_name) == 0, 0);
    CHECK(open_writer(peer) == 0, 0); /* every writer's slot can be taken */
    CHECK(open_writer(&second) == 0, 0);
    for (uint64_t i = 0; i < 3 * SLOTS; i++) {
        struct ivshmem_message message;
        uint64_t number;
        CHECK(put(i % 2 ? peer : &second, i) == 0, i);
        CHECK(get(peer, &message, &number) == 0 && number == i, number);
    }
    ivshmem_writer_close(&second.writer);
    ivshmem_writer_close(&peer->writer);
    ivshmem_leave_area(&second.member);
}

static void read_and_write(struct peer *peer)
{
    read_what_there_is(peer);
    CHECK(drained <= (uint64_t)aside->began, drained);
    if (ivshmem_reader_sleep(&peer->reader) == IVSHMEM_AGAIN)
        ivshmem_sleep_end(&peer->channel, &peer->reader.sleep);
    write_in_turn(peer);
}

/* -- the child takes a slot whose former owner published ------------------------------------------- */

enum { FORMER = 6 }; /* messages; more than SLOTS, so that they went round */

static void publish_and_close(struct peer *peer)
{
    CHECK(open_writer(peer) == 0, 0);
    for (uint64_t i = 0; i < FORMER; i++)
        CHECK(put(peer, i) == 0, i);
    ivshmem_writer_close(&peer->writer);
}

static void publish_one_more(void)
{
    static struct peer peer;
    must(join(&peer));
    must(open_channel(&peer, channel_name));
    must(open_writer(&peer));
    CHECK(peer.writer.slot == 0, peer.writer.slot);
    aside->began = 1;
    must(put(&peer, FORMER));
    aside->ended = 1;
    ivshmem_writer_close(&peer.writer);
    ivshmem_leave_area(&peer.member);
}

/* A late reader gets what the two published, but perhaps one message, which the child had in hand. */
static void read_history(struct peer *peer)
{
    struct ivshmem_message message;
    uint64_t number, next = 0, count = 0;
    peer->reader.channel = &peer->channel;
    peer->reader.member = &peer->member;
    peer->reader.overflow = IVSHMEM_OVERWRITE;
    CHECK(ivshmem_reader_open(&peer->reader, SLOTS - 1) == 0, 0);
    while (get(peer, &message, &number) == 0) {
        CHECK(number >= next, number);
        next = number + 1;
        count++;
    }
    CHECK(next <= FORMER + (uint64_t)aside->began, next);
    CHECK(next >= FORMER + (uint64_t)aside->ended - (count < SLOTS - 1), next);
    CHECK(count >= SLOTS - 2, count);
    ivshmem_reader_close(&peer->reader);
}

static void read_history_and_write(struct peer *peer)
{
    read_history(peer);
    CHECK(open_writer(peer) == 0, 0); /* the next owner takes over what that one left */
    CHECK(peer->writer.slot == 0, peer->writer.slot);
    read_history(peer);
    ivshmem_writer_close(&peer->writer);
    CHECK(open_reader(peer, IVSHMEM_OVERWRITE) == 0, 0);
    write_in_turn(peer);
}

/* -- the child reads ----------------------------------------------------------------------------- */

static void write_some(struct peer *peer)
{
    CHECK(open_writer(peer) == 0, 0);
    for (uint64_t i = 0; i < 3; i++)
        CHECK(put(peer, i) == 0, i);
}

static void read_messages(enum ivshmem_overflow overflow)
{
    static struct peer peer;
    struct ivshmem_message message;
    uint64_t number, next = 0;
    must(join(&peer));
    must(open_channel(&peer, channel_name));
    peer.reader.channel = &peer.channel;
    peer.reader.member = &peer.member;
    peer.reader.overflow = overflow;
    must(ivshmem_reader_open(&peer.reader, 3));
    for (int i = 0; i < 3; i++) {
        int code = get(&peer, &message, &number);
        if (code == IVSHMEM_AGAIN)
            break;
        must(code);
        CHECK(number >= next, number);
        next = number + 1;
    }
    if (ivshmem_reader_sleep(&peer.reader) == IVSHMEM_AGAIN)
        ivshmem_sleep_end(&peer.channel, &peer.reader.sleep);
    must(ivshmem_beat(&peer.member) < 0);
    ivshmem_reader_close(&peer.reader);
    ivshmem_leave_area(&peer.member);
}

static void block(void)
{
    read_messages(IVSHMEM_BLOCK);
}

static void overwrite(void)
{
    read_messages(IVSHMEM_OVERWRITE);
}

static void discard(void)
{
    read_messages(IVSHMEM_DISCARD);
}

static void is_not_held_up(struct peer *peer)
{
    for (uint64_t i = 3; i < 3 + 3 * SLOTS; i++) {
        int code = put(peer, i);
        CHECK(code == 0, code);
    }
}

static void is_read_by_others(struct peer *peer)
{
    static struct peer second;
    CHECK(join(&second) == 0, 0);
    CHECK(open_channel(&second, channel_name) == 0, 0);
    for (unsigned i = 0; i < geometry.readers; i++) /* every reader's slot can be taken */
        CHECK(open_reader(&second, IVSHMEM_OVERWRITE) == 0, i);
    for (uint64_t i = 0; i < 3 * SLOTS; i++) {
        struct ivshmem_message message;
        uint64_t number;
        CHECK(put(peer, i) == 0, i);
        CHECK(get(&second, &message, &number) == 0 && number == i, number);
    }
    ivshmem_writer_close(&peer->writer);
    ivshmem_leave_area(&second.member);
}

/* A reader that blocks in the child's slot; the writer fills what it leaves. */
static struct peer other;

static void other_joins(struct peer *peer)
{
    CHECK(join(&other) == 0, 0);
    CHECK(open_channel(&other, channel_name) == 0, 0);
    CHECK(open_reader(&other, IVSHMEM_BLOCK) == 0, 0);
    CHECK(other.reader.slot == 0, other.reader.slot);
    for (uint64_t i = 0; i < SLOTS; i++)
        CHECK(put(peer, 100 + i) == 0, i);
}

/* What the child stored late lets the writer overwrite nothing that it has yet to read. */
static void other_lost_nothing(struct peer *peer)
{
    CHECK(put(peer, 104) == IVSHMEM_AGAIN, 0);
    CHECK(ivshmem_beat(&other.member) >= 0, 0);
    ivshmem_reader_beat(&other.reader);
    CHECK(drain(&other, 100) == 104, 0);
    CHECK(put(peer, 104) == 0, 0);
    CHECK(drain(&other, 104) == 105, 0);
    ivshmem_reader_close(&other.reader);
    ivshmem_leave_area(&other.member);
}

/* -- the child makes or removes a channel -------------------------------------------------------- */

static void nothing(struct peer *peer)
{
    (void)peer;
}

static void create_one(void)
{
    static struct peer peer;
    must(join(&peer));
    must(create(&peer, other_name, &geometry));
    ivshmem_leave_area(&peer.member);
}

static void remove_one(void)
{
    static struct peer peer;
    must(join(&peer));
    must(create(&peer, other_name, &geometry));
    must(open_channel(&peer, other_name));
    must(ivshmem_remove(&peer.member, &peer.channel, 0));
    ivshmem_leave_area(&peer.member);
}

int main(int argc, char **argv)
{
    static const struct operation operations[] = {
        {"write", &geometry, listen_to_it, write_messages, read_what_there_is, read_and_write, NULL,
         NULL},
        {"adopt", &geometry, publish_and_close, publish_one_more, read_history, read_history_and_write,
         NULL, NULL},
        {"block", &geometry, write_some, block, is_not_held_up, is_read_by_others, other_joins,
         other_lost_nothing},
        {"overwrite", &geometry, write_some, overwrite, is_not_held_up, is_read_by_others, other_joins,
         other_lost_nothing},
        {"discard", &geometry, write_some, discard, is_not_held_up, is_read_by_others, other_joins,
         other_lost_nothing},
        {"create", &geometry, nothing, create_one, nothing, nothing, NULL,
         NULL},
        {"remove", &geometry, nothing, remove_one, nothing, nothing, NULL,
         NULL}};
    return run_all(argc, argv, operations, sizeof operations / sizeof *operations);
}
