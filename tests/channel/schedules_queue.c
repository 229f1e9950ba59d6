/* A queue under schedules: each message goes to one reader, and is lost only with a reader that died
 * while it copied it; one that a dead or silent reader had is delivered again, and that is told. */
#include "script_parties.h"

enum { LENGTH = 16, MOST = 8 };

static unsigned total, ended_writers; /* messages of each writer; writers that have put all */
static unsigned delivered[2][MOST], done[2][MOST];
static unsigned of_the_first, ending; /* messages of the first owner of a slot; writers in all */
static int one_may_be_lost, is_in_order;

static uint64_t number_of(unsigned writer, unsigned which)
{
    return (uint64_t)(writer + 1) << 32 | which;
}

/* -- what parties do ------------------------------------------------------------------------------- */

/* Whether nothing is left, and nothing will come. */
static int is_over(void)
{
    unsigned missing = 0;
    for (unsigned i = 0; i < geometry.writers; i++)
        for (unsigned j = 0; j < total; j++)
            missing += done[i][j] == 0;
    for (unsigned i = 0; i < geometry.writers; i++)
        for (unsigned j = 0; j < geometry.slots; j++) {
            unsigned state = ivshmem_flags(*word_at(channel.at + ivshmem_claim_at(&channel, i, j)));
            if (state != IVSHMEM_CLAIM_NONE && state != IVSHMEM_CLAIM_ONCE)
                return 0;
        }
    return ended_writers == ending && missing <= (unsigned)one_may_be_lost;
}

static void write_some(struct party *party, unsigned from, unsigned to)
{
    struct ivshmem_writer *writer = &party->peer->writer;
    for (unsigned i = from; i < to; i++) {
        uint64_t words[2];
        words[0] = words[1] = number_of(writer->slot, i);
        while (1) {
            int code = ivshmem_queue_put(writer, words, LENGTH, words[0], words[0]);
            if (code == 0)
                break;
            CHECK(code == IVSHMEM_AGAIN, code);
            ivshmem_queue_writer_sleep(writer);
            if (ivshmem_queue_ready(writer) == IVSHMEM_AGAIN)
                wait_for_ring();
            ivshmem_sleep_end(writer->channel, &writer->sleep);
        }
    }
    CHECK(writer->free_cells == geometry.loans, writer->free_cells);
    ivshmem_writer_close(writer);
    ivshmem_leave_area(&party->peer->member);
    ended_writers++;
    if (is_over()) /* else only the queue's own rings wake the readers */
        wake_all();
}

static void write_all(struct party *party)
{
    write_some(party, 0, of_the_first);
}

/* Take the slot of a writer that has closed, or died, and put the rest. */
static void follow_writer(struct party *party)
{
    int code;
    while ((code = open_writer(party->peer)) == IVSHMEM_TAKEN)
        pause_party();
    must(code);
    write_some(party, of_the_first, total);
}

/* A reader that leaves, and frees the slots of writers that have ended. */
static void close_reader(struct party *party)
{
    ivshmem_reader_close(&party->peer->reader);
    ivshmem_leave_area(&party->peer->member);
}

static void got(struct party *party, const struct ivshmem_taken *taken, const uint64_t *words)
{
    unsigned writer = taken->message.writer, which = (unsigned)words[0] & 0xff;
    CHECK(words[0] == words[1], words[1]);
    CHECK(taken->message.user == words[0] && taken->message.time == words[0], taken->message.user);
    CHECK(which < total && words[0] == number_of(writer, which), words[0]);
    if (is_in_order)
        CHECK(which >= party->expected[writer], which);
    party->expected[writer] = which + 1;
    party->got++;
}

static void is_done(const struct ivshmem_taken *taken, const uint64_t *words)
{
    unsigned *count = &done[taken->message.writer][words[0] & 0xff];
    CHECK(*count == 0, words[0]);
    (*count)++;
}

/* Take one at most once. */
static int get_one(struct party *party)
{
    struct ivshmem_taken taken;
    uint64_t words[2];
    int code = ivshmem_queue_read(&party->peer->reader, 1, words, LENGTH, &taken);
    if (code == 0) {
        got(party, &taken, words);
        is_done(&taken, words);
    }
    return code;
}

