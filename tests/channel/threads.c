/* Threads at both ends of channels of each kind, for ThreadSanitizer: it knows no race but the
 * copies of payload that are marked in the header.
 *
 *   threads COUNT
 *
 * Each message says by which writer it is and its number; readers check order and wholeness.
 */
#include <pthread.h>
#include <sched.h>

#include "steps.h"

enum { WRITERS = 2, BOTH = 2 };

static const struct ivshmem_geometry of_messages = {
    IVSHMEM_MESSAGES, IVSHMEM_OVERWRITE | IVSHMEM_BLOCK, 0, WRITERS, BOTH, SLOTS, LOANS, 2, LONG};
static const struct ivshmem_geometry of_queue = {IVSHMEM_QUEUE, 0,     0, WRITERS, BOTH,
                                                 SLOTS,         LOANS, 2, LONG};
static const struct ivshmem_geometry of_calls = {IVSHMEM_CALLS, 0,     0, WRITERS, BOTH,
                                                 SLOTS,         LOANS, 2, LONG};
static const struct ivshmem_geometry of_value = {
    IVSHMEM_VALUE, IVSHMEM_OVERWRITE, 0, 1, BOTH, SLOTS, LOANS, 2, LONG};
static const struct ivshmem_geometry of_bytes = {IVSHMEM_BYTES, 0, 0, 4, 2, 128, 1, 1, 1};

static uint64_t count;
static uint64_t got; /* by all readers of the queue */
static struct peer maker;
static pthread_mutex_t joining = PTHREAD_MUTEX_INITIALIZER; /* of the test's own random() */

static struct peer *enter(void)
{
    struct peer *peer = calloc(1, sizeof *peer);
    pthread_mutex_lock(&joining);
    CHECK(join(peer) == 0, 0);
    pthread_mutex_unlock(&joining);
    CHECK(open_channel(peer, channel_name) == 0, 0);
    return peer;
}

static void leave(struct peer *peer)
{
    ivshmem_leave_area(&peer->member);
    free(peer);
}

static void fill(uint64_t *words, uint64_t number)
{
    for (int i = 0; i < WORDS; i++)
        words[i] = number;
}

static unsigned opened, all_writers; /* writers of messages */

static void *write_messages(void *nothing)
{
    struct peer *peer = enter();
    uint64_t words[WORDS];
    CHECK(open_writer(peer) == 0, 0);
    /* Else one that ends before another opens leaves its slot to that, which counts from 0. */
    __atomic_fetch_add(&opened, 1, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&opened, __ATOMIC_SEQ_CST) < all_writers)
        sched_yield();
    for (uint64_t i = 0; i < count; i++) {
        int code;
        fill(words, i);
        while ((code = ivshmem_put(&peer->writer, words, LONG, i, i)) == IVSHMEM_AGAIN)
            sched_yield();
        CHECK(code == 0, code);
    }
    ivshmem_writer_close(&peer->writer);
    leave(peer);
    return nothing;
}

static void *read_messages(void *overflow)
{
    struct peer *peer = enter();
    uint64_t words[WORDS], next[WRITERS] = {0, 0};
    int blocks = overflow != NULL;
    CHECK(open_reader(peer, blocks ? IVSHMEM_BLOCK : IVSHMEM_OVERWRITE) == 0, 0);
    __atomic_fetch_add(&aside->began, 1, __ATOMIC_SEQ_CST);
    while (next[0] < count || next[1] < count) {
        struct ivshmem_message message;
        int code = ivshmem_read(&peer->reader, &message, words, LONG);
        if (code == IVSHMEM_AGAIN) {
            if (!blocks && __atomic_load_n(&aside->ended, __ATOMIC_SEQ_CST))
                break;
            sched_yield();
            continue;
        }
        CHECK(code == 0, code);
        CHECK(number_in(words) >= next[message.writer], words[0]);
        CHECK(!blocks || words[0] == next[message.writer], words[0]);
        next[message.writer] = words[0] + 1;
    }
    ivshmem_reader_close(&peer->reader);
    leave(peer);
    return NULL;
}

static void *put(void *nothing)
{
    struct peer *peer = enter();
    uint64_t words[WORDS];
    CHECK(open_writer(peer) == 0, 0);
    for (uint64_t i = 0; i < count; i++) {
        int code;
        fill(words, i);
        while ((code = ivshmem_queue_put(&peer->writer, words, LONG, 0, i)) == IVSHMEM_AGAIN)
            sched_yield();
        CHECK(code == 0, code);
    }
    ivshmem_writer_close(&peer->writer);
    leave(peer);
    return nothing;
}

