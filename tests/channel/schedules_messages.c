/* Messages under schedules: every message is right, in order, and none is lost or doubled except as
 * the reader's way to overflow says; nobody sleeps for ever; all slots and cells come back. */
#include "script_parties.h"

enum { LENGTH = 16 };

static uint64_t totals[2], finished; /* puts of each writer, and how many writers have ended */
static unsigned ending;              /* writers, one after the other in a slot or at once */
static uint64_t discarded;           /* of the reader that drops the newest */
static int may_lose;  /* a blocking reader: writers take it for silent, or a late store spoils words */
static int strayed_late; /* a party that was removed has done its last */
static int is_shared; /* a removed writer lives, whose late stores may spoil payload */

/* -- what parties do ------------------------------------------------------------------------------- */

static uint64_t number_of(unsigned writer, unsigned epoch, uint64_t position)
{
    return (uint64_t)(writer + 1) << 32 | (uint64_t)epoch << 16 | position;
}

/* Wait until a blocking reader has room. */
static void wait_for_room(struct ivshmem_writer *writer)
{
    int code = ivshmem_writer_sleep(writer);
    if (code == IVSHMEM_AGAIN) {
        wait_for_ring();
        ivshmem_sleep_end(writer->channel, &writer->sleep);
    } else {
        CHECK(code == 0, code);
    }
}

/* Where a removed writer lives, its messages and its heir's have different lengths. */
static uint32_t length_of(unsigned epoch)
{
    return is_shared && epoch > 1 ? LENGTH / 2 : LENGTH;
}

static void fill(const struct ivshmem_writer *writer, uint64_t *words)
{
    words[0] = words[1] = number_of(writer->slot, writer->epoch, writer->next);
}

static void put_loan(struct ivshmem_writer *writer)
{
    uint64_t words[2];
    uint32_t cell = 0;
    int code;
    fill(writer, words);
    must(ivshmem_loan(writer, &cell));
    IVSHMEM_COPY(region + writer->cells_at + cell * writer->channel->layout.cell_bytes, words, LENGTH);
    while ((code = ivshmem_publish(writer, cell, length_of(writer->epoch), words[0], words[0])) ==
           IVSHMEM_AGAIN)
        wait_for_room(writer);
    CHECK(code == 0, code);
}

static void put_copy(struct ivshmem_writer *writer)
{
    uint64_t words[2];
    int code;
    fill(writer, words);
    while ((code = ivshmem_put(writer, words, LENGTH, words[0], words[0])) == IVSHMEM_AGAIN)
        wait_for_room(writer);
    CHECK(code == 0, code);
    discarded += writer->missed;
}

/* Add messages with one announcement. */
static void put_together(struct ivshmem_writer *writer, int count)
{
    for (int i = 0; i < count; i++) {
        uint64_t words[2];
        uint32_t cell = 0;
        while (ivshmem_writer_ready(writer) == IVSHMEM_AGAIN) {
            ivshmem_writer_announce(writer);
            wait_for_room(writer);
        }
        fill(writer, words);
        must(ivshmem_loan(writer, &cell));
        IVSHMEM_COPY(region + writer->cells_at + cell * writer->channel->layout.cell_bytes, words,
                     LENGTH);
        ivshmem_writer_add(writer, cell, LENGTH, words[0], words[0]);
    }
    ivshmem_writer_announce(writer);
}

/* Tell all that this writer has ended: for the test alone, as no word of a channel says it. */
static void end_writing(struct party *party)
{
    struct ivshmem_writer *writer = &party->peer->writer;
    CHECK(writer->free_cells == channel.layout.cells_each - geometry.slots ||
              geometry.overflow & IVSHMEM_DISCARD,
          writer->free_cells);
    for (unsigned i = 0; geometry.overflow & IVSHMEM_DISCARD && i < geometry.readers; i++) {
        const struct ivshmem_backlog *backlog = &writer->tables.backlogs[i];
        CHECK(backlog->is_open || backlog->head == backlog->tail, backlog->tail);
    }
    ivshmem_writer_close(writer);
    ivshmem_leave_area(&party->peer->member);
    finished++;
    wake_all();
}

