/* A process is killed or stopped at each step that it makes with connections; see steps.h. */
#include "steps.h"

enum { BUFFER = 64, BYTES = 200, CONNECTIONS = 3 };

static const struct ivshmem_geometry geometry = {.kind = IVSHMEM_BYTES,
                                                 .writers = CONNECTIONS,
                                                 .readers = 2,
                                                 .slots = BUFFER,
                                                 .loans = 1,
                                                 .views = 1,
                                                 .limit = 1};

static struct ivshmem_listener listener;
static struct ivshmem_stream stream;
static uint64_t received;
static int is_open;

static void listen_here(struct peer *peer, struct ivshmem_listener *here)
{
    memset(here, 0, sizeof *here);
    here->channel = &peer->channel;
    here->member = &peer->member;
}

/* Byte n of a stream is n: none is missing, doubled or out of order. */
static int64_t receive_some(struct ivshmem_stream *from, uint64_t *position)
{
    unsigned char bytes[48];
    int64_t n = ivshmem_receive(from, bytes, sizeof bytes);
    for (int64_t i = 0; i < n; i++)
        CHECK(bytes[i] == (unsigned char)(*position + (uint64_t)i), bytes[i]);
    *position += n > 0 ? (uint64_t)n : 0;
    return n;
}

static int64_t send_some(struct ivshmem_stream *to, uint64_t position, uint64_t size)
{
    unsigned char bytes[BYTES];
    for (uint64_t i = 0; i < size; i++)
        bytes[i] = (unsigned char)(position + i);
    return ivshmem_send(to, bytes, size);
}

/* Every connection can be used, both ways, by two ends in this process. */
static void use(struct peer *peer)
{
    static struct ivshmem_stream callers[CONNECTIONS], acceptors[CONNECTIONS];
    static struct ivshmem_stream more;
    struct ivshmem_listener here;
    listen_here(peer, &here);
    CHECK(ivshmem_listen(&here) == 0, 0);
    while (ivshmem_accept(&here, &more) == 0) /* what the child left for a listener */
        ivshmem_stream_close(&more);
    for (int round = 0; round < 2; round++) {
        for (int i = 0; i < CONNECTIONS; i++) {
            uint64_t position = 0;
            callers[i].channel = &peer->channel;
            callers[i].member = &peer->member;
            CHECK(ivshmem_stream_connect(&callers[i]) == 0, i);
            CHECK(ivshmem_accept(&here, &acceptors[i]) == 0, i);
            for (uint64_t sent = 0; sent < BYTES; sent += 50) {
                CHECK(send_some(&callers[i], sent, 50) == 50, i);
                while (receive_some(&acceptors[i], &position) > 0)
                    ;
                CHECK(position == sent + 50, position);
            }
        }
        more.channel = &peer->channel;
        more.member = &peer->member;
        CHECK(ivshmem_stream_connect(&more) == IVSHMEM_TAKEN, round);
        for (int i = 0; i < CONNECTIONS; i++) {
            uint64_t none = 0;
            ivshmem_stream_shutdown(&callers[i], 1, 0);
            CHECK(receive_some(&acceptors[i], &none) == 0, i); /* half-closed */
            CHECK(send_some(&acceptors[i], 0, 10) == 10, i);
            ivshmem_stream_close(&acceptors[i]);
            CHECK(receive_some(&callers[i], &none) == 10, i);
            CHECK(receive_some(&callers[i], &none) == 0, i);
            ivshmem_stream_close(&callers[i]);
        }
    }
    ivshmem_listener_close(&here);
}

/* -- the child calls ----------------------------------------------------------------------------- */

static void listen_before(struct peer *peer)
{
    received = 0;
    is_open = 0;
    listen_here(peer, &listener);
    CHECK(ivshmem_listen(&listener) == 0, 0);
}

static void accept_and_receive(struct peer *peer)
{
    (void)peer;
    if (!is_open && ivshmem_accept(&listener, &stream) == 0)
        is_open = 1;
    while (is_open && receive_some(&stream, &received) > 0)
        ;
    CHECK(!is_open || received >= (uint64_t)aside->ended, received);
}

