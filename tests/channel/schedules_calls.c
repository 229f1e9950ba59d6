/* Calls under schedules: each request runs at most once, and its caller gets the reply to it or hears
 * that its server is gone; "never ran" is said only of a call that never will; nobody sleeps for ever. */
#include "script_parties.h"

enum { LENGTH = 16, MOST = 4 };

static unsigned total, finished, ending; /* calls of each caller; callers that have ended, and will */
static unsigned ran[PARTIES][MOST], answered[PARTIES][MOST], told[PARTIES][MOST];
static unsigned replied_by[PARTIES][MOST]; /* 1 + the server's party */
static int is_given_up[PARTIES][MOST];     /* and was said never to have run */
static int may_be_lost; /* a server dies, or was removed: callers may be told so */
static unsigned share;  /* as the model: each server ends after so many calls */
static int passes_on;   /* a server passes each ring on before it works, as the model's */
static int is_shared;   /* a removed server lives, whose late stores may spoil replies */

static uint64_t number_of(const struct party *party, unsigned which)
{
    return (uint64_t)(party - parties + 1) << 32 | which;
}

/* -- callers --------------------------------------------------------------------------------------- */

static uint64_t begin_call(struct party *party, unsigned which)
{
    struct ivshmem_writer *caller = &party->peer->writer;
    uint64_t words[2];
    uint32_t cell = 0;
    while (ivshmem_queue_ready(caller) == IVSHMEM_AGAIN) {
        ivshmem_queue_writer_sleep(caller);
        if (ivshmem_queue_ready(caller) == IVSHMEM_AGAIN)
            wait_for_ring();
        ivshmem_sleep_end(caller->channel, &caller->sleep);
    }
    words[0] = words[1] = number_of(party, which);
    must(ivshmem_loan(caller, &cell));
    IVSHMEM_COPY(region + caller->cells_at + cell * caller->channel->layout.cell_bytes, words, LENGTH);
    return ivshmem_queue_publish(caller, cell, LENGTH, words[0], words[0]);
}

static void is_answered(struct party *party, unsigned which, uint64_t position, uint32_t length,
                        unsigned status)
{
    struct ivshmem_writer *caller = &party->peer->writer;
    const unsigned me = (unsigned)(party - parties);
    uint64_t words[2];
    int never;
    CHECK(length == LENGTH && status == replied_by[me][which], status);
    IVSHMEM_COPY(words, region + ivshmem_reply_offset(caller->channel, caller->slot, position), LENGTH);
    if (!is_shared)
        CHECK(words[0] == words[1] && words[0] == number_of(party, which) + 1000, words[0]);
    CHECK(ran[me][which] == 1, ran[me][which]);
    CHECK(ivshmem_call_end(caller, position, &never) == 1 && !never, never);
    answered[me][which]++;
}

/* Wait for a reply, or the news that there will be none. */
static void await_reply(struct party *party, unsigned which, uint64_t position)
{
    struct ivshmem_writer *caller = &party->peer->writer;
    const unsigned me = (unsigned)(party - parties);
    uint32_t length = 0;
    unsigned status = 0;
    int code, says = 0, never;
    while ((code = ivshmem_call_look(caller, position, &length, &status)) == IVSHMEM_AGAIN) {
        if (says) {
            wait_for_ring();
            ivshmem_sleep_end(caller->channel, &caller->sleep);
        } else {
            ivshmem_queue_writer_sleep(caller);
        }
        says = !says;
    }
    if (says)
        ivshmem_sleep_end(caller->channel, &caller->sleep);
    if (code == 0) {
        is_answered(party, which, position, length, status);
    } else {
        CHECK((code == IVSHMEM_CLOSED && may_be_lost) || (code == IVSHMEM_CORRUPT && is_shared), code);
        ivshmem_call_end(caller, position, &never);
        told[me][which]++;
    }
}

static void end_calling(struct party *party)
{
    struct ivshmem_writer *caller = &party->peer->writer;
    CHECK(caller->free_cells == geometry.loans, caller->free_cells);
    ivshmem_writer_close(caller);
    ivshmem_leave_area(&party->peer->member);
    if (++finished == ending) /* else only the channel's own rings wake servers */
        wake_all();
}

