/* An end that is refused leaves its slot free: of a channel of another kind, of one that another process
 * is about to remove, and where a hostile peer stores into the word that counts the readers.
 */
#include <string.h>

static void before(const char *what);
#define IVSHMEM_STEP(what) before(what)
#include "steps.h"

static const struct ivshmem_geometry messages = {.kind = IVSHMEM_MESSAGES,
                                                 .overflow = IVSHMEM_BLOCK,
                                                 .writers = 1,
                                                 .readers = 1,
                                                 .slots = SLOTS,
                                                 .loans = LOANS,
                                                 .views = 2,
                                                 .limit = LONG};
static const struct ivshmem_geometry bytes = {.kind = IVSHMEM_BYTES,
                                              .writers = 1,
                                              .readers = 1,
                                              .slots = 128,
                                              .loans = 1,
                                              .views = 1,
                                              .limit = 1};

/* What each end has of the channel that it opened. */
static struct peer of_messages, of_bytes;
static struct ivshmem_listener listener;
static struct ivshmem_stream caller;
static int is_hostile;

/* Let the exchange that comes next fail, if it is the one of the word that counts the readers. */
static void before(const char *what)
{
    if (is_hostile && strcmp(what, "compare-exchange") == 0)
        region[of_messages.channel.at + IVSHMEM_JOINS]++;
}

static int listen_to(struct peer *peer)
{
    listener.channel = &peer->channel;
    listener.member = &peer->member;
    return ivshmem_listen(&listener);
}

static int connect_to(struct peer *peer)
{
    caller.channel = &peer->channel;
    caller.member = &peer->member;
    return ivshmem_stream_connect(&caller);
}

static void set_state(const struct peer *peer, uint64_t state)
{
    ivshmem_store(&peer->member.area.memory,
                  ivshmem_record_at(&peer->member.area, peer->channel.record.index), state);
}

static uint64_t removing(const struct peer *peer)
{
    return ivshmem_place_word(peer->member.place, IVSHMEM_REMOVING,
                              ivshmem_epoch(peer->channel.record.state));
}

static void of_another_kind(void)
{
    CHECK(open_writer(&of_bytes) == IVSHMEM_BAD, 0);
    CHECK(open_reader(&of_bytes, IVSHMEM_BLOCK) == IVSHMEM_BAD, 0);
    CHECK(listen_to(&of_messages) == IVSHMEM_BAD, 0);
    CHECK(connect_to(&of_messages) == IVSHMEM_BAD, 0);
}

/* The process that removes the channel finds an owner, and lets it be. */
static void while_it_is_removed(void)
{
    set_state(&of_messages, removing(&of_messages));
    CHECK(open_writer(&of_messages) == IVSHMEM_CLOSED, 0);
    CHECK(open_reader(&of_messages, IVSHMEM_BLOCK) == IVSHMEM_CLOSED, 0);
    set_state(&of_messages, of_messages.channel.record.state);
    CHECK(!ivshmem_is_in_use(&of_messages.channel), 0);
    CHECK(open_writer(&of_messages) == 0 && open_reader(&of_messages, IVSHMEM_BLOCK) == 0, 0);
    ivshmem_writer_close(&of_messages.writer);
    ivshmem_reader_close(&of_messages.reader);

    set_state(&of_bytes, removing(&of_bytes));
    CHECK(listen_to(&of_bytes) == IVSHMEM_CLOSED, 0);
    set_state(&of_bytes, of_bytes.channel.record.state);
    CHECK(!ivshmem_is_in_use(&of_bytes.channel), 0);
    CHECK(listen_to(&of_bytes) == 0, 0);
    set_state(&of_bytes, removing(&of_bytes));
    CHECK(connect_to(&of_bytes) == IVSHMEM_CLOSED, 0);
    set_state(&of_bytes, of_bytes.channel.record.state);
    ivshmem_listener_close(&listener);
    CHECK(!ivshmem_is_in_use(&of_bytes.channel), 0);
}

/* A reader that cannot be counted: the writer does not wait for it. */
static void while_joins_change(void)
{
    CHECK(open_writer(&of_messages) == 0, 0);
    is_hostile = 1;
    CHECK(open_reader(&of_messages, IVSHMEM_BLOCK) == IVSHMEM_CORRUPT, 0);
    is_hostile = 0;
    for (unsigned i = 0; i < 2 * SLOTS; i++)
        CHECK(ivshmem_put(&of_messages.writer, filled(i), LONG, 0, i) == 0, i);
    CHECK(open_reader(&of_messages, IVSHMEM_BLOCK) == 0, 0);
}

int main(void)
{
    struct ivshmem_memory mapped = {NULL, SIZE, IVSHMEM_WRITE_BACK, 0};
    struct ivshmem_area area;
    region = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    aside = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    mapped.start = region;
    aside->now = 1;
    CHECK(ivshmem_area_make(&area, &mapped, 8192, SIZE - 16384, 16, 8) == 0, 0);
    CHECK(join(&of_messages) == 0 && join(&of_bytes) == 0, 0);
    CHECK(create(&of_messages, channel_name, &messages) == 0, 0);
    CHECK(create(&of_bytes, other_name, &bytes) == 0, 0);
    CHECK(open_channel(&of_messages, channel_name) == 0 && open_channel(&of_bytes, other_name) == 0, 0);
    of_another_kind();
    while_it_is_removed();
    while_joins_change();
    printf("ended well\n");
    return 0;
}
