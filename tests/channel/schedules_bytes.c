/* Connections under schedules: the bytes of each arrive in order, none is lost or doubled; an end is told
 * from a reset; nobody sleeps for ever, and every connection can be used again. */
#include "script_parties.h"

enum { BUFFER = 64, CHUNK = 3 };

struct caller {
    unsigned sent;  /* words that went in */
    int is_refused; /* it was told that the other end receives no more */
    int has_ended;
    unsigned received, has_end; /* by the party that accepted it: words, and whether their end came */
    unsigned accepted;          /* how often */
};

static struct caller callers[2 * PARTIES]; /* the second half: of their second calls */
static unsigned count, replies; /* words that each caller sends, and gets for them */
static unsigned finished, ending;
static unsigned enough;   /* the acceptor receives no more after so many words; 0: it receives all */
static int may_be_reset;  /* an end dies, aborts, or receives no more */
static int says_nothing;  /* callers abort, and do not say that they send no more */
static int is_shared;     /* a removed caller lives, whose late stores may spoil bytes */
static int is_at_work;    /* the first party has accepted a connection */
static struct ivshmem_stream streams[PARTIES];
static struct ivshmem_listener listeners[PARTIES], first_listeners[PARTIES];

static unsigned index_of(const struct party *party)
{
    return (unsigned)(party - parties);
}

static uint64_t number_of(unsigned caller, unsigned which)
{
    return (uint64_t)(caller + 1) << 32 | which;
}

/* -- both ends --------------------------------------------------------------------------------------- */

/* Say that one sleeps, and look again; or sleep, if one has said it. */
static void sleep_or_say(struct ivshmem_stream *stream, int *says)
{
    if (*says) {
        wait_for_ring();
        ivshmem_sleep_end(stream->channel, &stream->sleep);
        ivshmem_stream_beat(stream); /* which may have woken it */
    } else {
        ivshmem_stream_sleep(stream);
    }
    *says = !*says;
}

static void end_sleep(struct ivshmem_stream *stream, int says)
{
    if (says)
        ivshmem_sleep_end(stream->channel, &stream->sleep);
}

/* Send numbered words. How many of them the other end let in. */
static unsigned send_words(struct ivshmem_stream *stream, unsigned caller, unsigned words)
{
    unsigned sent = 0;
    int says = 0;
    while (sent < words) {
        uint64_t chunk[CHUNK];
        unsigned n = words - sent < CHUNK ? words - sent : CHUNK;
        int64_t code;
        for (unsigned i = 0; i < n; i++)
            chunk[i] = number_of(caller, sent + i);
        code = ivshmem_send(stream, chunk, 8u * n);
        if (code == IVSHMEM_AGAIN) {
            sleep_or_say(stream, &says);
            continue;
        }
        if (code == IVSHMEM_CLOSED)
            break;
        CHECK(code > 0 && code % 8 == 0, code);
        sent += (unsigned)code / 8;
    }
    end_sleep(stream, says);
    return sent;
}

/* Receive words until their end, or so many. How that ended. */
static int64_t receive_words(struct ivshmem_stream *stream, uint64_t *first, unsigned *received,
                             unsigned most)
{
    int64_t code = 0;
    int says = 0;
    while (most == 0 || *received < most) {
        uint64_t chunk[CHUNK];
        code = ivshmem_receive(stream, chunk, sizeof chunk);
        if (code == IVSHMEM_AGAIN) {
            sleep_or_say(stream, &says);
            continue;
        }
        if (code <= 0)
            break;
        CHECK(code % 8 == 0, code);
        for (unsigned i = 0; i < code / 8; i++) {
            if (*received == 0)
                *first = chunk[i];
            CHECK(is_shared || chunk[i] == *first + *received, chunk[i]);
            (*received)++;
        }
    }
    end_sleep(stream, says);
    CHECK(code >= 0 || code == IVSHMEM_CLOSED, code);
    return code;
}