static void call_all(struct party *party)
{
    for (unsigned i = 0; i < total; i++)
        await_reply(party, i, begin_call(party, i));
    end_calling(party);
}

/* Two at once, and the second one's reply is looked at first. */
static void call_two(struct party *party)
{
    for (unsigned i = 0; i < total; i += 2) {
        uint64_t first = begin_call(party, i), second = begin_call(party, i + 1);
        await_reply(party, i + 1, second);
        await_reply(party, i, first);
    }
    end_calling(party);
}

static void open_slot(struct party *party)
{
    int code;
    while ((code = open_writer(party->peer)) == IVSHMEM_TAKEN)
        pause_party();
    must(code);
}

static void call_later(struct party *party)
{
    open_slot(party);
    call_all(party);
}

/* Give each call but the last up, after a time that no server knows. */
static void give_up(struct party *party)
{
    struct ivshmem_writer *caller = &party->peer->writer;
    const unsigned me = (unsigned)(party - parties);
    for (unsigned i = 0; i + 1 < total; i++) {
        uint64_t position = begin_call(party, i);
        int never, is_over;
        uint32_t length = 0;
        unsigned status = 0;
        pause_party();
        if (ivshmem_call_look(caller, position, &length, &status) == 0) {
            is_answered(party, i, position, length, status);
            continue;
        }
        is_over = ivshmem_call_end(caller, position, &never);
        is_given_up[me][i] = never;
        CHECK(is_over || !never, never);
        while (!is_over) { /* its server has yet to reply */
            ivshmem_queue_writer_sleep(caller);
            is_over = ivshmem_call_end(caller, position, &never);
            CHECK(!never, i);
            if (!is_over)
                wait_for_ring();
            ivshmem_sleep_end(caller->channel, &caller->sleep);
        }
    }
    await_reply(party, total - 1, begin_call(party, total - 1));
    end_calling(party);
}

/* -- servers --------------------------------------------------------------------------------------- */

/* Serve a request. The reply's status is the server's. */
static int serve(struct party *party)
{
    struct ivshmem_reader *server = &party->peer->reader;
    const unsigned me = (unsigned)(party - parties) + 1;
    struct ivshmem_taken taken;
    uint64_t words[2];
    unsigned caller, which;
    int code = ivshmem_queue_take(server, IVSHMEM_CLAIM_TAKEN, 1, &taken);
    if (code != 0)
        return code;
    CHECK(!taken.redelivered && taken.message.length == LENGTH, taken.redelivered);
    if (passes_on)
        ivshmem_queue_pass_on(server);
    IVSHMEM_COPY(words, region + taken.message.offset, LENGTH);
    /* The reply's stores may overtake these loads: nobody looks at a reply before its claim says that it
     * is there, and that exchange is a fence. This memory takes any store for an announcement. */
    ivshmem_load_barrier(&channel.area.memory);
    if (!is_shared)
        CHECK(words[0] == words[1] && words[0] == taken.message.user, words[0]);
    words[0] = taken.message.user;
    caller = (unsigned)(words[0] >> 32) - 1;
    which = (unsigned)words[0];
    CHECK(caller < party_count && which < total, words[0]);
    CHECK(ran[caller][which]++ == 0, words[0]);
    replied_by[caller][which] = me;
    words[0] = words[1] = words[0] + 1000;
    IVSHMEM_COPY(region + ivshmem_reply_offset(server->channel, taken.message.writer,
                                               taken.message.position),
                 words, LENGTH);
    code = ivshmem_reply(server, &taken, LENGTH, me);
    CHECK(code == 0 || (code == IVSHMEM_OVERTAKEN && is_shared), code);
    party->got++;
    return 0;
}

static void end_serving(struct party *party)
{
    ivshmem_reader_close(&party->peer->reader);
    ivshmem_leave_area(&party->peer->member);
}

