/* A value under schedules: what a reader gets is whole, and never older than what it got before; what
 * was set last stays, whoever ended, and each change wakes a reader that waits for one. */
#include "script_parties.h"

enum { LENGTH = 16 };

static unsigned sets;      /* of each writer */
static unsigned finished;  /* writers that have ended */
static unsigned ending;    /* writers, one after the other in the slot */
static uint64_t last;      /* the head at the end; 0: it is not known, and each end of a writer wakes all */
static int is_shared;      /* a removed writer lives, whose late stores may spoil payload */
static int strayed_late;   /* it has done its last */
static int was_set_before; /* what a reader that waits for changes does not get */

/* -- what parties do ------------------------------------------------------------------------------- */

static uint64_t number_of(unsigned epoch, uint64_t position)
{
    return (uint64_t)epoch << 16 | position;
}

static void set_value(struct ivshmem_writer *writer)
{
    uint64_t words[2];
    words[0] = words[1] = number_of(writer->epoch, writer->next);
    must(ivshmem_put(writer, words, LENGTH, words[0], words[0]));
}

static void end_writing(struct party *party)
{
    CHECK(party->peer->writer.free_cells == channel.layout.cells_each - geometry.slots,
          party->peer->writer.free_cells);
    ivshmem_writer_close(&party->peer->writer);
    ivshmem_leave_area(&party->peer->member);
    finished++;
    if (last == 0)
        wake_all();
}

static void write_all(struct party *party)
{
    for (unsigned i = 0; i < sets; i++)
        set_value(&party->peer->writer);
    end_writing(party);
}

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
    write_all(party);
}

static uint64_t head_now(void)
{
    return ivshmem_value(*word_at(channel.at + channel.layout.heads));
}

/* Get the value, as it is now. Whether it was ever set. */
static int get(struct party *party)
{
    struct ivshmem_reader *reader = &party->peer->reader;
    struct ivshmem_message message;
    uint64_t words[2], position;
    while (1) {
        int was_set = head_now() != 0;
        int code = ivshmem_value_look(reader, &message);
        if (code == IVSHMEM_AGAIN) {
            CHECK(!was_set || is_shared, 0);
            return 0;
        }
        CHECK(code == 0, code);
        CHECK(message.length == LENGTH && message.user == message.time, message.length);
        IVSHMEM_COPY(words, region + message.offset, LENGTH);
        if (ivshmem_check(reader->channel, &message) == 0)
            break;
    }
    if (is_shared)
        words[0] = message.user;
    else
        CHECK(words[0] == words[1] && words[0] == message.user, words[0]);
    position = words[0] & 0xffff;
    CHECK(position == message.position, position);
    CHECK(position + 1 >= party->expected[0], position);
    CHECK(is_shared || position + 1 > party->expected[0] || words[0] == party->lost, words[0]);
    party->expected[0] = position + 1;
    party->lost = words[0]; /* what it got last */
    party->got++;
    return 1;
}

static void end_reading(struct party *party)
{
    ivshmem_reader_close(&party->peer->reader);
    ivshmem_leave_area(&party->peer->member);
}

/* Whether there will be no change any more. */
static int is_over(const struct ivshmem_source *source)
{
    return last == 0 && finished == ending && source->next == head_now();
}

/* Get each change until there will be none. */
static void read_changes(struct party *party)
{
    struct ivshmem_reader *reader = &party->peer->reader;
    struct ivshmem_source *source = &reader->sources[0];
    while (1) {
        if (ivshmem_value(ivshmem_head(reader->channel, 0)) != source->next && get(party))
            continue;
        if (last != 0 ? source->next == last : is_over(source))
            break;
        ivshmem_sleep_begin(reader->channel, &reader->sleep);
        if (ivshmem_value(ivshmem_head(reader->channel, 0)) == source->next && !is_over(source))
            wait_for_ring();
        ivshmem_sleep_end(reader->channel, &reader->sleep);
    }
    end_reading(party);
}

/* Get it again and again, also what is there already. */
static void read_often(struct party *party)
{
    for (int i = 0; i < 6 && finished != ending; i++) {
        get(party);
        pause_party();
    }
    while (finished != ending && last == 0)
        wait_for_ring();
    get(party);
    end_reading(party);
}