static int take(struct party *party, struct ivshmem_taken *taken, uint64_t *words)
{
    int code = ivshmem_queue_take(&party->peer->reader, IVSHMEM_CLAIM_TAKEN, 1, taken);
    if (code == 0) {
        IVSHMEM_COPY(words, region + taken->message.offset, LENGTH);
        if (!taken->redelivered)
            CHECK(delivered[taken->message.writer][words[0] & 7]++ == 0, words[0]);
    }
    return code;
}

/* Take one at least once. */
static int take_one(struct party *party)
{
    struct ivshmem_taken taken;
    uint64_t words[2];
    int code = take(party, &taken, words);
    if (code != 0)
        return code;
    if (ivshmem_queue_done(&party->peer->reader, &taken) == 0) {
        got(party, &taken, words);
        is_done(&taken, words);
    }
    return 0;
}

/* Take one, and give it back the first time. */
static int fail_one(struct party *party)
{
    struct ivshmem_taken taken;
    uint64_t words[2];
    int code = take(party, &taken, words);
    if (code != 0)
        return code;
    if (!taken.redelivered) {
        must(ivshmem_queue_return(&party->peer->reader, &taken));
    } else {
        must(ivshmem_queue_done(&party->peer->reader, &taken));
        got(party, &taken, words);
        is_done(&taken, words);
    }
    return 0;
}

/* Take one and give it back, which counts. */
static int return_one(struct party *party)
{
    struct ivshmem_taken taken;
    uint64_t words[2];
    int code = take(party, &taken, words);
    if (code != 0)
        return code;
    must(ivshmem_queue_return(&party->peer->reader, &taken));
    party->got++;
    return 0;
}

static void end_reading(struct party *party)
{
    ivshmem_reader_close(&party->peer->reader);
    ivshmem_leave_area(&party->peer->member);
    if (is_over())
        wake_all();
}

/* Take until there is nothing any more, or so many. */
static void read_until(struct party *party, int (*get)(struct party *party), uint64_t most)
{
    struct ivshmem_reader *reader = &party->peer->reader;
    int slept = 0;
    while (party->got < most) {
        int code = get(party);
        CHECK(code == 0 || code == IVSHMEM_AGAIN || code == IVSHMEM_OVERTAKEN, code);
        if (slept)
            ivshmem_queue_pass_on(reader);
        slept = 0;
        if (code != IVSHMEM_AGAIN)
            continue;
        if (is_over())
            break;
        if (ivshmem_queue_sleep(reader) == IVSHMEM_AGAIN && !is_over())
            wait_for_ring();
        ivshmem_queue_awake(reader);
        slept = 1;
    }
    end_reading(party);
}

static void get_all(struct party *party)
{
    read_until(party, get_one, ~UINT64_C(0));
}

static void get_once(struct party *party)
{
    read_until(party, get_one, 1);
}

static void return_once(struct party *party)
{
    read_until(party, return_one, 1);
}

static void take_all(struct party *party)
{
    read_until(party, take_one, ~UINT64_C(0));
}

static void fail_all(struct party *party)
{
    read_until(party, fail_one, ~UINT64_C(0));
}

static void bury_first(struct party *party)
{
    if (parties[0].verb != IS_OVER)
        kill_party(0);
    free_place(party, 0);
    ivshmem_leave_area(&party->peer->member);
    wake_all();
}

/* The other reader takes the first party for silent from now on. */
static void fall_silent(struct party *party)
{
    struct ivshmem_place place = parties[0].peer->member.place;
    pause_party();
    for (unsigned i = 1; i < 3; i++) {
        struct ivshmem_member *member = &parties[i].peer->member;
        member->pulses[place.index].beat = ivshmem_word(0, 0, place.epoch);
        member->pulses[place.index].since = 0;
        member->looked = LEASE + 1;
    }
    ivshmem_leave_area(&party->peer->member);
    wake_all();
}

/* -- scripts --------------------------------------------------------------------------------------- */

