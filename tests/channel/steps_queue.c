/* A process is killed or stopped at each step that it makes with a queue; see steps.h. */
#include "steps.h"

enum { MESSAGES = 7 };

static const struct ivshmem_geometry geometry = {.kind = IVSHMEM_QUEUE,
                                                 .writers = 2,
                                                 .readers = 2,
                                                 .slots = SLOTS,
                                                 .loans = LOANS,
                                                 .views = 2,
                                                 .limit = LONG};

/* How often the test's own process got each message, and whether it was marked as redelivered. */
static int had[MESSAGES + 2], marked[MESSAGES + 2];

static int put(struct peer *peer, uint64_t number)
{
    return ivshmem_queue_put(&peer->writer, filled(number), LONG, 0, number);
}

static uint64_t look_at(const struct ivshmem_taken *taken)
{
    uint64_t words[WORDS];
    CHECK(taken->message.length == LONG, taken->message.length);
    memcpy(words, region + taken->message.offset, LONG);
    return number_in(words);
}

static void take_all(struct peer *peer)
{
    struct ivshmem_taken taken;
    int code;
    while ((code = ivshmem_queue_take(&peer->reader, IVSHMEM_CLAIM_TAKEN, 1, &taken)) == 0) {
        uint64_t number = look_at(&taken);
        CHECK(number < MESSAGES + 2, number);
        had[number]++;
        marked[number] += taken.redelivered;
        CHECK(ivshmem_queue_done(&peer->reader, &taken) == 0, number);
    }
    CHECK(code == IVSHMEM_AGAIN, code);
}

static void begin(void)
{
    memset(had, 0, sizeof had);
    memset(marked, 0, sizeof marked);
}

/* Each slot of each writer can be used, and what is put is got once. */
static void use(struct peer *peer)
{
    static struct peer second;
    CHECK(join(&second) == 0, 0);
    CHECK(open_channel(&second, channel_name) == 0, 0);
    CHECK(open_writer(&second) == 0, 0);
    begin();
    for (uint64_t round = 0; round < 3; round++) {
        for (uint64_t i = 0; i < SLOTS; i++)
            CHECK(put(&second, i) == 0, i);
        CHECK(put(&second, 0) == IVSHMEM_AGAIN, round);
        take_all(peer);
    }
    for (uint64_t i = 0; i < SLOTS; i++)
        CHECK(had[i] == 3 && marked[i] == 0, had[i]);
    ivshmem_writer_close(&second.writer);
    ivshmem_leave_area(&second.member);
}

/* -- the child puts ------------------------------------------------------------------------------ */

static void read_from_it(struct peer *peer)
{
    begin();
    CHECK(open_reader(peer, IVSHMEM_OVERWRITE) == 0, 0);
}

static void put_messages(void)
{
    static struct peer peer;
    must(join(&peer));
    must(open_channel(&peer, channel_name));
    must(open_writer(&peer));
    for (uint64_t i = 0; i < MESSAGES; i++) {
        int code;
        aside->began = (int64_t)i + 1;
        code = put(&peer, i);
        if (code == IVSHMEM_AGAIN) {
            ivshmem_queue_writer_sleep(&peer.writer);
            ivshmem_sleep_end(&peer.channel, &peer.writer.sleep);
            aside->began = (int64_t)i;
            break;
        }
        must(code);
        aside->ended = (int64_t)i + 1;
    }
    ivshmem_writer_close(&peer.writer);
    ivshmem_leave_area(&peer.member);
}

static void got_what_was_put(struct peer *peer)
{
    take_all(peer);
    for (int i = 0; i < MESSAGES; i++)
        CHECK(had[i] <= 1 && (had[i] == 1 || i >= aside->ended), i);
}

static void got_all(struct peer *peer)
{
    static struct peer second;
    got_what_was_put(peer);
    for (int i = 0; i < MESSAGES; i++)
        CHECK(had[i] == 0 || i < aside->began, i);
    CHECK(join(&second) == 0, 0);
    CHECK(open_channel(&second, channel_name) == 0, 0);
    CHECK(open_writer(&second) == 0, 0); /* each slot in turn, so also the child's */
    ivshmem_writer_close(&second.writer);
    ivshmem_leave_area(&second.member);
    use(peer);
}