static void write_loans(struct party *party)
{
    for (uint64_t i = 0; i < totals[party->peer->writer.slot]; i++)
        put_loan(&party->peer->writer);
    end_writing(party);
}

static void write_copies(struct party *party)
{
    for (uint64_t i = 0; i < totals[party->peer->writer.slot]; i++)
        put_copy(&party->peer->writer);
    end_writing(party);
}

static void write_together(struct party *party)
{
    put_together(&party->peer->writer, (int)totals[0]);
    end_writing(party);
}

/* One message was read: is it the next one? */
static void got(struct party *party, const struct ivshmem_message *message, const uint64_t *words)
{
    const struct ivshmem_reader *reader = &party->peer->reader;
    uint64_t *expected = &party->expected[message->writer], position = message->position;
    unsigned epoch = (unsigned)(message->user >> 16) & 0xffff;
    CHECK(message->length == length_of(epoch), message->length);
    if (is_shared)
        words = &message->user;
    else
        CHECK(words[0] == words[1], words[1]);
    CHECK(message->user == words[0] && message->time == words[0], message->user);
    if (reader->overflow == IVSHMEM_DISCARD) /* its backlog has positions of its own */
        position = words[0] & 0xffff;
    CHECK(words[0] == number_of(message->writer, epoch, position), words[0]);
    CHECK(epoch <= ivshmem_epoch(message->stamp), epoch); /* less: the next owner has adopted it */
    if (reader->overflow == IVSHMEM_DISCARD)
        CHECK(position >= *expected && (message->lost == 0 || may_lose), position);
    else
        CHECK(position == *expected + message->lost, position);
    if (reader->overflow == IVSHMEM_BLOCK && !may_lose)
        CHECK(message->lost == 0, message->lost);
    *expected = position + 1;
    party->lost += message->lost;
    party->got++;
}

static int read_copy(struct party *party)
{
    struct ivshmem_message message;
    uint64_t words[2];
    int code = ivshmem_read(&party->peer->reader, &message, words, LENGTH);
    if (code == 0)
        got(party, &message, words);
    return code;
}

/* Look at a message in place; what was overwritten in the mean time does not count. */
static int read_view(struct party *party)
{
    struct ivshmem_reader *reader = &party->peer->reader;
    struct ivshmem_message message;
    uint64_t words[2];
    int code = ivshmem_take(reader, &message);
    if (code != 0)
        return code;
    /* What an entry says is of one message, also before its payload was looked at. */
    CHECK(message.user == message.time, message.time);
    IVSHMEM_COPY(words, region + message.offset, LENGTH);
    code = ivshmem_check(reader->channel, &message);
    if (code == 0)
        got(party, &message, words);
    else {
        ivshmem_reader_lose(reader, message.writer);
        party->expected[message.writer] += message.lost; /* it was told of them */
    }
    ivshmem_release(reader, message.writer, reader->sources[message.writer].next);
    return 0;
}

static int has_all(const struct party *party)
{
    const struct ivshmem_reader *reader = &party->peer->reader;
    if (finished != ending)
        return 0;
    for (unsigned i = 0; i < geometry.writers; i++)
        if (reader->sources[i].next !=
            ivshmem_value(*word_at(channel.at + ivshmem_source_head_at(reader, i))))
            return 0;
    return 1;
}

static void end_reading(struct party *party)
{
    ivshmem_reader_close(&party->peer->reader);
    ivshmem_leave_area(&party->peer->member);
}

static void read_all(struct party *party, int (*get)(struct party *party))
{
    struct ivshmem_reader *reader = &party->peer->reader;
    while (1) {
        int code = get(party);
        CHECK(code == 0 || code == IVSHMEM_AGAIN, code);
        if (code == 0)
            continue;
        if (has_all(party))
            break;
        if (ivshmem_reader_sleep(reader) == IVSHMEM_AGAIN) {
            if (!has_all(party))
                wait_for_ring();
            ivshmem_sleep_end(reader->channel, &reader->sleep);
        } else {
            pause_party(); /* a new owner is about to adopt what is there */
        }
    }
    end_reading(party);
}