/* -- callers ------------------------------------------------------------------------------------------ */

static void end_calling(struct party *party)
{
    callers[index_of(party)].has_ended = 1;
    ivshmem_leave_area(&party->peer->member);
    if (++finished == ending) /* else only the channel's own rings wake listeners */
        wake_all();
}

/* Whether a connection was free, or became it. */
static int connect_to(struct party *party)
{
    struct ivshmem_stream *stream = &streams[index_of(party)];
    int code;
    while ((code = ivshmem_stream_connect(stream)) == IVSHMEM_TAKEN)
        pause_party();
    if (code == IVSHMEM_NOT_FOUND && may_be_reset)
        return 0;
    must(code);
    return 1;
}

static void call_once(struct party *party, unsigned which)
{
    struct ivshmem_stream *stream = &streams[index_of(party)];
    struct caller *caller = &callers[which];
    uint64_t first = 0;
    unsigned received = 0;
    int64_t end = 0;
    if (!connect_to(party))
        return;
    caller->sent = send_words(stream, which, count);
    caller->is_refused = caller->sent < count;
    CHECK(!caller->is_refused || may_be_reset, caller->sent);
    if (replies != 0) {
        ivshmem_stream_shutdown(stream, 1, 0);
        end = receive_words(stream, &first, &received, 0);
        CHECK(may_be_reset || (end == 0 && received == replies), received);
        CHECK(end == IVSHMEM_CLOSED || received == replies, received);
        CHECK(received == 0 || first % (UINT64_C(1) << 32) == 0, first);
    }
    if (says_nothing)
        ivshmem_stream_abort(stream);
    else
        ivshmem_stream_close(stream);
}

static void call(struct party *party)
{
    call_once(party, index_of(party));
    end_calling(party);
}

static void call_twice(struct party *party)
{
    call_once(party, index_of(party));
    call_once(party, PARTIES + index_of(party));
    end_calling(party);
}

/* -- listeners ---------------------------------------------------------------------------------------- */

static struct caller *caller_of(uint64_t first)
{
    uint64_t party = (first >> 32) - 1;
    CHECK(party < 2 * PARTIES && first % (UINT64_C(1) << 32) == 0, first);
    return &callers[party];
}

/* Receive what a caller sends, and reply. */
static void serve(struct party *party)
{
    struct ivshmem_stream *stream = &streams[index_of(party)];
    uint64_t first = 0;
    unsigned received = 0;
    int64_t end = receive_words(stream, &first, &received, enough);
    if (received != 0 && !is_shared) {
        struct caller *caller = caller_of(first);
        CHECK(caller->accepted++ == 0, first);
        caller->received = received;
        caller->has_end = end == 0;
    }
    CHECK(end == 0 || may_be_reset, end);
    if (enough != 0 && received == enough) {
        ivshmem_stream_shutdown(stream, 0, 1);
    } else {
        CHECK(end != 0 || received == count, received); /* an end is not told before all have come */
        if (end == 0 && replies != 0)
            CHECK(send_words(stream, index_of(party), replies) == replies || may_be_reset, replies);
    }
    ivshmem_stream_close(stream);
    party->got++;
}

static void end_listening(struct party *party)
{
    ivshmem_listener_close(&listeners[index_of(party)]);
    ivshmem_leave_area(&party->peer->member);
}

/* Accept until all callers have ended, or so many connections. */
static void listen_until(struct party *party, uint64_t most)
{
    struct ivshmem_listener *listener = &listeners[index_of(party)];
    int slept = 0;
    while (party->got < most) {
        int code = ivshmem_accept(listener, &streams[index_of(party)]);
        if (slept)
            ivshmem_listener_pass_on(listener);
        slept = 0;
        if (code == 0) {
            serve(party);
            continue;
        }
        CHECK(code == IVSHMEM_AGAIN, code);
        if (finished == ending && !ivshmem_listener_has_caller(listener))
            break;
        ivshmem_sleep_begin(listener->channel, &listener->sleep);
        if (!ivshmem_listener_has_caller(listener) && finished != ending) {
            if (is_shared)
                pause_party(); /* until a beat: nobody rings for a word that was spoiled before */
            else
                wait_for_ring();
        }
        ivshmem_sleep_end(listener->channel, &listener->sleep);
        slept = 1;
    }
    end_listening(party);
}