/* Serve until all callers have ended, or so many calls. */
static void serve_until(struct party *party, uint64_t most)
{
    struct ivshmem_reader *server = &party->peer->reader;
    int slept = 0;
    while (party->got < most) {
        int code = serve(party);
        CHECK(code == 0 || code == IVSHMEM_AGAIN, code);
        if (slept)
            ivshmem_queue_pass_on(server);
        slept = 0;
        if (code == 0)
            continue;
        if (finished == ending)
            break;
        if (ivshmem_queue_sleep(server) == IVSHMEM_AGAIN && finished != ending)
            wait_for_ring();
        ivshmem_queue_awake(server);
        slept = 1;
    }
    end_serving(party);
}

static void serve_all(struct party *party)
{
    serve_until(party, ~UINT64_C(0));
}

static void serve_one(struct party *party)
{
    serve_until(party, 1);
}

/* Serve one that a process takes which has been removed, and does not know it. No caller rings it. */
static void serve_late(struct party *party)
{
    for (int i = 0; i < 20 && party->got == 0 && finished != ending; i++) {
        serve(party);
        pause_party();
    }
    ivshmem_reader_close(&party->peer->reader);
}

/* Take the slot of a server, when it is free. */
static void serve_later(struct party *party)
{
    struct ivshmem_reader *server = &party->peer->reader;
    int code;
    while ((code = ivshmem_reader_open(server, 0)) == IVSHMEM_TAKEN)
        pause_party();
    must(code);
    serve_all(party);
}

/* -- death, silence and removal ---------------------------------------------------------------------- */

static void bury_first(struct party *party)
{
    int had_ended = parties[0].verb == IS_OVER;
    if (!had_ended)
        kill_party(0);
    had_ended = parties[0].verb == IS_OVER;
    free_place(party, 0);
    if (!had_ended && parties[0].peer->writer.channel != NULL && ++finished == ending)
        wake_all();
    ivshmem_leave_area(&party->peer->member);
}

/* All take the first party for silent from now on. */
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

static void remove_first(struct party *party)
{
    pause_party();
    free_place(party, 0);
    ivshmem_leave_area(&party->peer->member);
}

/* -- scripts --------------------------------------------------------------------------------------- */

static void begin(unsigned callers, unsigned servers, unsigned calls)
{
    const struct ivshmem_geometry each = {.kind = IVSHMEM_CALLS, .writers = callers,
                                          .readers = servers, .slots = 2, .loans = 1, .views = 1,
                                          .limit = LENGTH};
    begin_area(&each);
    total = calls;
    ending = callers;
}

static void add_caller(const char *name, void (*program)(struct party *party))
{
    must(open_writer(add_party(name, program)->peer));
}

static void add_server(const char *name, void (*program)(struct party *party))
{
    must(open_reader(add_party(name, program)->peer, IVSHMEM_OVERWRITE));
}

static void add_later_server(const char *name)
{
    struct peer *peer = add_party(name, serve_later)->peer;
    peer->reader.channel = &peer->channel;
    peer->reader.member = &peer->member;
    peer->reader.overflow = IVSHMEM_OVERWRITE;
}

static void one_by_one(void)
{
    begin(1, 1, 4);
    add_caller("c0", call_all);
    add_server("s0", serve_all);
}

static void two_at_once(void)
{
    begin(1, 2, 4);
    add_caller("c0", call_two);
    add_server("s0", serve_all);
    add_server("s1", serve_all);
}

static void two_callers(void)
{
    begin(2, 1, 2);
    add_caller("c0", call_all);
    add_caller("c1", call_all);
    add_server("s0", serve_all);
}

static void one_each(void)
{
    begin(2, 2, 1);
    add_caller("c0", call_all);
    add_caller("c1", call_all);
    add_server("s0", serve_one);
    add_server("s1", serve_all);
}

static void given_up(void)
{
    begin(1, 2, 4);
    add_caller("c0", give_up);
    add_server("s0", serve_all);
    add_server("s1", serve_all);
}

static void a_server_dies(void)
{
    begin(1, 2, 2);
    may_be_lost = 1;
    add_server("s0", serve_all);
    add_server("s1", serve_all);
    add_caller("c0", call_two);
    add_party("undertaker", bury_first);
}

static void the_next_server(void)
{
    begin(1, 1, 2);
    may_be_lost = 1;
    add_server("s0", serve_all);
    add_caller("c0", call_all);
    add_party("undertaker", bury_first);
    add_later_server("s1");
}