static void call(void)
{
    static struct peer peer;
    static struct ivshmem_stream mine;
    must(join(&peer));
    must(open_channel(&peer, channel_name));
    mine.channel = &peer.channel;
    mine.member = &peer.member;
    must(ivshmem_stream_connect(&mine));
    for (uint64_t sent = 0; sent < BYTES;) {
        int64_t n;
        aside->began = (int64_t)sent + 20;
        n = send_some(&mine, sent, 20);
        if (n == IVSHMEM_AGAIN) {
            ivshmem_stream_sleep(&mine);
            ivshmem_sleep_end(&peer.channel, &mine.sleep);
            break;
        }
        if (n < 0)
            must((int)n);
        sent += (uint64_t)n;
        aside->ended = (int64_t)sent;
    }
    ivshmem_stream_shutdown(&mine, 1, 0);
    ivshmem_stream_close(&mine);
    ivshmem_leave_area(&peer.member);
}

static void receive_to_the_end(struct peer *peer)
{
    uint64_t before = received;
    accept_and_receive(peer);
    CHECK(received >= before, received);
    if (is_open) {
        unsigned char byte;
        int64_t end = ivshmem_receive(&stream, &byte, 1);
        CHECK(end == 0 || end == IVSHMEM_CLOSED, end); /* as it should, or a reset */
        CHECK(received <= (uint64_t)aside->began, received);
        ivshmem_stream_close(&stream);
    }
    ivshmem_listener_close(&listener);
    use(peer);
}

/* -- the child accepts --------------------------------------------------------------------------- */

static void call_before(struct peer *peer)
{
    static struct ivshmem_listener idle;
    listen_here(peer, &idle); /* so that one can connect */
    CHECK(ivshmem_listen(&idle) == 0, 0);
    memset(&stream, 0, sizeof stream);
    stream.channel = &peer->channel;
    stream.member = &peer->member;
    CHECK(ivshmem_stream_connect(&stream) == 0, 0);
    CHECK(send_some(&stream, 0, 40) == 40, 0);
    ivshmem_listener_close(&idle);
}

static void accept_one(void)
{
    static struct peer peer;
    static struct ivshmem_listener mine;
    static struct ivshmem_stream accepted;
    uint64_t position = 0;
    must(join(&peer));
    must(open_channel(&peer, channel_name));
    listen_here(&peer, &mine);
    must(ivshmem_listen(&mine));
    must(ivshmem_accept(&mine, &accepted));
    aside->began = 1;
    if (receive_some(&accepted, &position) < 40)
        must(IVSHMEM_CORRUPT);
    if (send_some(&accepted, 0, 30) < 0)
        must(IVSHMEM_CORRUPT);
    aside->ended = 30;
    ivshmem_stream_close(&accepted);
    ivshmem_listener_close(&mine);
    ivshmem_leave_area(&peer.member);
}

/* The caller continues as long as there is room, and does not wait. */
static void send_more(struct peer *peer)
{
    int64_t n = send_some(&stream, 40, 20);
    (void)peer;
    CHECK(n > 0 || n == IVSHMEM_AGAIN || n == IVSHMEM_CLOSED, n);
}

static void hear_of_the_end(struct peer *peer)
{
    uint64_t position = 0;
    int64_t n;
    while ((n = receive_some(&stream, &position)) > 0)
        ;
    CHECK(position >= (uint64_t)aside->ended, position);
    CHECK(n == 0 || n == IVSHMEM_CLOSED || (n == IVSHMEM_AGAIN && aside->began == 0), n);
    ivshmem_stream_close(&stream);
    use(peer);
}

int main(int argc, char **argv)
{
    static const struct operation operations[] = {
        {"call", &geometry, listen_before, call, accept_and_receive, receive_to_the_end, NULL, NULL},
        {"accept", &geometry, call_before, accept_one, send_more, hear_of_the_end, NULL, NULL}};
    return run_all(argc, argv, operations, sizeof operations / sizeof *operations);
}