static void listen_once(struct party *party)
{
    listen_until(party, 1);
}

static void listen_always(struct party *party)
{
    listen_until(party, ~UINT64_C(0));
}

static void listen_to_none(struct party *party)
{
    end_listening(party);
}

/* -- death and removal -------------------------------------------------------------------------------- */

static void bury_first(struct party *party)
{
    int had_ended = parties[0].verb == IS_OVER;
    if (!had_ended)
        kill_party(0);
    had_ended = parties[0].verb == IS_OVER;
    free_place(party, 0);
    if (!had_ended && parties[0].program == call && ++finished == ending)
        wake_all();
    ivshmem_leave_area(&party->peer->member);
}

/* Send on though one's place is gone, and somebody else has the connection. */
static void call_late(struct party *party)
{
    struct ivshmem_stream *stream = &streams[index_of(party)];
    if (ivshmem_stream_connect(stream) == 0) {
        uint64_t words[CHUNK] = {0};
        for (int i = 0; i < 4; i++) {
            ivshmem_send(stream, words, sizeof words);
            ivshmem_receive(stream, words, sizeof words);
        }
        ivshmem_stream_abort(stream); /* so that its end is no end of what another one sent */
    }
    ivshmem_full_fence(&channel.area.memory);
    finished++;
    wake_all(); /* their beats come after the last late store */
}

/* Accept, and close late, though one's place is gone and somebody else uses the connection. */
static void accept_late(struct party *party)
{
    struct ivshmem_stream *stream = &streams[index_of(party)];
    struct ivshmem_listener *listener = &listeners[index_of(party)];
    while (ivshmem_accept(listener, stream) == IVSHMEM_AGAIN) {
        ivshmem_sleep_begin(listener->channel, &listener->sleep);
        if (!ivshmem_listener_has_caller(listener))
            wait_for_ring();
        ivshmem_sleep_end(listener->channel, &listener->sleep);
    }
    is_at_work = 1;
    wake_all();
    for (int i = 0; i < 10 && finished != ending; i++)
        pause_party();
    ivshmem_stream_close(stream);
    ivshmem_listener_close(listener);
    ivshmem_full_fence(&channel.area.memory);
    wake_all();
}

static void listen_later(struct party *party)
{
    while (!is_at_work)
        wait_for_ring();
    listen_always(party);
}

static void remove_first(struct party *party)
{
    pause_party();
    while (parties[0].program == accept_late && !is_at_work)
        wait_for_ring();
    free_place(party, 0);
    ivshmem_leave_area(&party->peer->member);
}

/* -- scripts ------------------------------------------------------------------------------------------ */

static void begin(unsigned connections, unsigned readers, unsigned words)
{
    const struct ivshmem_geometry each = {.kind = IVSHMEM_BYTES, .writers = connections,
                                          .readers = readers, .slots = BUFFER, .loans = 1,
                                          .views = 1, .limit = 1};
    begin_area(&each);
    count = words;
}

static struct ivshmem_stream *stream_of(struct party *party)
{
    struct ivshmem_stream *stream = &streams[index_of(party)];
    stream->channel = &party->peer->channel;
    stream->member = &party->peer->member;
    return stream;
}

static void add_caller(const char *name, void (*program)(struct party *party))
{
    stream_of(add_party(name, program));
    ending++;
}

