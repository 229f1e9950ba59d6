/* A process is killed or stopped at each step that it makes as a server of calls, or as a caller;
 * see steps.h. */
#include "steps.h"

enum { CALLS = 3 };

static const struct ivshmem_geometry geometry = {.kind = IVSHMEM_CALLS,
                                                 .writers = 2,
                                                 .readers = 2,
                                                 .slots = SLOTS,
                                                 .loans = LOANS,
                                                 .views = 2,
                                                 .limit = LONG};

static uint64_t positions[SLOTS];

/* Begin a call with `number`; its position, or an error. */
static int call(struct peer *peer, uint64_t number, uint64_t *position)
{
    uint32_t cell;
    int code = ivshmem_queue_ready(&peer->writer);
    if (code == 0)
        code = ivshmem_loan(&peer->writer, &cell);
    if (code != 0)
        return code;
    memcpy(region + peer->channel.at + ivshmem_cell_at(&peer->channel, peer->writer.slot, cell),
           filled(number), LONG);
    *position = ivshmem_queue_publish(&peer->writer, cell, LONG, 0, number);
    return 0;
}

/* Serve one call: the reply is the number and 1000. */
static int serve(struct peer *peer)
{
    struct ivshmem_taken taken;
    uint64_t words[WORDS];
    int code = ivshmem_queue_take(&peer->reader, IVSHMEM_CLAIM_TAKEN, 1, &taken);
    if (code != 0)
        return code;
    CHECK(!taken.redelivered, 0);
    memcpy(words, region + taken.message.offset, LONG);
    memcpy(region + ivshmem_reply_offset(&peer->channel, taken.message.writer,
                                         taken.message.position),
           filled(number_in(words) + 1000), LONG);
    return ivshmem_reply(&peer->reader, &taken, LONG, 1);
}

/* The reply that a call has; the call ends. */
static uint64_t take_reply(struct peer *peer, uint64_t position)
{
    uint64_t words[WORDS];
    uint32_t length = 0;
    unsigned status = 0;
    int never, code = ivshmem_call_look(&peer->writer, position, &length, &status);
    CHECK(code == 0 && length == LONG && status == 1, code);
    memcpy(words, region + ivshmem_reply_offset(&peer->channel, peer->writer.slot, position), LONG);
    CHECK(ivshmem_call_end(&peer->writer, position, &never) == 1 && !never, 0);
    return number_in(words);
}

/* All slots of a caller can be used, by a server in this process. */
static void use(struct peer *caller, struct peer *server)
{
    for (uint64_t round = 0; round < 3; round++) {
        uint64_t at[SLOTS];
        for (uint64_t i = 0; i < SLOTS; i++)
            CHECK(call(caller, i, &at[i]) == 0, i);
        CHECK(call(caller, 0, &at[0]) == IVSHMEM_AGAIN, round);
        while (serve(server) == 0)
            ;
        for (uint64_t i = 0; i < SLOTS; i++)
            CHECK(take_reply(caller, at[i]) == i + 1000, i);
    }
}

/* -- the child serves ---------------------------------------------------------------------------- */

static void call_it(struct peer *peer)
{
    CHECK(open_writer(peer) == 0, 0);
    for (uint64_t i = 0; i < CALLS; i++)
        CHECK(call(peer, i, &positions[i]) == 0, i);
}

static void open_server(struct peer *peer)
{
    must(open_channel(peer, channel_name));
    peer->reader.channel = &peer->channel;
    peer->reader.member = &peer->member;
    must(ivshmem_reader_open(&peer->reader, 0));
}

static void serve_calls(void)
{
    static struct peer peer;
    must(join(&peer));
    open_server(&peer);
    for (int i = 0; i < CALLS - 1; i++) {
        aside->began = i + 1;
        must(serve(&peer));
        aside->ended = i + 1;
    }
    ivshmem_reader_close(&peer.reader);
    ivshmem_leave_area(&peer.member);
}

/* A server that is silent may still write its reply: the caller waits, or gives up. */
static void calls_stay(struct peer *peer)
{
    for (uint64_t i = 0; i < CALLS; i++) {
        uint32_t length;
        unsigned status;
        int code = ivshmem_call_look(&peer->writer, positions[i], &length, &status);
        CHECK(code == 0 || code == IVSHMEM_AGAIN, code);
    }
}

static void callers_are_told(struct peer *peer)
{
    static struct peer second;
    int replies = 0, told = 0;
    for (uint64_t i = 0; i < CALLS; i++) {
        uint32_t length;
        unsigned status;
        int never, code = ivshmem_call_look(&peer->writer, positions[i], &length, &status);
        if (code == 0) {
            CHECK(take_reply(peer, positions[i]) == i + 1000, i);
            replies++;
        } else if (code == IVSHMEM_CLOSED) {
            told++;
        } else {
            CHECK(code == IVSHMEM_AGAIN, code);
            CHECK(ivshmem_call_end(&peer->writer, positions[i], &never) == 1 && never, i);
        }
    }
    CHECK(replies >= aside->ended && replies <= aside->began, replies);
    CHECK(told <= 1 && replies + told <= aside->began, told);
    CHECK(join(&second) == 0, 0);
    CHECK(open_channel(&second, channel_name) == 0, 0);
    for (unsigned i = 0; i < geometry.readers; i++) /* every server's slot can be taken */
        CHECK(open_reader(&second, IVSHMEM_OVERWRITE) == 0, i);
    use(peer, &second);
    ivshmem_writer_close(&peer->writer);
    ivshmem_leave_area(&second.member);
}

/* -- the child calls, and serves itself ---------------------------------------------------------- */

static void call_oneself(void)
{
    static struct peer caller, server;
    must(join(&caller));
    must(open_channel(&caller, channel_name));
    must(open_writer(&caller));
    must(join(&server));
    open_server(&server);
    for (uint64_t i = 0; i < CALLS; i++) {
        uint64_t position;
        must(call(&caller, i, &position));
        if (i == 1) { /* one that is given up */
            int never;
            must(ivshmem_call_end(&caller.writer, position, &never) != 1);
            continue;
        }
        must(serve(&server));
        if (take_reply(&caller, position) != i + 1000)
            must(IVSHMEM_CORRUPT);
    }
    ivshmem_reader_close(&server.reader);
    ivshmem_leave_area(&server.member);
    ivshmem_writer_close(&caller.writer);
    ivshmem_leave_area(&caller.member);
}

static void nothing(struct peer *peer)
{
    (void)peer;
}

static void all_is_free(struct peer *peer)
{
    static struct peer second;
    CHECK(join(&second) == 0, 0);
    CHECK(open_channel(&second, channel_name) == 0, 0);
    CHECK(open_reader(&second, IVSHMEM_OVERWRITE) == 0, 0);
    CHECK(open_writer(&second) == 0, 0);
    CHECK(open_writer(peer) == 0, 0);
    use(peer, &second);
    use(&second, &second);
    ivshmem_writer_close(&peer->writer);
    ivshmem_leave_area(&second.member);
}

int main(int argc, char **argv)
{
    static const struct operation operations[] = {
        {"serve", &geometry, call_it, serve_calls, calls_stay, callers_are_told, NULL, NULL},
        {"call", &geometry, nothing, call_oneself, nothing, all_is_free, NULL, NULL}};
    return run_all(argc, argv, operations, sizeof operations / sizeof *operations);
}
