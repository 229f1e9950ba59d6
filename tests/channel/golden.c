/* Makes an area that has always the same bytes, and reads one: golden.txt has them.
 *
 *   golden write|read FD
 *
 * FD is a region of 1 MiB; the area begins at AT. All that is random or depends on the machine is
 * fixed here: the numbers of places, the process, the time.
 */
#include "steps.h"

enum { AT = 8192, AREA = 1 << 16 };

static const char names[5][IVSHMEM_CHANNEL_NAME] = {"messages", "queue", "value", "calls", "bytes"};

static const struct ivshmem_geometry golden[] = {
    {IVSHMEM_MESSAGES, 7, IVSHMEM_TIMES, 2, READERS, SLOTS, LOANS, 2, LONG},
    {IVSHMEM_QUEUE, 0, 0, 2, 2, SLOTS, LOANS, 2, LONG},
    {IVSHMEM_VALUE, IVSHMEM_OVERWRITE, 0, 1, 2, SLOTS, LOANS, 2, LONG},
    {IVSHMEM_CALLS, 0, 0, 2, 2, SLOTS, LOANS, 2, LONG},
    {IVSHMEM_BYTES, 0, 0, 3, 2, 128, 1, 1, 1}};

static struct ivshmem_area area;

static void begin(struct peer *peer, uint64_t number)
{
    static const char name[56] = "golden";
    memset(peer, 0, sizeof *peer);
    peer->member.area = area;
    peer->member.user.ring = ring;
    peer->member.user.now = now;
    peer->member.pulses = peer->pulses;
    peer->member.lease = LEASE;
    peer->member.machine = 0x123456789a;
    peer->member.process = 4711;
    peer->member.started = 42;
    peer->member.peer = 3 | 1 << 16;
    CHECK(ivshmem_join(&peer->member, number, name) == 0, 0);
}

static void make(struct peer *peer, int i)
{
    struct ivshmem_record record;
    memset(&record, 0, sizeof record);
    memcpy(record.name, names[i], sizeof record.name);
    strcpy(record.type, i == 2 ? "array <f8 4x6" : "schema golden");
    record.geometry = golden[i];
    record.created = UINT64_C(1700000000000000000);
    CHECK(ivshmem_create(&peer->member, &record) == 0, i);
    CHECK(open_channel(peer, record.name) == 0, i);
}

/* One writer has published 5 messages, and one has been taken, of all that can be taken. */
static void write_all(void)
{
    static struct peer peers[5], reader;
    static struct ivshmem_listener listener;
    static struct ivshmem_stream caller, acceptor;
    const struct ivshmem_memory memory = {region, SIZE, IVSHMEM_WRITE_BACK, 0};
    struct ivshmem_message message;
    struct ivshmem_taken taken;
    uint64_t words[WORDS];
    unsigned char bytes[16];
    uint32_t cell;
    CHECK(ivshmem_area_make(&area, &memory, AT, AREA, 8, 8) == 0, 0);
    begin(&reader, 0x1111111111);
    for (int i = 0; i < 5; i++) {
        begin(&peers[i], 0x2222222222 + (uint64_t)i);
        make(&peers[i], i);
        CHECK(open_channel(&reader, names[i]) == 0, i);
        if (i < 4)
            CHECK(open_writer(&peers[i]) == 0, i);
        if (i == 0) {
            CHECK(open_reader(&reader, IVSHMEM_DISCARD) == 0, i);
            for (uint64_t n = 0; n < 5; n++)
                CHECK(ivshmem_put(&peers[i].writer, filled(n), LONG, 1000 + n, n) == 0, i);
            CHECK(ivshmem_read(&reader.reader, &message, words, LONG) == 0, i);
            CHECK(ivshmem_reader_sleep(&reader.reader) == 0, i);
        } else if (i == 1) {
            CHECK(open_reader(&reader, IVSHMEM_OVERWRITE) == 0, i);
            for (uint64_t n = 0; n < 3; n++)
                CHECK(ivshmem_queue_put(&peers[i].writer, filled(n), 8 * (uint32_t)(n + 1), 0, n) == 0,
                      i);
            CHECK(ivshmem_queue_take(&reader.reader, IVSHMEM_CLAIM_TAKEN, 0, &taken) == 0, i);
        } else if (i == 2) {
            for (uint64_t n = 0; n < 6; n++)
                CHECK(ivshmem_put(&peers[i].writer, filled(n), LONG, 0, n) == 0, i);
        } else if (i == 3) {
            CHECK(open_reader(&reader, IVSHMEM_OVERWRITE) == 0, i);
            for (uint64_t n = 0; n < 2; n++) {
                CHECK(ivshmem_queue_ready(&peers[i].writer) == 0, i);
                CHECK(ivshmem_loan(&peers[i].writer, &cell) == 0, i);
                memcpy(region + peers[i].writer.cells_at +
                           cell * peers[i].channel.layout.cell_bytes,
                       filled(n), LONG);
                ivshmem_queue_publish(&peers[i].writer, cell, LONG, 0, n);
            }
            CHECK(ivshmem_queue_take(&reader.reader, IVSHMEM_CLAIM_TAKEN, 0, &taken) == 0, i);
            memcpy(region + ivshmem_reply_offset(&reader.channel, taken.message.writer,
                                                 taken.message.position),
                   filled(99), LONG);
            CHECK(ivshmem_reply(&reader.reader, &taken, LONG, 0) == 0, i);
        } else {
            listener.channel = &reader.channel;
            listener.member = &reader.member;
            CHECK(ivshmem_listen(&listener) == 0, i);
            caller.channel = &peers[i].channel;
            caller.member = &peers[i].member;
            CHECK(ivshmem_stream_connect(&caller) == 0, i);
            acceptor.channel = &reader.channel;
            acceptor.member = &reader.member;
            CHECK(ivshmem_accept(&listener, &acceptor) == 0, i);
            CHECK(ivshmem_send(&caller, "from the caller", 16) == 16, i);
            CHECK(ivshmem_receive(&acceptor, bytes, 8) == 8, i);
            ivshmem_stream_shutdown(&caller, 1, 0);
            CHECK(ivshmem_stream_connect(&caller) == 0, i); /* another one, which waits */
            CHECK(ivshmem_send(&caller, "waits", 6) == 6, i);
        }
    }
}

