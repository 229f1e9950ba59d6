/* Positions that wrap: after the last one comes 0, as in a channel that nobody has written to.
 */
#include "steps.h"

static const struct ivshmem_geometry kinds[] = {{.kind = IVSHMEM_VALUE,
                                                 .overflow = IVSHMEM_OVERWRITE,
                                                 .writers = 1,
                                                 .readers = 1,
                                                 .slots = SLOTS,
                                                 .loans = LOANS,
                                                 .views = 2,
                                                 .limit = LONG},
                                                {.kind = IVSHMEM_MESSAGES,
                                                 .overflow = IVSHMEM_OVERWRITE,
                                                 .writers = 1,
                                                 .readers = 1,
                                                 .slots = SLOTS,
                                                 .loans = LOANS,
                                                 .views = 2,
                                                 .limit = LONG}};
static struct peer peer;

/* Open a channel whose next message has a position this far before the wrap. */
static void begin(const char *name, const struct ivshmem_geometry *geometry, uint64_t before)
{
    CHECK(create(&peer, name, geometry) == 0, 0);
    CHECK(open_channel(&peer, name) == 0, 0);
    ivshmem_store(&peer.channel.area.memory, peer.channel.at + peer.channel.layout.heads,
                  ivshmem_word((0 - before) & IVSHMEM_VALUE_MASK, 0, 0));
    CHECK(open_writer(&peer) == 0, 0);
}

static void put(uint64_t number)
{
    CHECK(ivshmem_put(&peer.writer, filled(number), LONG, 0, number) == 0, number);
}

/* Open a reader of a history; the messages that it gets are these. */
static void read_history(uint32_t history, uint64_t first, uint64_t last)
{
    struct ivshmem_message message;
    uint64_t words[WORDS];
    peer.reader.channel = &peer.channel;
    peer.reader.member = &peer.member;
    peer.reader.overflow = IVSHMEM_OVERWRITE;
    CHECK(ivshmem_reader_open(&peer.reader, history) == 0, history);
    for (uint64_t number = first; number <= last; number++) {
        CHECK(ivshmem_read(&peer.reader, &message, words, LONG) == 0, number);
        CHECK(number_in(words) == number && message.lost == 0, words[0]);
    }
    CHECK(ivshmem_read(&peer.reader, &message, words, LONG) == IVSHMEM_AGAIN, last);
    ivshmem_reader_close(&peer.reader);
}

static void value(void)
{
    struct ivshmem_message message;
    begin(channel_name, &kinds[0], 2);
    CHECK(open_reader(&peer, IVSHMEM_OVERWRITE) == 0, 0);
    for (uint64_t number = 1; number <= 5; number++) {
        put(number);
        CHECK(ivshmem_value_look(&peer.reader, &message) == 0, number);
        CHECK(message.user == number, message.user);
    }
    ivshmem_reader_close(&peer.reader);
    ivshmem_writer_close(&peer.writer);
}

static void history(void)
{
    begin(other_name, &kinds[1], 2);
    for (uint64_t number = 1; number <= 5; number++) {
        put(number);
        read_history(SLOTS - 1, number > SLOTS - 1 ? number - (SLOTS - 2) : 1, number);
        read_history(1, number, number);
    }
    ivshmem_writer_close(&peer.writer);
}

/* Nothing stands before position 0 here. */
static void never_set(void)
{
    static const char names[2][IVSHMEM_CHANNEL_NAME] = {"new value", "new messages"};
    struct ivshmem_message message;
    begin(names[0], &kinds[0], 0);
    CHECK(open_reader(&peer, IVSHMEM_OVERWRITE) == 0, 0);
    CHECK(ivshmem_value_look(&peer.reader, &message) == IVSHMEM_AGAIN, 0);
    ivshmem_reader_close(&peer.reader);
    ivshmem_writer_close(&peer.writer);
    begin(names[1], &kinds[1], 0);
    put(1);
    read_history(SLOTS - 1, 1, 1);
}

int main(void)
{
    struct ivshmem_memory mapped = {NULL, SIZE, IVSHMEM_WRITE_BACK, 0};
    struct ivshmem_area area;
    region = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    aside = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    mapped.start = region;
    aside->now = 1;
    CHECK(ivshmem_area_make(&area, &mapped, 8192, SIZE - 8192, 8, 4) == 0, 0);
    CHECK(join(&peer) == 0, 0);
    value();
    history();
    never_set();
    printf("ended well\n");
    return 0;
}