static void begin(unsigned writers, unsigned readers, unsigned messages)
{
    const struct ivshmem_geometry each = {.kind = IVSHMEM_QUEUE, .writers = writers,
                                          .readers = readers, .slots = 2, .loans = 1, .views = 1,
                                          .limit = LENGTH};
    begin_area(&each);
    total = of_the_first = messages;
    ending = writers;
}

static void add_reader(const char *name, void (*program)(struct party *party))
{
    must(open_reader(add_party(name, program)->peer, IVSHMEM_OVERWRITE));
}

static void add_writer(const char *name)
{
    must(open_writer(add_party(name, write_all)->peer));
}

static void in_order(void)
{
    begin(1, 1, 5);
    is_in_order = 1;
    add_reader("r0", get_all);
    add_writer("w0");
}

static void get(void)
{
    begin(1, 2, 4);
    add_reader("r0", get_all);
    add_reader("r1", get_all);
    add_writer("w0");
}

static void acknowledge(void)
{
    begin(1, 2, 4);
    add_reader("r0", take_all);
    add_reader("r1", take_all);
    add_writer("w0");
}

static void fail_first(void)
{
    begin(1, 2, 3);
    add_reader("r0", fail_all);
    add_reader("r1", take_all);
    add_writer("w0");
}

static void return_and_leave(void)
{
    begin(1, 2, 1);
    add_reader("r0", return_once);
    add_reader("r1", take_all);
    add_writer("w0");
}

static void two_writers(void)
{
    begin(2, 1, 2);
    add_reader("r0", get_all);
    add_writer("w0");
    add_writer("w1");
}

static void one_each(void)
{
    begin(2, 2, 1);
    add_reader("r0", get_once);
    add_reader("r1", get_all);
    add_writer("w0");
    add_writer("w1");
}

/* It may have ended with a message, and died before it told the test. */
static void a_reader_dies(void)
{
    begin(1, 2, 3);
    one_may_be_lost = 1;
    add_reader("r0", take_all);
    add_reader("r1", take_all);
    add_writer("w0");
    add_party("undertaker", bury_first);
}

static void a_getting_reader_dies(void)
{
    begin(1, 2, 3);
    one_may_be_lost = 1;
    add_reader("r0", get_all);
    add_reader("r1", get_all);
    add_writer("w0");
    add_party("undertaker", bury_first);
}

static void a_reader_is_silent(void)
{
    begin(1, 2, 3);
    add_reader("r0", take_all);
    add_reader("r1", take_all);
    add_writer("w0");
    add_party("clock", fall_silent);
}

static void the_next_owner(void)
{
    begin(1, 2, 4);
    of_the_first = 2;
    ending = 2;
    add_reader("r0", get_all);
    add_reader("r1", close_reader);
    add_writer("w0");
    add_party("next", follow_writer);
}

/* A writer died when it had stored a claim, and no head yet. Two processes free its slot. */
static void the_claim_of_a_dead_one(void)
{
    struct ivshmem_writer *writer;
    unsigned the_epoch;
    begin(1, 2, 3);
    of_the_first = 0;
    add_reader("r0", get_all);
    add_reader("r1", close_reader);
    add_party("next", follow_writer);
    add_writer("w0");
    writer = &parties[3].peer->writer;
    the_epoch = removed_point != 0 ? 0 : writer->epoch; /* as it is without the point */
    ivshmem_store(&channel.area.memory, channel.at + ivshmem_claim_at(&channel, writer->slot, 0),
                  ivshmem_claim_word(0, 0, IVSHMEM_CLAIM_OPEN, the_epoch));
    ivshmem_leave_area(&parties[3].peer->member);
    party_count--;
}

/* -- as the cases of the model that these follow ----------------------------------------------------- */

/* The model fills a cell first, and waits for room then. */
static void write_loans(struct party *party)
{
    struct ivshmem_writer *writer = &party->peer->writer;
    for (unsigned i = 0; i < total; i++) {
        uint64_t words[2];
        uint32_t cell = 0;
        words[0] = words[1] = number_of(writer->slot, i);
        must(ivshmem_loan(writer, &cell));
        IVSHMEM_COPY(region + writer->cells_at + cell * writer->channel->layout.cell_bytes, words,
                     LENGTH);
        while (ivshmem_queue_ready(writer) == IVSHMEM_AGAIN) {
            ivshmem_queue_writer_sleep(writer);
            if (ivshmem_queue_ready(writer) == IVSHMEM_AGAIN)
                wait_for_ring();
            ivshmem_sleep_end(writer->channel, &writer->sleep);
        }
        ivshmem_queue_publish(writer, cell, LENGTH, words[0], words[0]);
    }
    write_some(party, total, total);
}