static void a_caller_dies(void)
{
    begin(1, 1, 3);
    ending = 2;
    add_caller("c0", call_all);
    add_server("s0", serve_all);
    add_party("undertaker", bury_first);
    add_party("next", call_later);
}

static void a_server_is_silent(void)
{
    begin(1, 2, 2);
    add_server("s0", serve_all);
    add_server("s1", serve_all);
    add_caller("c0", call_two);
    add_party("clock", fall_silent);
}

static void a_removed_server_lives(void)
{
    begin(1, 1, 4);
    may_be_lost = is_shared = 1;
    add_server("s0", serve_late);
    add_caller("c0", call_all);
    add_party("user", remove_first);
    add_later_server("s1");
}

/* -- as the cases of the model that these follow ----------------------------------------------------- */

static void call_as(struct party *party)
{
    struct ivshmem_writer *caller = &party->peer->writer;
    for (unsigned i = 0; i < total; i++) {
        uint64_t position = begin_call(party, i);
        uint32_t length = 0;
        unsigned status = 0;
        while (ivshmem_call_look(caller, position, &length, &status) == IVSHMEM_AGAIN) {
            ivshmem_queue_writer_sleep(caller);
            if (ivshmem_call_waits(caller, position))
                wait_for_ring();
            ivshmem_sleep_end(caller->channel, &caller->sleep);
        }
        is_answered(party, i, position, length, status);
    }
    end_calling(party);
}

static void serve_as(struct party *party)
{
    struct ivshmem_reader *server = &party->peer->reader;
    while (party->got < share) {
        if (serve(party) == 0)
            continue;
        if (ivshmem_queue_sleep(server) == IVSHMEM_AGAIN)
            wait_for_ring();
        ivshmem_queue_awake(server);
    }
    end_serving(party);
}

/* Whether a call has neither a reply nor lost its server. */
static int waits_for_server(const struct ivshmem_writer *caller, uint64_t position)
{
    uint64_t claim = ivshmem_get(&channel, ivshmem_claim_at(&channel, caller->slot, position));
    unsigned state = ivshmem_flags(claim);
    return state == IVSHMEM_CLAIM_OPEN ||
           (state == IVSHMEM_CLAIM_TAKEN &&
            !ivshmem_is_gone(&channel.area, ivshmem_claimer(&channel, claim)));
}

/* Call, and be told if the server is gone. */
static void call_mortal(struct party *party)
{
    struct ivshmem_writer *caller = &party->peer->writer;
    for (unsigned i = 0; i < total; i++) {
        uint64_t position = begin_call(party, i);
        uint32_t length = 0;
        unsigned status = 0;
        int code;
        while ((code = ivshmem_call_look(caller, position, &length, &status)) == IVSHMEM_AGAIN) {
            ivshmem_queue_writer_sleep(caller);
            if (waits_for_server(caller, position))
                wait_for_ring();
            ivshmem_sleep_end(caller->channel, &caller->sleep);
        }
        if (code == 0)
            is_answered(party, i, position, length, status);
        else
            told[party - parties][i]++;
        CHECK(code == 0 || (code == IVSHMEM_CLOSED && may_be_lost), code);
        for (unsigned j = 1; j < party_count; j++) /* in place of the beat */
            ring(NULL, j, 0);
    }
    end_calling(party);
}

/* Whether the last call is over. */
static int is_done_as(void)
{
    uint64_t head = ivshmem_value(ivshmem_head(&channel, 0));
    uint64_t claim = ivshmem_get(&channel, ivshmem_claim_at(&channel, 0, total - 1));
    return head == total && ivshmem_flags(claim) == IVSHMEM_CLAIM_NONE;
}

static void serve_until_done(struct party *party)
{
    struct ivshmem_reader *server = &party->peer->reader;
    while (!is_done_as()) {
        if (serve(party) == 0)
            continue;
        if (ivshmem_queue_sleep(server) == IVSHMEM_AGAIN && !is_done_as())
            wait_for_ring();
        ivshmem_queue_awake(server);
    }
    end_serving(party);
}

