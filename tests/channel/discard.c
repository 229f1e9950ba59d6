/* Readers that drop the newest: each put says how many of them missed its message. One process has
 * the writer and all readers.
 */
#include "steps.h"

static const struct ivshmem_geometry geometry = {.kind = IVSHMEM_MESSAGES,
                                                 .overflow = IVSHMEM_OVERWRITE | IVSHMEM_DISCARD,
                                                 .writers = 1,
                                                 .readers = READERS,
                                                 .slots = SLOTS,
                                                 .loans = LOANS,
                                                 .views = 2,
                                                 .limit = LONG};

static struct peer writer, first, second, third;

static void put(struct peer *peer, uint64_t number, unsigned missed)
{
    fatal = (long)number; /* a failure names the message */
    CHECK(ivshmem_put(&peer->writer, filled(number), LONG, 0, number) == 0, number);
    CHECK(peer->writer.missed == missed, peer->writer.missed);
}

static void get(struct peer *peer, uint64_t number, uint64_t lost)
{
    struct ivshmem_message message;
    uint64_t words[WORDS];
    int code = ivshmem_read(&peer->reader, &message, words, LONG);
    CHECK(code == 0, code);
    CHECK(number_in(words) == number && message.user == number, words[0]);
    CHECK(message.lost == lost, message.lost);
}

static void get_nothing(struct peer *peer)
{
    struct ivshmem_message message;
    uint64_t words[WORDS];
    CHECK(ivshmem_read(&peer->reader, &message, words, LONG) == IVSHMEM_AGAIN, words[0]);
}

static void begin(struct peer *peer, enum ivshmem_overflow overflow)
{
    CHECK(join(peer) == 0, 0);
    CHECK(open_channel(peer, channel_name) == 0, 0);
    CHECK(open_reader(peer, overflow) == 0, 0);
}

/* How many cells hold a message: those of the ring, and those in backlogs alone. */
static unsigned used(void)
{
    return (unsigned)writer.channel.layout.cells_each - writer.writer.free_cells;
}

static void count_what_is_missed(void)
{
    begin(&first, IVSHMEM_DISCARD);
    begin(&second, IVSHMEM_DISCARD);
    begin(&third, IVSHMEM_OVERWRITE);
    for (uint64_t i = 0; i < SLOTS; i++)
        put(&writer, i, 0);
    put(&writer, 4, 2);
    get(&first, 0, 0);
    put(&writer, 5, 1); /* the first one has room again */
    put(&writer, 6, 2);
    for (uint64_t i = 1; i < SLOTS; i++)
        get(&first, i, 0);
    get(&first, 5, 0);
    get_nothing(&first);
    for (uint64_t i = 0; i < SLOTS; i++)
        get(&second, i, 0);
    get_nothing(&second);
    get(&third, 3, 3); /* three were overwritten */
    put(&writer, 7, 0);
    get(&first, 7, 0);
    get(&second, 7, 0);
}

/* What a reader looks at stays, however much is written. */
static void look_at_one(void)
{
    struct ivshmem_message message;
    uint32_t loans[LOANS];
    put(&writer, 10, 0);
    CHECK(ivshmem_take(&first.reader, &message) == 0, 0);
    for (uint64_t i = 11; i < 10 + SLOTS; i++)
        put(&writer, i, 0);
    for (uint64_t i = 10 + SLOTS; i < 50; i++)
        put(&writer, i, 2);
    CHECK(ivshmem_check(&first.channel, &message) == 0, 0);
    CHECK(number_in((const uint64_t *)(void *)(region + message.offset)) == 10, 0);
    for (int i = 0; i < LOANS; i++)
        CHECK(ivshmem_loan(&writer.writer, &loans[i]) == 0, i);
    for (int i = 0; i < LOANS; i++)
        ivshmem_loan_drop(&writer.writer, loans[i]);
    ivshmem_release(&first.reader, message.writer, first.reader.sources[0].next);
    put(&writer, 50, 1);
    for (uint64_t i = 11; i < 10 + SLOTS; i++)
        get(&first, i, 0);
    get(&first, 50, 0);
    get_nothing(&first);
}

/* A reader that ends is counted no more, and its cells come back. */
static void end_readers(void)
{
    ivshmem_reader_close(&second.reader); /* with a full backlog */
    ivshmem_leave_area(&second.member);
    for (uint64_t i = 60; i < 60 + SLOTS; i++)
        put(&writer, i, 0);
    put(&writer, 64, 1); /* the first one */
    ivshmem_leave_area(&first.member); /* its process ended without a word */
    put(&writer, 65, 0);
    put(&writer, 66, 0);
    CHECK(used() == SLOTS, used());
}

/* The next reader of a slot begins with nothing; one that is silent is counted. */
static void begin_again(void)
{
    begin(&first, IVSHMEM_DISCARD);
    get_nothing(&first);
    put(&writer, 70, 0);
    get(&first, 70, 0);
    for (uint64_t i = 71; i < 71 + SLOTS; i++)
        put(&writer, i, 0);
    pass_lease(&writer);
    CHECK(ivshmem_is_silent(&writer.member, first.member.place), 0);
    put(&writer, 75, 1);
}

/* What a writer left is read; the next writer begins with empty backlogs. */
static void end_writer(void)
{
    static struct peer next;
    CHECK(join(&next) == 0, 0);
    CHECK(open_channel(&next, channel_name) == 0, 0);
    CHECK(ivshmem_beat(&first.member) >= 0, 0);
    CHECK(ivshmem_beat(&writer.member) >= 0, 0); /* it sees that the reader is back */
    ivshmem_writer_close(&writer.writer);
    CHECK(open_writer(&next) == IVSHMEM_TAKEN, 0);
    for (uint64_t i = 71; i < 71 + SLOTS; i++)
        get(&first, i, 0);
    get_nothing(&first);
    ivshmem_reader_close(&third.reader); /* it had not read all that is left */
    CHECK(open_writer(&next) == 0, 0);
    for (uint64_t i = 80; i < 80 + SLOTS; i++)
        put(&next, i, 0);
    put(&next, 84, 1);
    for (uint64_t i = 80; i < 80 + SLOTS; i++)
        get(&first, i, 0);
    get_nothing(&first);
}

int main(void)
{
    const struct ivshmem_memory memory = {NULL, SIZE, IVSHMEM_WRITE_BACK, 0};
    struct ivshmem_memory mapped = memory;
    struct ivshmem_area area;
    region = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    aside = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    mapped.start = region;
    aside->now = 1;
    CHECK(ivshmem_area_make(&area, &mapped, 8192, SIZE - 8192, 8, 4) == 0, 0);
    CHECK(join(&writer) == 0, 0);
    CHECK(create(&writer, channel_name, &geometry) == 0, 0);
    CHECK(open_channel(&writer, channel_name) == 0, 0);
    CHECK(open_writer(&writer) == 0, 0);
    count_what_is_missed();
    look_at_one();
    end_readers();
    begin_again();
    end_writer();
    printf("ended well\n");
    return 0;
}