/* Take the next message, pass a ring on, and copy it. */
static void take_next(struct party *party, enum ivshmem_claim as, struct ivshmem_taken *taken,
                      uint64_t *words)
{
    struct ivshmem_reader *reader = &party->peer->reader;
    int thorough = 0;
    while (ivshmem_queue_take(reader, as, thorough, taken) != 0) {
        thorough = ivshmem_queue_sleep(reader) == 0;
        if (!thorough)
            wait_for_ring();
        ivshmem_queue_awake(reader);
    }
    ivshmem_queue_pass_on(reader);
    IVSHMEM_COPY(words, region + taken->message.offset, LENGTH);
}

static void read_as(struct party *party, enum ivshmem_claim as, uint64_t most)
{
    while (party->got < most) {
        struct ivshmem_taken taken;
        uint64_t words[2];
        take_next(party, as, &taken, words);
        must(ivshmem_queue_done(&party->peer->reader, &taken));
        got(party, &taken, words);
        is_done(&taken, words);
    }
    end_reading(party);
}

static void get_as(struct party *party)
{
    read_as(party, IVSHMEM_CLAIM_ONCE, total);
}

static void take_as(struct party *party)
{
    read_as(party, IVSHMEM_CLAIM_TAKEN, total);
}

/* Take a message and give it back, when the other reader has been told to begin. */
static void fail_as(struct party *party)
{
    const struct ivshmem_memory *memory = &channel.area.memory;
    struct ivshmem_taken taken;
    uint64_t words[2];
    take_next(party, IVSHMEM_CLAIM_TAKEN, &taken, words);
    ivshmem_load_barrier(memory);
    ivshmem_store(memory, channel.at + IVSHMEM_JOINS, 1);
    ivshmem_full_fence(memory);
    ring(NULL, 2, 0);
    must(ivshmem_queue_return(&party->peer->reader, &taken));
    end_reading(party);
}

static void second_as(struct party *party)
{
    while (ivshmem_load(&channel.area.memory, channel.at + IVSHMEM_JOINS) == 0)
        wait_for_ring();
    read_as(party, IVSHMEM_CLAIM_ONCE, 1);
}

/* Get until there were so many, or the writer is gone; then free its slot. */
static void get_from_mortal(struct party *party)
{
    struct ivshmem_reader *reader = &party->peer->reader;
    const struct ivshmem_place writer = parties[0].peer->member.place;
    int is_gone = 0;
    while (party->got < total) {
        struct ivshmem_taken taken;
        uint64_t words[2];
        is_gone = ivshmem_is_gone(&channel.area, writer);
        if (ivshmem_queue_take(reader, IVSHMEM_CLAIM_ONCE, 0, &taken) == 0) {
            ivshmem_queue_pass_on(reader);
            IVSHMEM_COPY(words, region + taken.message.offset, LENGTH);
            must(ivshmem_queue_done(reader, &taken));
            got(party, &taken, words);
            is_done(&taken, words);
            continue;
        }
        if (is_gone && !ivshmem_queue_has_more(reader))
            break;
        if (ivshmem_queue_sleep(reader) == IVSHMEM_AGAIN &&
            (is_gone || !ivshmem_is_gone(&channel.area, writer)))
            wait_for_ring();
        ivshmem_queue_awake(reader);
    }
    if (is_gone) {
        ivshmem_writer_reap(&party->peer->member, &channel, 0);
        CHECK(ivshmem_flags(ivshmem_writer_owner(&channel, 0)) == IVSHMEM_SLOT_FREE, 0);
    }
    end_reading(party);
}