/* -- the child takes ----------------------------------------------------------------------------- */

static void put_some(struct peer *peer)
{
    begin();
    CHECK(open_writer(peer) == 0, 0);
    CHECK(open_reader(peer, IVSHMEM_OVERWRITE) == 0, 0);
    for (uint64_t i = 0; i < SLOTS; i++)
        CHECK(put(peer, i) == 0, i);
}

static void open_as_reader(struct peer *peer)
{
    must(join(peer));
    must(open_channel(peer, channel_name));
    peer->reader.channel = &peer->channel;
    peer->reader.member = &peer->member;
    must(ivshmem_reader_open(&peer->reader, 0));
}

/* The first with `take`, which ends well; the second is given back; the third again. */
static void take_messages(void)
{
    static struct peer peer;
    struct ivshmem_taken taken;
    open_as_reader(&peer);
    for (int i = 0; i < 3; i++) {
        int code = ivshmem_queue_take(&peer.reader, IVSHMEM_CLAIM_TAKEN, 0, &taken);
        if (code == IVSHMEM_AGAIN)
            break;
        must(code);
        look_at(&taken);
        aside->began = i + 1;
        code = i == 1 ? ivshmem_queue_return(&peer.reader, &taken)
                      : ivshmem_queue_done(&peer.reader, &taken);
        if (code == IVSHMEM_OVERTAKEN) /* it was stopped so long that the other one has it */
            break;
        must(code);
        aside->ended = i + 1;
    }
    ivshmem_queue_sleep(&peer.reader);
    ivshmem_queue_awake(&peer.reader);
    if (ivshmem_queue_take(&peer.reader, IVSHMEM_CLAIM_TAKEN, 1, &taken) == 0)
        ivshmem_queue_return(&peer.reader, &taken);
    ivshmem_queue_pass_on(&peer.reader);
    ivshmem_reader_close(&peer.reader);
    ivshmem_leave_area(&peer.member);
}

static void get_messages(void)
{
    static struct peer peer;
    struct ivshmem_taken taken;
    uint64_t words[WORDS];
    open_as_reader(&peer);
    for (int i = 0; i < 2; i++) {
        int code;
        aside->began = i + 1;
        code = ivshmem_queue_read(&peer.reader, 0, words, LONG, &taken);
        if (code == IVSHMEM_AGAIN) {
            aside->began = i;
            break;
        }
        must(code);
        number_in(words);
        aside->ended = i + 1;
    }
    ivshmem_reader_close(&peer.reader);
    ivshmem_leave_area(&peer.member);
}

static int taken_at_all(void)
{
    int sum = 0;
    for (int i = 0; i < SLOTS; i++) {
        CHECK(had[i] <= 1, had[i]);
        sum += had[i];
    }
    return sum;
}

static void take_the_rest(struct peer *peer)
{
    take_all(peer);
    CHECK(taken_at_all() >= SLOTS - 3, taken_at_all());
}

/* At least once: what the child did not end comes here. */
static void all_came_at_least_once(struct peer *peer)
{
    int ended_by_child = aside->ended >= 3 ? 2 : aside->ended >= 1;
    take_all(peer);
    CHECK(taken_at_all() >= SLOTS - ended_by_child - (aside->began > aside->ended), aside->ended);
    use(peer);
}

/* At most once: what the child had begun to copy may be lost, nothing else. */
static void none_came_twice(struct peer *peer)
{
    take_all(peer);
    CHECK(taken_at_all() + aside->ended <= SLOTS, taken_at_all());
    CHECK(taken_at_all() + aside->began >= SLOTS, taken_at_all());
    for (int i = 0; i < SLOTS; i++)
        CHECK(marked[i] == 0, i);
    use(peer);
}

int main(int argc, char **argv)
{
    static const struct operation operations[] = {
        {"put", &geometry, read_from_it, put_messages, got_what_was_put, got_all, NULL, NULL},
        {"take", &geometry, put_some, take_messages, take_the_rest, all_came_at_least_once, NULL, NULL},
        {"get", &geometry, put_some, get_messages, take_the_rest, none_came_twice, NULL, NULL}};
    return run_all(argc, argv, operations, sizeof operations / sizeof *operations);
}