/* Serve until there were so many calls, or the caller is gone; then free its slot. */
static void serve_mortal(struct party *party)
{
    struct ivshmem_reader *server = &party->peer->reader;
    const struct ivshmem_place caller = parties[0].peer->member.place;
    int is_gone = 0;
    while (party->got < share) {
        is_gone = ivshmem_is_gone(&channel.area, caller);
        if (serve(party) == 0)
            continue;
        if (is_gone)
            break;
        if (ivshmem_queue_sleep(server) == IVSHMEM_AGAIN && !ivshmem_is_gone(&channel.area, caller))
            wait_for_ring();
        ivshmem_queue_awake(server);
    }
    if (is_gone) {
        ivshmem_writer_reap(&party->peer->member, &channel, 0);
        CHECK(ivshmem_flags(ivshmem_writer_owner(&channel, 0)) == IVSHMEM_SLOT_FREE, 0);
    }
    end_serving(party);
}

static void as_call(void)
{
    begin(1, 1, 2);
    share = 2;
    passes_on = 1;
    add_caller("c0", call_as);
    add_server("s0", serve_as);
}

/* Each server takes one of the calls. */
static void as_two_servers(void)
{
    begin(1, 2, 2);
    share = 1;
    passes_on = 1;
    add_caller("c0", call_as);
    add_server("s0", serve_as);
    add_server("s1", serve_as);
}

static void as_a_server_dies(void)
{
    begin(1, 2, 1);
    may_be_lost = 1;
    passes_on = 1;
    add_caller("c0", call_mortal);
    add_server("s0", serve_until_done);
    add_server("s1", serve_until_done);
}

static void as_a_server_comes_back(void)
{
    as_a_server_dies();
    may_be_lost = 0;
}

static void as_a_caller_dies(void)
{
    begin(1, 1, 2);
    share = 2;
    passes_on = 1;
    add_caller("c0", call_as);
    add_server("s0", serve_mortal);
}

static void reset(void)
{
    finished = 0;
    memset(ran, 0, sizeof ran);
    memset(answered, 0, sizeof answered);
    memset(told, 0, sizeof told);
    memset(replied_by, 0, sizeof replied_by);
    memset(is_given_up, 0, sizeof is_given_up);
}

static void check(void)
{
    for (unsigned i = 0; i < party_count; i++)
        for (unsigned j = 0; j < total; j++) {
            int calls = parties[i].program == call_all || parties[i].program == call_two ||
                        parties[i].program == call_later || parties[i].program == call_as ||
                        parties[i].program == call_mortal;
            CHECK(ran[i][j] <= 1, ran[i][j]);
            CHECK(!is_given_up[i][j] || ran[i][j] == 0, j);
            CHECK(answered[i][j] + told[i][j] <= 1, j);
            if (calls && !parties[i].is_dead)
                CHECK(answered[i][j] + told[i][j] == 1, j);
        }
    for (unsigned i = 0; i < geometry.writers; i++)
        for (unsigned j = 0; j < geometry.slots; j++)
            ivshmem_claim_ends(&channel, i, j, ivshmem_writer_owner(&channel, i));
    all_is_back();
}

/* All is free when the place of the dead one is. */
static void check_mortal(void)
{
    for (unsigned i = 0; i < party_count; i++)
        if (parties[i].is_dead)
            befalls(&parties[i], IS_GONE);
    check();
}

int main(int argc, char **argv)
{
    static const struct script scripts[] = {
        {"one-by-one", one_by_one, check},
        {"two-at-once", two_at_once, check},
        {"two-callers", two_callers, check},
        {"one-each", one_each, check},
        {"given-up", given_up, check},
        {"as-call", as_call, check},
        {"as-two-servers", as_two_servers, check},
        {"as-a-server-dies", as_a_server_dies, check_mortal},
        {"as-a-server-comes-back", as_a_server_comes_back, check},
        {"as-a-caller-dies", as_a_caller_dies, check_mortal},
        {"a-server-dies", a_server_dies, check},
        {"the-next-server", the_next_server, check},
        {"a-caller-dies", a_caller_dies, check},
        {"a-server-is-silent", a_server_is_silent, check},
        {"a-removed-server-lives", a_removed_server_lives, check}};
    return run_scripts(argc, argv, scripts, sizeof scripts / sizeof *scripts);
}