/* Whether the only message is done. */
static int is_done_as(void)
{
    uint64_t head = ivshmem_head(&channel, 0);
    uint64_t claim = ivshmem_get(&channel, ivshmem_claim_at(&channel, 0, 0));
    return ivshmem_value(head) == 1 && ivshmem_flags(claim) == IVSHMEM_CLAIM_NONE;
}

/* Take a message, also of a reader that is silent, until it is done. */
static void take_until_done(struct party *party)
{
    struct ivshmem_reader *reader = &party->peer->reader;
    while (!is_done_as()) {
        struct ivshmem_taken taken;
        uint64_t words[2];
        if (ivshmem_queue_take(reader, IVSHMEM_CLAIM_TAKEN, 1, &taken) == 0) {
            ivshmem_queue_pass_on(reader);
            IVSHMEM_COPY(words, region + taken.message.offset, LENGTH);
            if (!taken.redelivered)
                CHECK(delivered[0][words[0] & 7]++ == 0, words[0]);
            if (ivshmem_queue_done(reader, &taken) == 0) {
                got(party, &taken, words);
                is_done(&taken, words);
            }
            ring(NULL, party == &parties[1] ? 2 : 1, 0); /* in place of the beat */
            continue;
        }
        if (ivshmem_queue_sleep(reader) == IVSHMEM_AGAIN && !is_done_as())
            wait_for_ring();
        ivshmem_queue_awake(reader);
    }
    end_reading(party);
}

static void begin_as(unsigned readers, unsigned messages)
{
    begin(1, readers, messages);
    must(open_writer(add_party("w0", write_loans)->peer));
}

static void as_get(void)
{
    begin_as(1, 3);
    add_reader("r0", get_as);
}

static void as_a_writer_dies(void)
{
    begin_as(1, 2);
    is_in_order = 1;
    add_reader("r0", get_from_mortal);
}

static void as_a_reader_comes_back(void)
{
    begin_as(2, 1);
    add_reader("r0", take_until_done);
    add_reader("r1", take_until_done);
}

static void as_take(void)
{
    begin_as(1, 3);
    add_reader("r0", take_as);
}

static void as_fail(void)
{
    begin_as(2, 1);
    add_reader("r0", fail_as);
    add_reader("r1", second_as);
}

static void reset(void)
{
    ended_writers = 0;
    memset(delivered, 0, sizeof delivered);
    memset(done, 0, sizeof done);
}

static void check(void)
{
    CHECK(is_over(), 0);
    for (unsigned i = 0; i < party_count; i++)
        for (unsigned j = 0; j < geometry.writers && parties[i].is_dead; j++)
            for (unsigned k = 0; k < geometry.slots; k++)
                ivshmem_claim_ends(&channel, j, k, ivshmem_writer_owner(&channel, j));
    all_is_back();
}

/* What was published was read, and all is free when the place of the dead writer is. */
static void check_mortal(void)
{
    uint64_t published = ivshmem_value(ivshmem_head(&channel, 0));
    CHECK(parties[1].got == published, parties[1].got);
    CHECK(parties[0].is_dead || published == total, published);
    if (parties[0].is_dead)
        befalls(&parties[0], IS_GONE);
    all_is_back();
}

int main(int argc, char **argv)
{
    static const struct script scripts[] = {
        {"in-order", in_order, check},
        {"get", get, check},
        {"acknowledge", acknowledge, check},
        {"fail-first", fail_first, check},
        {"return-and-leave", return_and_leave, check},
        {"two-writers", two_writers, check},
        {"one-each", one_each, check},
        {"a-reader-dies", a_reader_dies, check},
        {"a-getting-reader-dies", a_getting_reader_dies, check},
        {"as-get", as_get, check},
        {"as-take", as_take, check},
        {"as-a-reader-comes-back", as_a_reader_comes_back, check},
        {"as-a-writer-dies", as_a_writer_dies, check_mortal},
        {"as-fail", as_fail, check},
        {"the-next-owner", the_next_owner, check},
        {"the-claim-of-a-dead-one", the_claim_of_a_dead_one, check},
        {"a-reader-is-silent", a_reader_is_silent, check}};
    return run_scripts(argc, argv, scripts, sizeof scripts / sizeof *scripts);
}
