/* Positions wrap: those of claims modulo 2^28, all others modulo 2^40. One process has all ends. It
 * does not put so many messages: it moves a writer, whose words say the same then.
 */
#include "steps.h"

static const struct ivshmem_geometry
    queue = {.kind = IVSHMEM_QUEUE, .writers = 1, .readers = 2, .slots = SLOTS, .loans = LOANS,
             .views = 2, .limit = LONG},
    value = {.kind = IVSHMEM_VALUE, .overflow = IVSHMEM_OVERWRITE, .writers = 1, .readers = 2,
             .slots = SLOTS, .loans = LOANS, .views = 2, .limit = LONG},
    messages = {.kind = IVSHMEM_MESSAGES, .overflow = IVSHMEM_OVERWRITE | IVSHMEM_BLOCK,
                .writers = 1, .readers = 2, .slots = SLOTS, .loans = LOANS, .views = 2,
                .limit = LONG};
static const uint64_t distances[] = {SLOTS, 1 << 27, 1 << 28, (1 << 28) + (1 << 27),
                                     UINT64_C(1) << 39, UINT64_C(1) << 40};

static struct peer writer, one, two;

/* A channel whose first writer begins at a position. */
static void begin(const struct ivshmem_geometry *geometry, uint64_t at)
{
    const struct ivshmem_memory memory = {region, SIZE, IVSHMEM_WRITE_BACK, 0};
    struct ivshmem_area area;
    memset(region, 0, SIZE);
    aside->now = 1;
    CHECK(ivshmem_area_make(&area, &memory, 8192, SIZE - 8192, 8, 4) == 0, 0);
    CHECK(join(&writer) == 0 && join(&one) == 0 && join(&two) == 0, 0);
    CHECK(create(&writer, channel_name, geometry) == 0, 0);
    CHECK(open_channel(&writer, channel_name) == 0, 0);
    CHECK(open_channel(&one, channel_name) == 0 && open_channel(&two, channel_name) == 0, 0);
    ivshmem_store(&memory, writer.channel.at + writer.channel.layout.heads,
                  ivshmem_word(at, 0, 0));
    CHECK(open_writer(&writer) == 0, 0);
}

/* As after `distance` messages more; a multiple of SLOTS. */
static void move(uint64_t distance)
{
    writer.writer.next = (writer.writer.next + distance) & IVSHMEM_VALUE_MASK;
}

static void put(uint64_t number)
{
    CHECK(ivshmem_queue_put(&writer.writer, filled(number), LONG, 0, number) == 0, number);
}

static void take(struct peer *peer, uint64_t number, int redelivered, struct ivshmem_taken *taken)
{
    int code = ivshmem_queue_take(&peer->reader, IVSHMEM_CLAIM_TAKEN, 1, taken);
    CHECK(code == 0, code);
    CHECK(taken->message.user == number && taken->redelivered == redelivered, taken->message.user);
}

static void get(uint64_t number)
{
    struct ivshmem_taken taken;
    take(&two, number, 0, &taken);
    CHECK(ivshmem_queue_done(&two.reader, &taken) == 0, number);
}

/* A reader keeps a message while so many others pass; then it gives it back, or falls silent. */
static void kept_for_long(uint64_t distance, int silent)
{
    struct ivshmem_taken kept, taken;
    begin(&queue, 0);
    CHECK(open_reader(&one, IVSHMEM_OVERWRITE) == 0, 0);
    CHECK(open_reader(&two, IVSHMEM_OVERWRITE) == 0, 0);
    put(1);
    take(&one, 1, 0, &kept);
    for (uint64_t i = 2; i < 2 + SLOTS; i++) {
        put(i);
        get(i);
    }
    move(distance);
    for (uint64_t i = 10; i < 10 + 2 * SLOTS; i++) {
        put(i);
        get(i);
    }
    CHECK(!ivshmem_queue_has_more(&two.reader), 0);
    if (silent)
        pass_lease(&two);
    else
        CHECK(ivshmem_queue_return(&one.reader, &kept) == 0, 0);
    CHECK(ivshmem_queue_has_more(&two.reader), 0);
    put(2 * SLOTS); /* the writer goes on, past it */
    get(2 * SLOTS);
    take(&two, 1, 1, &taken);
    CHECK(taken.message.position == kept.message.position, taken.message.position);
    CHECK(ivshmem_queue_done(&one.reader, &kept) == IVSHMEM_OVERTAKEN, 0);
    CHECK(ivshmem_queue_done(&two.reader, &taken) == 0, 0);
    CHECK(!ivshmem_queue_has_more(&two.reader), 0);
    ivshmem_writer_close(&writer.writer);
    CHECK(ivshmem_flags(ivshmem_writer_owner(&two.channel, 0)) == IVSHMEM_SLOT_FREE, 0);
}