static void read_copies(struct party *party)
{
    read_all(party, read_copy);
}

static void read_views(struct party *party)
{
    read_all(party, read_view);
}

/* Take the slot of a reader that drops the newest, when it is free. */
static void join_in_its_slot(struct party *party)
{
    struct ivshmem_reader *reader = &party->peer->reader;
    int code;
    while ((code = ivshmem_reader_open(reader, 0)) == IVSHMEM_TAKEN)
        pause_party();
    must(code);
    party->expected[0] = reader->overflow == IVSHMEM_DISCARD ? 0 : reader->sources[0].next;
    read_all(party, read_copy);
}

static void read_one(struct party *party)
{
    struct ivshmem_reader *reader = &party->peer->reader;
    while (read_view(party) == IVSHMEM_AGAIN)
        if (ivshmem_reader_sleep(reader) == IVSHMEM_AGAIN) {
            wait_for_ring();
            ivshmem_sleep_end(reader->channel, &reader->sleep);
        }
    end_reading(party);
}

/* A reader that blocks need not look at the stamp again: its messages stay until it releases them. */
static int read_kept(struct party *party)
{
    struct ivshmem_reader *reader = &party->peer->reader;
    struct ivshmem_message message;
    uint64_t words[2];
    int code = ivshmem_take(reader, &message);
    if (code != 0)
        return code;
    IVSHMEM_COPY(words, region + message.offset, LENGTH);
    got(party, &message, words);
    ivshmem_release(reader, message.writer, reader->sources[message.writer].next);
    return 0;
}

static void read_kept_ones(struct party *party)
{
    read_all(party, read_kept);
}

/* Join, with the history that `wanted` says. */
static uint32_t wanted;

static void join_and_read(struct party *party)
{
    struct ivshmem_reader *reader = &party->peer->reader;
    must(ivshmem_reader_open(reader, wanted));
    for (unsigned i = 0; i < geometry.writers; i++) {
        uint64_t next = reader->sources[i].next;
        CHECK(wanted == 0 || next == 0 || next != ivshmem_value(*word_at(channel.at + channel.layout.heads)), next);
        party->expected[i] = next;
    }
    read_all(party, read_copy);
}

/* -- death, silence, and removal --------------------------------------------------------------------- */

/* The first party dies at some step, or has ended before; that is proven. */
static void bury_first(struct party *party)
{
    int had_ended = parties[0].verb == IS_OVER;
    if (!had_ended)
        kill_party(0);
    had_ended = parties[0].verb == IS_OVER;
    free_place(party, 0);
    if (!had_ended && parties[0].peer->writer.channel != NULL)
        finished++;
    wake_all();
    ivshmem_leave_area(&party->peer->member);
}

/* Writers take the reader, party 1, for silent from now on. */
static void fall_silent(struct party *party)
{
    struct ivshmem_member *writer = &parties[0].peer->member;
    struct ivshmem_place place = parties[1].peer->member.place;
    pause_party();
    writer->pulses[place.index].beat = ivshmem_word(0, 0, place.epoch);
    writer->pulses[place.index].since = 0;
    writer->looked = LEASE + 1;
    parties[0].was_rung = 1; /* as its beat does */
    ivshmem_leave_area(&party->peer->member);
}

/* The place of the first party is freed at a user's word, though it lives. */
static void remove_first(struct party *party)
{
    pause_party();
    free_place(party, 0);
    ivshmem_leave_area(&party->peer->member);
}

/* What was stored late is visible; the heir's next beat comes after that. */
static void stray(unsigned heir)
{
    ivshmem_full_fence(&channel.area.memory);
    parties[heir].was_rung = 1;
    strayed_late = 1;
}

static void write_one_late(struct party *party)
{
    uint64_t words[2];
    fill(&party->peer->writer, words);
    ivshmem_put(&party->peer->writer, words, LENGTH, words[0], words[0]);
    ivshmem_writer_close(&party->peer->writer);
    finished++;
    stray(1);
}