static void add_listener(const char *name, void (*program)(struct party *party))
{
    struct party *party = add_party(name, program);
    struct ivshmem_listener *listener = &listeners[index_of(party)];
    stream_of(party);
    listener->channel = &party->peer->channel;
    listener->member = &party->peer->member;
    must(ivshmem_listen(listener));
    first_listeners[index_of(party)] = *listener;
}

static void one_way(void)
{
    begin(1, 1, 20);
    add_caller("c0", call);
    add_listener("s0", listen_always);
}

static void both_ways(void)
{
    begin(1, 1, 10);
    replies = 10;
    add_caller("c0", call);
    add_listener("s0", listen_always);
}

static void used_again(void)
{
    begin(1, 1, 5);
    add_caller("c0", call);
    add_caller("c1", call);
    add_listener("s0", listen_always);
}

static void two_at_once(void)
{
    begin(2, 1, 9);
    add_caller("c0", call);
    add_caller("c1", call);
    add_listener("s0", listen_always);
}

static void two_listeners(void)
{
    begin(2, 2, 5);
    replies = 2;
    add_caller("c0", call);
    add_caller("c1", call);
    add_listener("s0", listen_always);
    add_listener("s1", listen_always);
}

static void one_each(void)
{
    begin(2, 2, 1);
    replies = 1;
    add_listener("s0", listen_once);
    add_listener("s1", listen_always);
    add_caller("c0", call);
    add_caller("c1", call);
}

static void aborted(void)
{
    begin(1, 1, 10);
    says_nothing = may_be_reset = 1;
    add_caller("c0", call);
    add_listener("s0", listen_always);
}

static void refused(void)
{
    begin(1, 1, 20);
    may_be_reset = 1;
    enough = 4;
    add_caller("c0", call);
    add_listener("s0", listen_always);
}

static void a_caller_dies(void)
{
    begin(1, 1, 5);
    may_be_reset = 1;
    replies = 2;
    add_caller("c0", call);
    add_caller("c1", call);
    add_listener("s0", listen_always);
    add_party("undertaker", bury_first);
}

static void an_acceptor_dies(void)
{
    begin(1, 2, 10);
    may_be_reset = 1;
    replies = 2;
    add_listener("s0", listen_always);
    add_caller("c0", call);
    add_listener("s1", listen_always);
    add_party("undertaker", bury_first);
}

static void a_listener_leaves(void)
{
    begin(1, 2, 5);
    add_listener("s0", listen_to_none);
    add_caller("c0", call);
    add_caller("c1", call);
    add_listener("s1", listen_always);
}

static void nobody_accepts(void)
{
    begin(1, 1, 5);
    may_be_reset = 1;
    add_listener("s0", listen_to_none);
    add_caller("c0", call);
    add_caller("c1", call);
}

static void a_removed_caller_lives(void)
{
    begin(1, 1, 10);
    may_be_reset = is_shared = 1;
    add_caller("c0", call_late);
    add_caller("c1", call);
    add_listener("s0", listen_always);
    add_party("user", remove_first);
}

/* The first caller has sent something, and has died, before the script begins. */
static void the_bytes_of_a_dead_caller(void)
{
    struct ivshmem_stream *stream;
    begin(1, 1, 5);
    may_be_reset = 1;
    add_listener("s0", listen_always);
    add_caller("c1", call);
    stream = stream_of(add_party("c0", call));
    must(ivshmem_stream_connect(stream));
    CHECK(send_words(stream, 2, 5) == 5, 0);
    ivshmem_leave_area(&parties[2].peer->member);
    party_count--;
}

static void a_removed_acceptor_lives(void)
{
    begin(1, 2, 3);
    may_be_reset = 1;
    add_listener("s0", accept_late);
    add_caller("c0", call_twice);
    add_listener("s1", listen_later);
    add_party("user", remove_first);
}

/* -- as the cases of the model that these follow ------------------------------------------------------ */

