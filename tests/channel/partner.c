/* A program that has the header alone, at the other end of channels of Python's: it sends and receives
 * at once, and checks every byte. C11, and C++17.
 *
 *   partner FD KIND COUNT      the region's descriptor; messages, queue, value, calls or bytes
 *
 * "to python" and "to c" are two channels of the kind; of bytes, both directions of two connections: C
 * connects in the one, and accepts in the other. The test's other half is test_channel_partner.py.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "ivshmem_channel.h"

enum { LIMIT = 272, SLOTS = 16, CELLS = 3 * SLOTS, PLACES = 1024, UNDER_WAY = 8 };
#define BEAT INT64_C(100000000) /* nanoseconds */
#define PATIENCE (300 * BEAT)

static int64_t now(void *context)
{
    struct timespec time;
    (void)context;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

static void ring(void *context, unsigned peer, unsigned vector)
{
    (void)context, (void)peer, (void)vector;
}

static void check(const char *what, int code)
{
    if (code < 0) {
        fprintf(stderr, "%s: error %d of ivshmem_channel.h\n", what, -code);
        exit(1);
    }
}

static void expect(const char *what, uint64_t seen, uint64_t wanted)
{
    if (seen != wanted) {
        fprintf(stderr, "%s: %llu, not %llu\n", what, (unsigned long long)seen,
                (unsigned long long)wanted);
        exit(1);
    }
}

/* -- messages with a number, a checksum and bytes ------------------------------------------------- */

static unsigned char text[LIMIT];

/* Fill `text`, and return how many bytes it has. `salt` tells the directions apart. */
static uint32_t fill(uint64_t number, unsigned salt)
{
    uint32_t size = 16u + (uint32_t)((number * 37u + salt) % 257u);
    uint64_t sum;
    for (uint32_t i = 16; i < size; i++)
        text[i] = (unsigned char)(number * 7u + salt + i);
    sum = ivshmem_crc32(text + 16, size - 16);
    memcpy(text, &number, 8);
    memcpy(text + 8, &sum, 8);
    return size;
}

/* Check a message, and return its number. */
static uint64_t number_of(const unsigned char *message, uint32_t size, unsigned salt)
{
    uint64_t number, sum;
    if (size < 16 || size > LIMIT)
        expect("size", size, 16);
    memcpy(&number, message, 8);
    memcpy(&sum, message + 8, 8);
    expect("checksum", sum, ivshmem_crc32(message + 16, size - 16));
    expect("size", fill(number, salt), size);
    expect("difference", memcmp(text, message, size) != 0, 0);
    return number;
}

/* -- the ends ------------------------------------------------------------------------------------- */

static struct ivshmem_member member;
static struct ivshmem_pulse pulses[PLACES];
static struct ivshmem_channel outward, inward; /* "to python", "to c" */
static struct ivshmem_writer writer;
static struct ivshmem_reader reader;
static uint32_t cell_of[SLOTS], free_cells[CELLS];
static uint64_t count, sent, received;
static int unfinished; /* although all was sent and received */

static void find(struct ivshmem_channel *channel, const char *name)
{
    char padded[IVSHMEM_CHANNEL_NAME] = {0};
    struct ivshmem_record record;
    memcpy(padded, name, strlen(name));
    check(name, ivshmem_find(&member.area, padded, &record));
    ivshmem_channel_open(channel, &member.area, &record);
}

static void open_ends(enum ivshmem_overflow overflow)
{
    if (outward.record.geometry.slots > SLOTS || outward.layout.cells_each > CELLS ||
        outward.record.geometry.limit < LIMIT)
        check("geometry", IVSHMEM_BAD);
    writer.channel = &outward;
    reader.channel = &inward;
    writer.member = reader.member = &member;
    writer.tables.cell_of = cell_of;
    writer.tables.free = free_cells;
    reader.overflow = overflow;
    check("writer", ivshmem_writer_open(&writer));
    check("reader", ivshmem_reader_open(&reader, 0));
}

static void close_ends(void)
{
    ivshmem_reader_close(&reader);
    ivshmem_writer_close(&writer);
}

/* Each of these moves what it can at once, and says whether that was anything. */

static int messages(void)
{
    struct ivshmem_message message;
    unsigned char into[LIMIT];
    int moved = 0, code;
    if (sent < count) {
        code = ivshmem_put(&writer, text, fill(sent, 1), 0, 0);
        if (code != IVSHMEM_AGAIN) {
            check("put", code);
            moved = ++sent != 0;
        }
    }
    code = ivshmem_read(&reader, &message, into, sizeof into);
    if (code == IVSHMEM_AGAIN) {
        ivshmem_reader_settle(&reader);
        return moved;
    }
    check("read", code);
    expect("lost", message.lost, 0);
    expect("number", number_of(into, message.length, 2), received++);
    return 1;
}

static int queue(void)
{
    struct ivshmem_taken taken;
    unsigned char into[LIMIT];
    int moved = 0, code;
    if (sent < count) {
        code = ivshmem_queue_put(&writer, text, fill(sent, 1), 0, 0);
        if (code != IVSHMEM_AGAIN) {
            check("put", code);
            moved = ++sent != 0;
        }
    }
    code = ivshmem_queue_read(&reader, 1, into, sizeof into, &taken);
    if (code == IVSHMEM_AGAIN)
        return moved;
    check("read", code);
    expect("redelivered", (uint64_t)taken.redelivered, 0);
    expect("number", number_of(into, taken.message.length, 2), received++);
    return 1;
}

/* Of a value, `received` is the number that was seen last, from 1 on. */
static int value(void)
{
    struct ivshmem_message message;
    unsigned char into[LIMIT];
    uint64_t number;
    int moved = 0, code;
    if (sent < count) {
        code = ivshmem_put(&writer, text, fill(sent + 1, 1), 0, 0);
        check("put", code);
        moved = ++sent != 0;
    }
    code = ivshmem_value_look(&reader, &message);
    if (code == IVSHMEM_AGAIN)
        return moved;
    check("look", code);
    if (message.length > sizeof into)
        check("look", IVSHMEM_TOO_LONG);
    ivshmem_copy_payload(into, inward.area.memory.start + message.offset, message.length);
    if (ivshmem_check(&inward, &message) != 0)
        return 1;
    number = number_of(into, message.length, 2);
    if (number < received)
        expect("number", number, received);
    moved |= number != received;
    received = number;
    return moved;
}

/* The reply to a request has its number and another salt. */
static int calls(void)
{
    static uint64_t positions[UNDER_WAY], replied;
    uint32_t size;
    struct ivshmem_taken call;
    unsigned char into[LIMIT];
    int moved = 0, code, never;
    if (sent < count && sent - replied < UNDER_WAY) {
        positions[sent % UNDER_WAY] = writer.next;
        code = ivshmem_queue_put(&writer, text, fill(sent, 1), 0, 0);
        if (code != IVSHMEM_AGAIN) {
            check("call", code);
            moved = ++sent != 0;
        }
    }
    if (replied < sent) {
        uint64_t position = positions[replied % UNDER_WAY];
        uint32_t length = 0;
        unsigned status = 0;
        code = ivshmem_call_look(&writer, position, &length, &status);
        if (code != IVSHMEM_AGAIN) {
            check("reply", code);
            expect("status", status, 0);
            if (length > sizeof into)
                check("reply", IVSHMEM_TOO_LONG);
            ivshmem_copy_payload(into,
                                 outward.area.memory.start +
                                     ivshmem_reply_offset(&outward, writer.slot, position),
                                 length);
            expect("reply", number_of(into, length, 3), replied++);
            expect("ended", (uint64_t)ivshmem_call_end(&writer, position, &never), 1);
            moved = 1;
        }
    }
    unfinished = replied < count;
    code = ivshmem_queue_take(&reader, IVSHMEM_CLAIM_TAKEN, 1, &call);
    if (code == IVSHMEM_AGAIN)
        return moved;
    check("take", code);
    if (call.message.length > sizeof into)
        check("take", IVSHMEM_TOO_LONG);
    ivshmem_copy_payload(into, inward.area.memory.start + call.message.offset, call.message.length);
    expect("request", number_of(into, call.message.length, 2), received);
    size = fill(received++, 4);
    memcpy(inward.area.memory.start +
               ivshmem_reply_offset(&inward, call.message.writer, call.message.position),
           text, size);
    check("reply", ivshmem_reply(&reader, &call, size, 0));
    return 1;
}

/* -- bytes: frames of one size, with a message's size and the message ------------------------------ */

enum { FRAME = 8 + LIMIT };

struct flow {
    struct ivshmem_stream stream;
    unsigned char out[FRAME], in[FRAME];
    uint32_t left, filled; /* of out: what is yet to be sent; of in */
    uint64_t sent, received;
    int is_over; /* the other end sends no more */
};

static struct flow caller, acceptor;
static struct ivshmem_listener listener;

static int send_some(struct flow *flow)
{
    int64_t n;
    if (flow->left == 0) {
        uint64_t size;
        if (flow->sent == count)
            return 0;
        size = fill(flow->sent, 1);
        memcpy(flow->out, &size, 8);
        memcpy(flow->out + 8, text, LIMIT);
        flow->left = FRAME;
    }
    n = ivshmem_send(&flow->stream, flow->out + FRAME - flow->left, flow->left);
    if (n == IVSHMEM_AGAIN)
        return 0;
    check("send", (int)n);
    flow->left -= (uint32_t)n;
    if (flow->left == 0 && ++flow->sent == count)
        ivshmem_stream_shutdown(&flow->stream, 1, 0);
    return 1;
}

static int receive_some(struct flow *flow)
{
    uint64_t size;
    int64_t n;
    if (flow->is_over)
        return 0;
    n = ivshmem_receive(&flow->stream, flow->in + flow->filled, FRAME - flow->filled);
    if (n == IVSHMEM_AGAIN)
        return 0;
    check("receive", (int)n);
    flow->is_over = n == 0;
    flow->filled += (uint32_t)n;
    if (flow->filled < FRAME)
        return 1;
    flow->filled = 0;
    memcpy(&size, flow->in, 8);
    if (size > LIMIT)
        expect("size", size, LIMIT);
    expect("number", number_of(flow->in + 8, (uint32_t)size, 2), flow->received++);
    return 1;
}

static int bytes(void)
{
    int moved = send_some(&caller) | receive_some(&caller);
    if (acceptor.stream.channel == NULL) {
        int code = ivshmem_accept(&listener, &acceptor.stream);
        if (code == IVSHMEM_AGAIN)
            acceptor.stream.channel = NULL;
        else
            check("accept", code);
    }
    if (acceptor.stream.channel != NULL)
        moved |= send_some(&acceptor) | receive_some(&acceptor);
    unfinished = !caller.is_over || !acceptor.is_over;
    sent = caller.sent < acceptor.sent ? caller.sent : acceptor.sent;
    received = caller.received < acceptor.received ? caller.received : acceptor.received;
    return moved;
}

static void open_bytes(void)
{
    listener.channel = &inward;
    listener.member = caller.stream.member = &member;
    caller.stream.channel = &outward;
    check("listen", ivshmem_listen(&listener));
    check("connect", ivshmem_stream_connect(&caller.stream));
}

static void close_bytes(void)
{
    ivshmem_stream_close(&caller.stream);
    ivshmem_stream_close(&acceptor.stream);
    ivshmem_listener_close(&listener);
}

/* -- all of them ---------------------------------------------------------------------------------- */

int main(int argc, char **argv)
{
    static const char *const names[] = {"messages", "queue", "value", "calls", "bytes"};
    static int (*const moves[])(void) = {messages, queue, value, calls, bytes};
    const struct timespec pause = {0, 20000};
    struct ivshmem_memory memory;
    struct stat status;
    unsigned kind = 0;
    uint64_t offset = 0;
    int64_t beaten = 0, moved_at = now(NULL);

    if (argc != 4)
        return 2;
    while (strcmp(argv[2], names[kind]) != 0)
        if (++kind == 5)
            return 2;
    count = strtoull(argv[3], NULL, 10);
    if (fstat(atoi(argv[1]), &status) != 0)
        return 2;
    memory.size = (uint64_t)status.st_size;
    memory.start = (unsigned char *)mmap(NULL, (size_t)memory.size, PROT_READ | PROT_WRITE,
                                         MAP_SHARED, atoi(argv[1]), 0);
    if (memory.start == MAP_FAILED)
        return 2;
    memory.mapping = IVSHMEM_WRITE_BACK;
    memory.readonly = 0;
    check("area", ivshmem_find_area(&memory, &offset));
    check("area", ivshmem_area_open(&member.area, &memory, offset));
    if (member.area.places > PLACES)
        check("area", IVSHMEM_BAD);
    member.pulses = pulses;
    member.lease = 10 * BEAT;
    member.user.ring = ring;
    member.user.now = now;
    member.looked = now(NULL);
    member.peer = IVSHMEM_PEER_MUTE;
    member.process = (uint64_t)getpid();
    check("place", ivshmem_join(&member, (uint64_t)now(NULL) * 2654435761u | 1u, "partner"));
    find(&outward, "to python");
    find(&inward, "to c");
    if (kind == 4)
        open_bytes();
    else
        open_ends(kind == 2 ? IVSHMEM_OVERWRITE : IVSHMEM_BLOCK);
    printf("ready\n");
    fflush(stdout);

    for (;;) {
        if (now(NULL) - beaten >= BEAT) { /* others take a process that does not beat for silent */
            beaten = now(NULL);
            check("beat", ivshmem_beat(&member));
        }
        if (moves[kind]()) {
            moved_at = now(NULL);
            continue;
        }
        if (sent == count && received == count && !unfinished)
            break;
        if (now(NULL) - moved_at > PATIENCE) {
            fprintf(stderr, "nothing moves: sent %llu, received %llu\n", (unsigned long long)sent,
                    (unsigned long long)received);
            return 1;
        }
        nanosleep(&pause, NULL);
    }
    if (kind == 4)
        close_bytes();
    else
        close_ends();
    ivshmem_leave_area(&member);
    printf("sent %llu, received %llu\n", (unsigned long long)sent, (unsigned long long)received);
    return 0;
}