/* Read on in a backlog that is another reader's now, and store tails late. What it sees tells nothing:
 * no writer waits for it. */
static void read_late(struct party *party)
{
    struct ivshmem_reader *reader = &party->peer->reader;
    for (int i = 0; i < 20; i++) {
        struct ivshmem_message message;
        if (ivshmem_take(reader, &message) == 0)
            ivshmem_release(reader, message.writer, reader->sources[message.writer].next);
    }
    ivshmem_reader_close(&party->peer->reader);
    stray(1);
}

static void read_one_late(struct party *party)
{
    struct ivshmem_reader *reader = &party->peer->reader;
    struct ivshmem_message message;
    if (ivshmem_take(reader, &message) == 0)
        ivshmem_release(reader, message.writer, reader->sources[message.writer].next);
    if (ivshmem_reader_sleep(reader) == IVSHMEM_AGAIN)
        ivshmem_sleep_end(reader->channel, &reader->sleep);
    ivshmem_reader_close(reader);
    stray(1);
}

/* Beat late, which stores a policy and tails that are another reader's now. */
static void beat_late(struct party *party)
{
    for (int i = 0; i < 4 && finished != ending; i++) {
        pause_party();
        ivshmem_reader_beat(&party->peer->reader);
    }
    ivshmem_reader_close(&party->peer->reader);
    stray(1);
}

/* The next owner of the first writer's slot. */
static void open_slot(struct party *party)
{
    int code;
    while ((code = open_writer(party->peer)) == IVSHMEM_TAKEN)
        pause_party();
    must(code);
}

static void follow_writer(struct party *party)
{
    open_slot(party);
    for (int i = 0; i < 2; i++)
        put_copy(&party->peer->writer);
    end_writing(party);
}

static void inherit_slot(struct party *party)
{
    open_slot(party);
    put_loan(&party->peer->writer);
    while (!strayed_late)
        wait_for_ring();
    ivshmem_writer_beat(&party->peer->writer);
    put_loan(&party->peer->writer);
    end_writing(party);
}

/* Take the slot of a reader that was removed, and lose nothing, in spite of what that one stores. */
static void inherit_row(struct party *party)
{
    struct ivshmem_reader *reader = &party->peer->reader;
    int code;
    while ((code = ivshmem_reader_open(reader, 0)) == IVSHMEM_TAKEN)
        pause_party();
    must(code);
    party->expected[0] = reader->sources[0].next;
    while (1) {
        code = read_copy(party);
        CHECK(code == 0 || code == IVSHMEM_AGAIN, code);
        if (code == 0)
            continue;
        if (has_all(party))
            break;
        if (ivshmem_reader_sleep(reader) == IVSHMEM_AGAIN) {
            if (!has_all(party))
                wait_for_ring();
            ivshmem_sleep_end(reader->channel, &reader->sleep);
        } else {
            pause_party();
        }
        ivshmem_reader_beat(reader);
    }
    end_reading(party);
}

/* -- what is there at the beginning ------------------------------------------------------------------ */

static struct party *add_writer(const char *name, void (*program)(struct party *party))
{
    struct party *party = add_party(name, program);
    must(open_writer(party->peer));
    return party;
}

static struct party *add_reader(const char *name, void (*program)(struct party *party),
                                enum ivshmem_overflow overflow)
{
    struct party *party = add_party(name, program);
    must(open_reader(party->peer, overflow));
    return party;
}

static struct party *add_joiner(const char *name, void (*program)(struct party *party),
                                enum ivshmem_overflow overflow)
{
    struct party *party = add_party(name, program);
    party->peer->reader.channel = &party->peer->channel;
    party->peer->reader.member = &party->peer->member;
    party->peer->reader.overflow = overflow;
    return party;
}

static void begin(unsigned writers, unsigned readers, unsigned overflow, uint64_t messages)
{
    const struct ivshmem_geometry each = {.kind = IVSHMEM_MESSAGES, .overflow = overflow,
                                          .writers = writers, .readers = readers, .slots = 2,
                                          .loans = 1, .views = 1, .limit = LENGTH};
    begin_area(&each);
    totals[0] = totals[1] = messages;
    ending = writers;
    wanted = 1;
}