static void call_as(struct party *party)
{
    struct ivshmem_stream *stream = &streams[index_of(party)];
    struct caller *caller = &callers[index_of(party)];
    int code;
    while ((code = ivshmem_stream_connect(stream)) == IVSHMEM_TAKEN && ending > 1)
        if (token_at == token_count) /* else the model says who is next */
            pause_party();
    must(code);
    while (caller->sent < count) {
        uint64_t words[SENT_AT_ONCE];
        struct ivshmem_pieces pieces;
        int64_t sent;
        for (unsigned i = 0; i < SENT_AT_ONCE; i++)
            words[i] = number_of(index_of(party), caller->sent + i);
        sent = ivshmem_send(stream, words, sizeof words);
        if (sent == IVSHMEM_AGAIN) {
            ivshmem_stream_sleep(stream);
            if (ivshmem_send_begin(stream, sizeof words, &pieces) == IVSHMEM_AGAIN)
                wait_for_ring();
            ivshmem_sleep_end(stream->channel, &stream->sleep);
            continue;
        }
        caller->is_refused = sent == IVSHMEM_CLOSED;
        if (caller->is_refused)
            break;
        CHECK(sent == sizeof words, sent);
        caller->sent += SENT_AT_ONCE;
    }
    ivshmem_stream_close(stream);
    end_calling(party);
}

static void serve_as(struct party *party)
{
    struct ivshmem_stream *stream = &streams[index_of(party)];
    uint64_t first = 0, words[SENT_AT_ONCE];
    unsigned received = 0;
    int64_t got;
    struct caller *caller;
    while ((got = ivshmem_receive(stream, words, sizeof words)) != 0) {
        struct ivshmem_pieces pieces;
        if (got == IVSHMEM_AGAIN) {
            ivshmem_stream_sleep(stream);
            if (ivshmem_receive_begin(stream, sizeof words, &pieces) == IVSHMEM_AGAIN)
                wait_for_ring();
            ivshmem_sleep_end(stream->channel, &stream->sleep);
            continue;
        }
        if (got == IVSHMEM_CLOSED && may_be_reset)
            break;
        CHECK(got == sizeof words, got);
        if (received == 0)
            first = words[0];
        for (unsigned i = 0; i < SENT_AT_ONCE; i++)
            CHECK(words[i] == first + received + i, words[i]);
        received += SENT_AT_ONCE;
        if (received == enough) {
            ivshmem_stream_shutdown(stream, 0, 1);
            break;
        }
    }
    if (received != 0) {
        caller = caller_of(first);
        CHECK(caller->accepted++ == 0, first);
        caller->received = received;
        caller->has_end = got == 0;
    }
    ivshmem_stream_close(stream);
    party->got++;
}

/* Whether the only caller has died, and was seen to be gone. */
static int is_caller_gone(void)
{
    return ending == 1 && ivshmem_is_gone(&channel.area, parties[1].peer->member.place);
}

/* Accept one connection of each caller. */
static void listen_as(struct party *party)
{
    struct ivshmem_listener *listener = &listeners[index_of(party)];
    while (party->got < ending) {
        int is_gone = is_caller_gone();
        if (ivshmem_accept(listener, &streams[index_of(party)]) == 0) {
            serve_as(party);
            continue;
        }
        if (is_gone)
            break;
        ivshmem_sleep_begin(listener->channel, &listener->sleep);
        if (!ivshmem_listener_has_caller(listener) && !is_caller_gone())
            wait_for_ring();
        ivshmem_sleep_end(listener->channel, &listener->sleep);
    }
    end_listening(party);
}

static void as_one(void)
{
    begin(1, 1, SENT_AT_ONCE);
    add_listener("s0", listen_as);
    add_caller("c0", call_as);
}

static void as_one_way(void)
{
    begin(1, 1, 3 * SENT_AT_ONCE);
    add_listener("s0", listen_as);
    add_caller("c0", call_as);
}