/* -- death and removal ------------------------------------------------------------------------------- */

/* The first party dies at some step, or has ended before; that is proven. */
static void bury_first(struct party *party)
{
    int had_ended = parties[0].verb == IS_OVER;
    if (!had_ended)
        kill_party(0);
    had_ended = parties[0].verb == IS_OVER;
    free_place(party, 0);
    if (!had_ended)
        finished++;
    wake_all();
    ivshmem_leave_area(&party->peer->member);
}

static void remove_first(struct party *party)
{
    pause_party();
    free_place(party, 0);
    ivshmem_leave_area(&party->peer->member);
}

static void write_one_late(struct party *party)
{
    set_value(&party->peer->writer);
    ivshmem_writer_close(&party->peer->writer);
    finished++;
    ivshmem_full_fence(&channel.area.memory);
    parties[1].was_rung = 1; /* the heir's next beat comes after that */
    strayed_late = 1;
}

static void inherit_slot(struct party *party)
{
    open_slot(party);
    set_value(&party->peer->writer);
    set_value(&party->peer->writer);
    while (!strayed_late)
        wait_for_ring();
    ivshmem_writer_beat(&party->peer->writer);
    set_value(&party->peer->writer);
    end_writing(party);
}

/* -- scripts --------------------------------------------------------------------------------------- */

static struct party *add_writer(const char *name, void (*program)(struct party *party))
{
    struct party *party = add_party(name, program);
    must(open_writer(party->peer));
    return party;
}

static void add_reader(const char *name, void (*program)(struct party *party))
{
    must(open_reader(add_party(name, program)->peer, IVSHMEM_OVERWRITE));
}

static void begin(unsigned readers, unsigned changes)
{
    const struct ivshmem_geometry each = {.kind = IVSHMEM_VALUE, .overflow = IVSHMEM_OVERWRITE,
                                          .writers = 1, .readers = readers, .slots = 2,
                                          .loans = 1, .views = 1, .limit = LENGTH};
    begin_area(&each);
    sets = changes;
    ending = 1;
}

static void latest(void)
{
    begin(1, 5);
    last = 5;
    add_writer("w0", write_all);
    add_reader("r0", read_changes);
}

static void two_readers(void)
{
    begin(2, 3);
    add_writer("w0", write_all);
    add_reader("r0", read_changes);
    add_reader("r1", read_often);
}

static void the_next_owner(void)
{
    begin(2, 2);
    ending = 2;
    add_writer("w0", write_all);
    add_party("next", follow_writer);
    add_reader("r0", read_changes);
    add_reader("r1", read_often);
}

static void the_writer_dies(void)
{
    begin(1, 3);
    ending = 2;
    add_writer("w0", write_all);
    add_party("undertaker", bury_first);
    add_party("next", follow_writer);
    add_reader("r0", read_often);
}

/* The first writer has ended before; the next one dies while it opens, or later. */
static void the_next_owner_dies(void)
{
    struct party *heir;
    begin(2, 2);
    heir = add_writer("next", follow_writer);
    set_value(&heir->peer->writer);
    ivshmem_writer_close(&heir->peer->writer);
    was_set_before = 1;
    add_party("undertaker", bury_first);
    add_reader("r0", read_often);
    add_reader("r1", read_changes);
}

static void a_removed_writer_lives(void)
{
    begin(1, 1);
    ending = 2;
    is_shared = 1;
    add_writer("w0", write_one_late);
    add_party("next", inherit_slot);
    add_reader("r0", read_often);
    add_party("user", remove_first);
}

/* -- what is there at the end ------------------------------------------------------------------------ */

/* As the case of the model that it follows. */
static void read_until_last(struct party *party)
{
    struct ivshmem_reader *reader = &party->peer->reader;
    struct ivshmem_source *source = &reader->sources[0];
    while (get(party) && source->next != last) {
        ivshmem_sleep_begin(reader->channel, &reader->sleep);
        if (ivshmem_value(ivshmem_head(reader->channel, 0)) == source->next)
            wait_for_ring();
        ivshmem_sleep_end(reader->channel, &reader->sleep);
    }
    end_reading(party);
}