static void block(void)
{
    begin(1, 1, IVSHMEM_BLOCK, 5);
    add_writer("w0", write_loans);
    add_reader("r0", read_copies, IVSHMEM_BLOCK);
}

static void overwrite(void)
{
    begin(1, 1, IVSHMEM_OVERWRITE, 7);
    add_writer("w0", write_copies);
    add_reader("r0", read_views, IVSHMEM_OVERWRITE);
}

static void discard(void)
{
    begin(1, 1, IVSHMEM_OVERWRITE | IVSHMEM_DISCARD, 6);
    add_writer("w0", write_copies);
    add_reader("r0", read_copies, IVSHMEM_DISCARD);
}

static void together(void)
{
    begin(1, 1, IVSHMEM_BLOCK, 4);
    add_writer("w0", write_together);
    add_reader("r0", read_kept_ones, IVSHMEM_BLOCK);
}

static void join_later(void)
{
    struct party *writer;
    begin(1, 1, IVSHMEM_BLOCK, 3);
    writer = add_writer("w0", write_loans);
    put_loan(&writer->peer->writer);
    put_loan(&writer->peer->writer);
    add_joiner("r0", join_and_read, IVSHMEM_BLOCK);
}

static void leave(void)
{
    begin(1, 1, IVSHMEM_BLOCK, 4);
    add_writer("w0", write_loans);
    add_reader("r0", read_one, IVSHMEM_BLOCK);
}

static void two_writers(void)
{
    begin(2, 1, IVSHMEM_BLOCK, 2);
    add_writer("w0", write_loans);
    add_writer("w1", write_copies);
    add_reader("r0", read_views, IVSHMEM_BLOCK);
}

static void two_readers(void)
{
    begin(1, 2, IVSHMEM_BLOCK | IVSHMEM_OVERWRITE, 3);
    add_writer("w0", write_loans);
    add_reader("r0", read_copies, IVSHMEM_BLOCK);
    add_reader("r1", read_views, IVSHMEM_OVERWRITE);
}

static void a_writer_dies(void)
{
    begin(1, 1, IVSHMEM_BLOCK, 3);
    add_writer("w0", write_loans);
    add_reader("r0", read_copies, IVSHMEM_BLOCK);
    add_party("undertaker", bury_first);
}

static void a_reader_dies(void)
{
    begin(1, 2, IVSHMEM_BLOCK | IVSHMEM_DISCARD, 4);
    add_reader("r0", read_copies, IVSHMEM_BLOCK);
    add_writer("w0", write_loans);
    add_party("undertaker", bury_first);
}

/* The slots of a dead reader: another one that drops the newest takes it. */
static void a_discarding_reader_dies(void)
{
    begin(1, 1, IVSHMEM_OVERWRITE | IVSHMEM_DISCARD, 8);
    add_reader("r0", read_copies, IVSHMEM_DISCARD);
    add_writer("w0", write_copies);
    add_party("undertaker", bury_first);
    add_joiner("r1", join_in_its_slot, IVSHMEM_DISCARD);
}

/* The next reader of its slot blocks. */
static void one_blocks_after_it(void)
{
    begin(1, 1, IVSHMEM_BLOCK | IVSHMEM_DISCARD, 8);
    add_reader("r0", read_copies, IVSHMEM_DISCARD);
    add_writer("w0", write_copies);
    add_party("undertaker", bury_first);
    add_joiner("r1", join_in_its_slot, IVSHMEM_BLOCK);
}

static void one_discards_after_a_blocking_one(void)
{
    begin(1, 1, IVSHMEM_BLOCK | IVSHMEM_DISCARD, 8);
    add_reader("r0", read_copies, IVSHMEM_BLOCK);
    add_writer("w0", write_copies);
    add_party("undertaker", bury_first);
    add_joiner("r1", join_in_its_slot, IVSHMEM_DISCARD);
}