static void *take(void *nothing)
{
    struct peer *peer = enter();
    uint64_t words[WORDS];
    CHECK(open_reader(peer, IVSHMEM_OVERWRITE) == 0, 0);
    while (__atomic_load_n(&got, __ATOMIC_SEQ_CST) < WRITERS * count) {
        struct ivshmem_taken taken;
        int code = ivshmem_queue_read(&peer->reader, 0, words, LONG, &taken);
        if (code == IVSHMEM_AGAIN) {
            sched_yield();
            continue;
        }
        CHECK(code == 0, code);
        number_in(words);
        __atomic_fetch_add(&got, 1, __ATOMIC_SEQ_CST);
    }
    ivshmem_reader_close(&peer->reader);
    leave(peer);
    return nothing;
}

static void *call(void *nothing)
{
    struct peer *peer = enter();
    uint64_t words[WORDS];
    CHECK(open_writer(peer) == 0, 0);
    for (uint64_t i = 0; i < count; i++) {
        uint64_t position;
        uint32_t cell, length;
        unsigned status;
        int code, never;
        while (ivshmem_queue_ready(&peer->writer) == IVSHMEM_AGAIN)
            sched_yield();
        CHECK(ivshmem_loan(&peer->writer, &cell) == 0, 0);
        fill(words, i);
        ivshmem_copy_payload(region + peer->channel.at +
                                 ivshmem_cell_at(&peer->channel, peer->writer.slot, cell),
                             words, LONG);
        position = ivshmem_queue_publish(&peer->writer, cell, LONG, 0, i);
        while ((code = ivshmem_call_look(&peer->writer, position, &length, &status)) ==
               IVSHMEM_AGAIN)
            sched_yield();
        CHECK(code == 0 && length == LONG, code);
        ivshmem_copy_payload(
            words, region + ivshmem_reply_offset(&peer->channel, peer->writer.slot, position),
            LONG);
        CHECK(number_in(words) == i + 1, words[0]);
        CHECK(ivshmem_call_end(&peer->writer, position, &never) == 1, 0);
        __atomic_fetch_add(&got, 1, __ATOMIC_SEQ_CST);
    }
    ivshmem_writer_close(&peer->writer);
    leave(peer);
    return nothing;
}

static void *serve(void *nothing)
{
    struct peer *peer = enter();
    uint64_t words[WORDS];
    CHECK(open_reader(peer, IVSHMEM_OVERWRITE) == 0, 0);
    while (__atomic_load_n(&got, __ATOMIC_SEQ_CST) < WRITERS * count) {
        struct ivshmem_taken taken;
        int code = ivshmem_queue_take(&peer->reader, IVSHMEM_CLAIM_TAKEN, 0, &taken);
        if (code == IVSHMEM_AGAIN) {
            sched_yield();
            continue;
        }
        CHECK(code == 0, code);
        ivshmem_copy_payload(words, region + taken.message.offset, LONG);
        fill(words, number_in(words) + 1);
        ivshmem_copy_payload(region + ivshmem_reply_offset(&peer->channel, taken.message.writer,
                                                           taken.message.position),
                             words, LONG);
        CHECK(ivshmem_reply(&peer->reader, &taken, LONG, 0) == 0, 0);
    }
    ivshmem_reader_close(&peer->reader);
    leave(peer);
    return nothing;
}

static void *set_value(void *nothing)
{
    write_messages(nothing);
    __atomic_store_n(&aside->ended, 1, __ATOMIC_SEQ_CST);
    return nothing;
}

static void *look_at_value(void *nothing)
{
    struct peer *peer = enter();
    uint64_t words[WORDS], last = 0;
    CHECK(open_reader(peer, IVSHMEM_OVERWRITE) == 0, 0);
    while (last + 1 < count) {
        struct ivshmem_message message;
        int code = ivshmem_value_look(&peer->reader, &message);
        if (code == 0)
            ivshmem_copy_payload(words, region + message.offset, LONG);
        if (code == 0 && ivshmem_check(&peer->channel, &message) == 0) {
            CHECK(number_in(words) >= last, words[0]);
            last = words[0];
        } else {
            CHECK(code == 0 || code == IVSHMEM_AGAIN, code);
            sched_yield();
        }
    }
    ivshmem_reader_close(&peer->reader);
    leave(peer);
    return nothing;
}