static void as_refused(void)
{
    begin(1, 1, 2 * SENT_AT_ONCE);
    may_be_reset = 1;
    enough = SENT_AT_ONCE;
    add_listener("s0", listen_as);
    add_caller("c0", call_as);
}

static void as_a_caller_dies(void)
{
    begin(1, 1, SENT_AT_ONCE);
    may_be_reset = 1;
    add_listener("s0", listen_as);
    add_caller("c0", call_as);
}

static void as_used_again(void)
{
    begin(1, 1, 3 * SENT_AT_ONCE);
    add_listener("s0", listen_as);
    add_caller("c0", call_as);
    add_caller("c1", call_as);
}

static void reset(void)
{
    struct ivshmem_stream *stream;
    finished = 0;
    is_at_work = 0;
    memset(callers, 0, sizeof callers);
    for (unsigned i = 0; i < party_count; i++) {
        stream = &streams[i];
        memset(stream, 0, sizeof *stream);
        stream_of(&parties[i]);
        listeners[i] = first_listeners[i];
    }
}

static void check(void)
{
    for (unsigned i = 0; i < 2 * party_count; i++) {
        const unsigned party = i % party_count;
        const struct caller *caller = &callers[i < party_count ? party : PARTIES + party];
        if ((parties[party].program != call && parties[party].program != call_twice &&
             parties[party].program != call_as) ||
            is_shared || (i >= party_count && parties[party].program != call_twice))
            continue;
        CHECK(caller->received <= caller->sent || parties[party].is_dead, caller->received);
        CHECK(!caller->has_end || caller->received == count, caller->received);
        if (caller->accepted && says_nothing)
            CHECK(caller->received == caller->sent && !caller->has_end, caller->received);
        if (!may_be_reset || i >= party_count)
            CHECK(caller->has_end && caller->accepted == 1, caller->received);
    }
    for (unsigned i = 0; i < geometry.writers; i++) {
        uint64_t at = ivshmem_end_owner_at(&channel, i, 0);
        CHECK(ivshmem_connection_is_free(&channel, i), i);
        CHECK(ivshmem_flags(ivshmem_get(&channel, at)) == IVSHMEM_SLOT_FREE, i);
        CHECK(ivshmem_flags(ivshmem_get(&channel, at + 8)) == IVSHMEM_SLOT_FREE, i);
    }
    all_is_back();
}

/* The place of the caller that has died is freed at last. */
static void check_mortal(void)
{
    const struct caller *caller = &callers[1];
    CHECK(caller->received <= count, caller->received);
    CHECK(!caller->has_end || caller->received == count, caller->received);
    CHECK(parties[1].is_dead || caller->has_end, caller->received);
    if (parties[1].is_dead)
        befalls(&parties[1], IS_GONE);
    check();
}

int main(int argc, char **argv)
{
    static const struct script scripts[] = {
        {"one-way", one_way, check},
        {"both-ways", both_ways, check},
        {"used-again", used_again, check},
        {"two-at-once", two_at_once, check},
        {"two-listeners", two_listeners, check},
        {"one-each", one_each, check},
        {"aborted", aborted, check},
        {"as-one", as_one, check},
        {"as-one-way", as_one_way, check},
        {"as-refused", as_refused, check},
        {"as-a-caller-dies", as_a_caller_dies, check_mortal},
        {"as-used-again", as_used_again, check},
        {"refused", refused, check},
        {"a-caller-dies", a_caller_dies, check},
        {"an-acceptor-dies", an_acceptor_dies, check},
        {"a-listener-leaves", a_listener_leaves, check},
        {"nobody-accepts", nobody_accepts, check},
        {"the-bytes-of-a-dead-caller", the_bytes_of_a_dead_caller, check},
        {"a-removed-acceptor-lives", a_removed_acceptor_lives, check},
        {"a-removed-caller-lives", a_removed_caller_lives, check}};
    return run_scripts(argc, argv, scripts, sizeof scripts / sizeof *scripts);
}