static void a_removed_reader_discards(void)
{
    begin(1, 1, IVSHMEM_OVERWRITE | IVSHMEM_DISCARD, 9);
    may_lose = 1;
    add_reader("r0", read_late, IVSHMEM_DISCARD);
    add_writer("w0", write_copies);
    add_party("user", remove_first);
    add_joiner("r1", join_in_its_slot, IVSHMEM_DISCARD);
}

/* One that joins late finds what a former owner of the slot published. */
static void history(void)
{
    begin(1, 1, IVSHMEM_BLOCK, 2);
    ending = 2;
    add_writer("w0", write_loans);
    add_joiner("r0", join_and_read, IVSHMEM_BLOCK);
    add_party("next", follow_writer);
}

static void a_reader_is_silent(void)
{
    begin(1, 1, IVSHMEM_BLOCK, 6);
    may_lose = 1;
    add_writer("w0", write_loans);
    add_reader("r0", read_copies, IVSHMEM_BLOCK);
    add_party("clock", fall_silent);
}

static void the_next_owner(void)
{
    begin(1, 1, IVSHMEM_BLOCK, 2);
    ending = 2;
    add_writer("w0", write_loans);
    add_reader("r0", read_copies, IVSHMEM_BLOCK);
    add_party("next", follow_writer);
}

static void the_next_owner_of_a_dead_one(void)
{
    begin(1, 1, IVSHMEM_OVERWRITE, 3);
    ending = 2;
    add_writer("w0", write_copies);
    add_reader("r0", read_views, IVSHMEM_OVERWRITE);
    add_party("undertaker", bury_first);
    add_party("next", follow_writer);
}

static void a_removed_writer_lives(void)
{
    begin(1, 1, IVSHMEM_OVERWRITE, 1);
    ending = 2;
    may_lose = is_shared = 1;
    add_writer("w0", write_one_late);
    add_party("next", inherit_slot);
    add_reader("r0", read_copies, IVSHMEM_OVERWRITE);
    add_party("user", remove_first);
}

static void a_removed_reader_lives(void)
{
    begin(1, 1, IVSHMEM_BLOCK, 5);
    add_reader("r0", read_one_late, IVSHMEM_BLOCK);
    add_joiner("r1", inherit_row, IVSHMEM_BLOCK);
    add_writer("w0", write_loans);
    add_party("user", remove_first);
}

/* A late policy hides the next reader's, so that writers do not wait for it until its beat: it may lose
 * messages, and is told of each. */
static void a_removed_reader_beats(void)
{
    begin(1, 1, IVSHMEM_BLOCK, 7);
    may_lose = 1;
    add_reader("r0", beat_late, IVSHMEM_BLOCK);
    add_joiner("r1", inherit_row, IVSHMEM_BLOCK);
    add_writer("w0", write_loans);
    add_party("user", remove_first);
}

/* As the cases of the model that these follow. */
static void as_block(void)
{
    block();
    totals[0] = 3;
    has_all_looks = 1;
}

/* Get all messages, or those that there are when the writer is gone; then its slot is free. */
static void read_until_gone(struct party *party)
{
    struct ivshmem_reader *reader = &party->peer->reader;
    const struct ivshmem_place writer = parties[0].peer->member.place;
    int is_gone = 0;
    while (party->got < totals[0]) {
        is_gone = ivshmem_is_gone(&channel.area, writer);
        if (read_copy(party) == 0)
            continue;
        if (is_gone)
            break;
        if (ivshmem_reader_sleep(reader) == IVSHMEM_AGAIN) {
            if (!ivshmem_is_gone(&channel.area, writer))
                wait_for_ring();
            ivshmem_sleep_end(reader->channel, &reader->sleep);
        }
    }
    if (is_gone) {
        ivshmem_reader_settle(reader);
        CHECK(ivshmem_flags(ivshmem_writer_owner(&channel, 0)) == IVSHMEM_SLOT_FREE, 0);
    }
    end_reading(party);
}

static void as_a_writer_dies(void)
{
    begin(1, 1, IVSHMEM_BLOCK, 3);
    has_all_looks = 1;
    add_writer("w0", write_loans);
    add_reader("r0", read_until_gone, IVSHMEM_BLOCK);
}