/* A reader stops after it has seen a claim. When it goes on, the claim of a later message is the
 * same: it has that message then. */
static void the_same_claim_again(uint64_t distance)
{
    struct ivshmem_taken taken;
    uint64_t claim;
    begin(&queue, 0);
    CHECK(open_reader(&one, IVSHMEM_OVERWRITE) == 0, 0);
    CHECK(open_reader(&two, IVSHMEM_OVERWRITE) == 0, 0);
    put(1);
    claim = ivshmem_get(&one.channel, ivshmem_claim_at(&one.channel, 0, 0));
    one.reader.sources[0].epoch = writer.writer.epoch;
    get(1);
    writer.writer.next--; /* its next message is exactly so far */
    move(distance);
    put(2);
    CHECK(ivshmem_get(&one.channel, ivshmem_claim_at(&one.channel, 0, 0)) == claim, 0);
    CHECK(ivshmem_queue_claim(&one.reader, 0, 0, claim, IVSHMEM_CLAIM_TAKEN, &taken) == 0, 0);
    CHECK(taken.message.user == 2, taken.message.user);
    CHECK(ivshmem_queue_done(&one.reader, &taken) == 0, 0);
}

/* A value has a content at each position; before its first one it has none. */
static void values(void)
{
    struct ivshmem_message message;
    begin(&value, 0);
    CHECK(open_reader(&one, IVSHMEM_OVERWRITE) == 0, 0);
    CHECK(ivshmem_value_look(&one.reader, &message) == IVSHMEM_AGAIN, 0);
    begin(&value, IVSHMEM_VALUE_MASK - 1);
    CHECK(open_reader(&one, IVSHMEM_OVERWRITE) == 0, 0);
    for (uint64_t i = 0; i < 4; i++) {
        CHECK(ivshmem_put(&writer.writer, filled(i), LONG, 0, i) == 0, i);
        CHECK(ivshmem_value_look(&one.reader, &message) == 0, i);
        CHECK(message.user == i, message.user);
    }
}

/* A late reader gets the history across the place where positions wrap. */
static void history(void)
{
    struct ivshmem_message message;
    uint64_t words[WORDS];
    begin(&messages, IVSHMEM_VALUE_MASK - 2);
    for (uint64_t i = 0; i < SLOTS; i++)
        CHECK(ivshmem_put(&writer.writer, filled(i), LONG, 0, i) == 0, i);
    one.reader.channel = &one.channel;
    one.reader.member = &one.member;
    one.reader.overflow = IVSHMEM_OVERWRITE;
    CHECK(ivshmem_reader_open(&one.reader, SLOTS - 1) == 0, 0);
    for (uint64_t i = 1; i < SLOTS; i++) {
        CHECK(ivshmem_read(&one.reader, &message, words, LONG) == 0, i);
        CHECK(message.user == i && message.lost == 0, message.user);
    }
}

/* A stopped reader that blocks falls behind until it seems to be ahead: no writer calls it corrupt. */
static void a_reader_that_is_silent(void)
{
    begin(&messages, 0);
    CHECK(open_reader(&one, IVSHMEM_BLOCK) == 0, 0);
    CHECK(ivshmem_put(&writer.writer, filled(1), LONG, 0, 1) == 0, 0);
    pass_lease(&writer);
    for (unsigned i = 0; i < sizeof distances / sizeof *distances; i++) {
        move(distances[i]);
        writer.writer.bound = writer.writer.next;
        for (uint64_t j = 0; j < 2 * SLOTS; j++)
            CHECK(ivshmem_put(&writer.writer, filled(j), LONG, 0, j) == 0, i);
    }
}

int main(void)
{
    region = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    aside = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    for (unsigned i = 0; i < sizeof distances / sizeof *distances; i++) {
        fatal = (long)i; /* a failure names the distance */
        kept_for_long(distances[i], 0);
        kept_for_long(distances[i], 1);
    }
    the_same_claim_again(UINT64_C(1) << 28);
    the_same_claim_again(UINT64_C(1) << 39);
    values();
    history();
    a_reader_that_is_silent();
    printf("ended well\n");
    return 0;
}