static void *send_bytes(void *nothing)
{
    struct peer *peer = enter();
    struct ivshmem_stream stream;
    unsigned char bytes[100];
    memset(&stream, 0, sizeof stream);
    stream.channel = &peer->channel;
    stream.member = &peer->member;
    while (ivshmem_stream_connect(&stream) != 0)
        sched_yield();
    for (uint64_t sent = 0; sent < count * 8;) {
        int64_t n;
        for (unsigned i = 0; i < sizeof bytes; i++)
            bytes[i] = (unsigned char)(sent + i);
        n = ivshmem_send(&stream, bytes, sizeof bytes);
        CHECK(n > 0 || n == IVSHMEM_AGAIN, n);
        sent += n > 0 ? (uint64_t)n : 0;
        if (n < 0)
            sched_yield();
    }
    ivshmem_stream_close(&stream);
    leave(peer);
    return nothing;
}

static void *receive_bytes(void *nothing)
{
    struct peer *peer = enter();
    struct ivshmem_listener listener;
    struct ivshmem_stream stream;
    unsigned char bytes[64];
    uint64_t received = 0;
    int64_t n;
    memset(&listener, 0, sizeof listener);
    memset(&stream, 0, sizeof stream);
    listener.channel = &peer->channel;
    listener.member = &peer->member;
    CHECK(ivshmem_listen(&listener) == 0, 0);
    while (ivshmem_accept(&listener, &stream) != 0)
        sched_yield();
    while ((n = ivshmem_receive(&stream, bytes, sizeof bytes)) != 0) {
        if (n == IVSHMEM_AGAIN) {
            sched_yield();
            continue;
        }
        CHECK(n > 0, n);
        for (int64_t i = 0; i < n; i++)
            CHECK(bytes[i] == (unsigned char)(received + (uint64_t)i), received);
        received += (uint64_t)n;
    }
    CHECK(received >= count * 8, received);
    ivshmem_stream_close(&stream);
    ivshmem_listener_close(&listener);
    leave(peer);
    return nothing;
}

/* Readers first, where writers must not run ahead of them. */
static void together(const struct ivshmem_geometry *geometry, void *(*writer)(void *),
                     unsigned writers, void *(*reader)(void *), unsigned blocking)
{
    pthread_t threads[WRITERS + BOTH];
    unsigned running = 0;
    memset((void *)aside, 0, sizeof *aside);
    aside->now = 1;
    got = 0;
    opened = 0;
    all_writers = writers;
    CHECK(create(&maker, channel_name, geometry) == 0, 0);
    CHECK(open_channel(&maker, channel_name) == 0, 0);
    for (unsigned i = 0; i < BOTH; i++)
        pthread_create(&threads[running++], NULL, reader, i < blocking ? region : NULL);
    while (reader == read_messages && __atomic_load_n(&aside->began, __ATOMIC_SEQ_CST) < BOTH)
        sched_yield();
    for (unsigned i = 0; i < writers; i++)
        pthread_create(&threads[running++], NULL, writer, NULL);
    for (unsigned i = BOTH; i < running; i++)
        pthread_join(threads[i], NULL);
    __atomic_store_n(&aside->ended, 1, __ATOMIC_SEQ_CST);
    for (unsigned i = 0; i < BOTH; i++)
        pthread_join(threads[i], NULL);
    CHECK(ivshmem_remove(&maker.member, &maker.channel, 0) == 0, 0);
}

int main(int argc, char **argv)
{
    const struct ivshmem_memory memory = {NULL, SIZE, IVSHMEM_WRITE_BACK, 0};
    struct ivshmem_memory mapped = memory;
    struct ivshmem_area area;
    count = argc > 1 ? (uint64_t)atoll(argv[1]) : 1000;
    region = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    aside = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    mapped.start = region;
    aside->now = 1;
    CHECK(ivshmem_area_make(&area, &mapped, 8192, SIZE - 8192, 16, 4) == 0, 0);
    CHECK(join(&maker) == 0, 0);
    together(&of_messages, write_messages, WRITERS, read_messages, 1);
    together(&of_queue, put, WRITERS, take, 0);
    together(&of_calls, call, WRITERS, serve, 0);
    together(&of_value, set_value, 1, look_at_value, 0);
    together(&of_bytes, send_bytes, BOTH, receive_bytes, 0);
    printf("ended well\n");
    return 0;
}