static void as_overwrite(void)
{
    begin(1, 1, IVSHMEM_OVERWRITE, 3);
    add_writer("w0", write_loans);
    add_reader("r0", read_copies, IVSHMEM_OVERWRITE);
}

static void read_two(struct party *party)
{
    struct ivshmem_reader *reader = &party->peer->reader;
    while (party->got < 2) {
        if (read_copy(party) == 0)
            continue;
        if (ivshmem_reader_sleep(reader) == IVSHMEM_AGAIN) {
            wait_for_ring();
            ivshmem_sleep_end(reader->channel, &reader->sleep);
        }
    }
    end_reading(party);
}

static void as_discard(void)
{
    begin(1, 1, IVSHMEM_OVERWRITE | IVSHMEM_DISCARD, 3);
    add_writer("w0", write_loans);
    add_reader("r0", read_two, IVSHMEM_DISCARD);
}

static void as_join(void)
{
    join_later();
    wanted = 0;
    totals[0] = 2;
}

static void as_two_writers(void)
{
    begin(2, 1, IVSHMEM_BLOCK, 1);
    has_all_looks = 1;
    add_writer("w0", write_loans);
    add_writer("w1", write_loans);
    add_reader("r0", read_copies, IVSHMEM_BLOCK);
}

/* -- what is there at the end ------------------------------------------------------------------------ */

static void reset(void)
{
    finished = discarded = 0;
    strayed_late = 0;
}

static void check(void)
{
    uint64_t total = 0;
    for (unsigned i = 0; i < geometry.writers; i++)
        total += ivshmem_value(ivshmem_head(&channel, i));
    for (unsigned i = 0; i < party_count; i++) {
        struct party *party = &parties[i];
        if (!party->is_dead &&
            (party->program == read_copies || party->program == read_views ||
             party->program == read_kept_ones)) {
            uint64_t missing = party->peer->reader.overflow == IVSHMEM_DISCARD
                                   ? discarded
                                   : ivshmem_reader_lost(&party->peer->reader);
            CHECK(party->got + missing == total, party->got);
        }
    }
    all_is_back();
}

/* A living reader has all that was published, and all is free when the place of the dead one is. */
static void check_mortal(void)
{
    if (!parties[1].is_dead)
        CHECK(parties[1].got == ivshmem_value(ivshmem_head(&channel, 0)), parties[1].got);
    for (unsigned i = 0; i < party_count; i++)
        if (parties[i].is_dead)
            befalls(&parties[i], IS_GONE);
    check();
}

int main(int argc, char **argv)
{
    static const struct script scripts[] = {
        {"block", block, check},           {"overwrite", overwrite, check},
        {"discard", discard, check},       {"together", together, check},
        {"join", join_later, check},       {"leave", leave, check},
        {"two-writers", two_writers, check}, {"two-readers", two_readers, check},
        {"a-writer-dies", a_writer_dies, check},
        {"a-reader-dies", a_reader_dies, check},
        {"a-discarding-reader-dies", a_discarding_reader_dies, check},
        {"one-blocks-after-it", one_blocks_after_it, check},
        {"one-discards-after-it", one_discards_after_a_blocking_one, check},
        {"a-removed-reader-discards", a_removed_reader_discards, check},
        {"a-removed-reader-beats", a_removed_reader_beats, check},
        {"history", history, check},
        {"as-block", as_block, check},
        {"as-a-writer-dies", as_a_writer_dies, check_mortal},
        {"as-a-reader-dies", as_block, check_mortal},
        {"as-overwrite", as_overwrite, check},
        {"as-discard", as_discard, check},
        {"as-join", as_join, check},
        {"as-two-writers", as_two_writers, check},
        {"a-reader-is-silent", a_reader_is_silent, check},
        {"the-next-owner", the_next_owner, check},
        {"the-next-owner-of-a-dead-one", the_next_owner_of_a_dead_one, check},
        {"a-removed-writer-lives", a_removed_writer_lives, check},
        {"a-removed-reader-lives", a_removed_reader_lives, check}};
    return run_scripts(argc, argv, scripts, sizeof scripts / sizeof *scripts);
}