/* Say what another process left there. */
static void read_all(void)
{
    static struct peer peer;
    static struct ivshmem_listener listener;
    static struct ivshmem_stream stream;
    const struct ivshmem_memory memory = {region, SIZE, IVSHMEM_WRITE_BACK, 0};
    struct ivshmem_message message;
    struct ivshmem_taken taken;
    uint64_t words[WORDS];
    char bytes[16] = "";
    CHECK(ivshmem_area_open(&area, &memory, AT) == 0, 0);
    begin(&peer, 0x3333333333);
    for (int i = 0; i < 5; i++) {
        const struct ivshmem_geometry *g = &peer.channel.record.geometry;
        CHECK(open_channel(&peer, names[i]) == 0, i);
        CHECK(memcmp(g, &golden[i], sizeof *g) == 0, i);
        printf("%s, %s, %llu:", names[i], peer.channel.record.type,
               (unsigned long long)peer.channel.record.created);
        if (i < 4) {
            peer.reader.channel = &peer.channel;
            peer.reader.member = &peer.member;
            peer.reader.overflow = i == 0 || i == 2 ? IVSHMEM_OVERWRITE : (enum ivshmem_overflow)0;
            CHECK(ivshmem_reader_open(&peer.reader, 3) == 0, i);
        }
        if (i == 0)
            while (ivshmem_read(&peer.reader, &message, words, LONG) == 0)
                printf(" %llu at %llu", (unsigned long long)number_in(words),
                       (unsigned long long)message.time);
        else if (i == 1 || i == 3)
            while (ivshmem_queue_read(&peer.reader, 0, words, LONG, &taken) == 0)
                printf(" %llu of %u", (unsigned long long)words[0], taken.message.length);
        else if (i == 2) {
            CHECK(ivshmem_value_look(&peer.reader, &message) == 0, i);
            memcpy(words, region + message.offset, LONG);
            printf(" %llu", (unsigned long long)number_in(words));
        } else {
            listener.channel = stream.channel = &peer.channel;
            listener.member = stream.member = &peer.member;
            CHECK(ivshmem_listen(&listener) == 0, i);
            CHECK(ivshmem_accept(&listener, &stream) == 0, i);
            CHECK(ivshmem_receive(&stream, bytes, sizeof bytes) == 6, i);
            printf(" %s", bytes);
        }
        printf("\n");
    }
}

int main(int argc, char **argv)
{
    CHECK(argc == 3, argc);
    aside = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    aside->now = 1;
    region = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, atoi(argv[2]), 0);
    CHECK(region != MAP_FAILED, errno);
    if (strcmp(argv[1], "write") == 0)
        write_all();
    else
        read_all();
    return 0;
}