/* Get each change until the last one, or until the writer is gone; then free its slot. */
static void read_until_gone(struct party *party)
{
    struct ivshmem_reader *reader = &party->peer->reader;
    struct ivshmem_source *source = &reader->sources[0];
    const struct ivshmem_place writer = parties[0].peer->member.place;
    int is_gone;
    while (1) {
        is_gone = ivshmem_is_gone(&channel.area, writer);
        CHECK(get(party), 0);
        if (is_gone || source->next == last)
            break;
        ivshmem_sleep_begin(reader->channel, &reader->sleep);
        if (ivshmem_value(ivshmem_head(reader->channel, 0)) == source->next &&
            !ivshmem_is_gone(&channel.area, writer))
            wait_for_ring();
        ivshmem_sleep_end(reader->channel, &reader->sleep);
    }
    if (is_gone) {
        ivshmem_writer_reap(&party->peer->member, &channel, 0);
        CHECK(ivshmem_flags(ivshmem_writer_owner(&channel, 0)) == IVSHMEM_SLOT_FREE, 0);
    }
    end_reading(party);
}

static void get_twice(struct party *party)
{
    CHECK(get(party), 0);
    CHECK(get(party), 0);
    end_reading(party);
}

/* Take the slot if its owner is gone by now. */
static void inherit_if_gone(struct party *party)
{
    int code = open_writer(party->peer);
    if (code == IVSHMEM_TAKEN) {
        ivshmem_leave_area(&party->peer->member);
        return;
    }
    must(code);
    CHECK(parties[0].is_dead || parties[0].verb == IS_OVER, 0); /* one that is silent keeps it */
    write_all(party);
}

/* So often that each slot has the cell that it has in the model. */
static void add_writer_that_has_set_it(void)
{
    struct party *writer = add_writer("w0", write_all);
    for (int i = 0; i < 6; i++)
        set_value(&writer->peer->writer);
}

static void as_latest(void)
{
    begin(1, 2);
    last = 8;
    add_writer_that_has_set_it();
    add_reader("r0", read_until_last);
}

static void as_the_writer_dies(void)
{
    begin(1, 2);
    last = 8;
    add_writer_that_has_set_it();
    add_reader("r0", read_until_gone);
}

static void as_the_next_owner(void)
{
    begin(1, 1);
    add_writer_that_has_set_it();
    add_reader("r0", get_twice);
    add_party("next", inherit_if_gone);
}

static void reset(void)
{
    finished = 0;
    strayed_late = 0;
}

static void check(void)
{
    static struct ivshmem_reader late;
    struct ivshmem_message message;
    uint64_t words[2], head = head_now();
    late.channel = &channel;
    late.member = &peers[0].member;
    late.slot = IVSHMEM_NO_SLOT;
    late.sources[0].epoch = 0;
    if (head != 0) {
        must(ivshmem_value_look(&late, &message));
        memcpy(words, region + message.offset, LENGTH);
        CHECK(message.position == head - 1 && (message.user & 0xffff) == head - 1, head);
        CHECK(is_shared || (words[0] == words[1] && words[0] == message.user), words[0]);
    }
    for (unsigned i = 0; i < party_count; i++) {
        if (parties[i].program == read_often || (parties[i].program == read_changes && !was_set_before))
            CHECK(parties[i].expected[0] == head, parties[i].expected[0]);
    }
    all_is_back();
}

/* What is there is the value, and the slot is free when the place of the dead writer is. */
static void check_mortal(void)
{
    if (parties[0].is_dead)
        befalls(&parties[0], IS_GONE);
    check();
}

int main(int argc, char **argv)
{
    static const struct script scripts[] = {
        {"latest", latest, check},
        {"two-readers", two_readers, check},
        {"as-latest", as_latest, check},
        {"as-the-writer-dies", as_the_writer_dies, check_mortal},
        {"as-the-next-owner", as_the_next_owner, check_mortal},
        {"as-the-writer-comes-back", as_the_next_owner, check},
        {"the-next-owner", the_next_owner, check},
        {"the-writer-dies", the_writer_dies, check},
        {"the-next-owner-dies", the_next_owner_dies, check},
        {"a-removed-writer-lives", a_removed_writer_lives, check}};
    return run_scripts(argc, argv, scripts, sizeof scripts / sizeof *scripts);
}
