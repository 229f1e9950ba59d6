/* Counts the shared steps of messages of each kind, on memory that is mapped write-combining: a locked
 * instruction there would lock the bus, if the processor has it at all. */
#include <string.h>

static unsigned stores, barriers, fences, exchanges;

static void count(const char *what)
{
    stores += strcmp(what, "store") == 0;
    barriers += strcmp(what, "store barrier") == 0;
    fences += strcmp(what, "full fence") == 0;
    exchanges += strcmp(what, "compare-exchange") == 0;
}

#define IVSHMEM_STEP(what) count(what)
#include "steps.h"

enum { ROUNDS = 1000 };

static struct peer peer;
static struct ivshmem_stream caller, acceptor;

static void messages(uint64_t number)
{
    struct ivshmem_message message;
    uint64_t words[WORDS];
    CHECK(ivshmem_put(&peer.writer, filled(number), LONG, 0, 0) == 0, number);
    CHECK(ivshmem_read(&peer.reader, &message, words, LONG) == 0, number);
    CHECK(number_in(words) == number, number);
}

static void value(uint64_t number)
{
    struct ivshmem_message message;
    CHECK(ivshmem_put(&peer.writer, filled(number), LONG, 0, number) == 0, number);
    CHECK(ivshmem_value_look(&peer.reader, &message) == 0, number);
    CHECK(message.user == number, message.user);
}

static void queue(uint64_t number)
{
    struct ivshmem_taken taken;
    uint64_t words[WORDS];
    CHECK(ivshmem_queue_put(&peer.writer, filled(number), LONG, 0, 0) == 0, number);
    CHECK(ivshmem_queue_read(&peer.reader, 1, words, LONG, &taken) == 0, number);
    CHECK(number_in(words) == number, number);
}

static void bytes(uint64_t number)
{
    uint64_t words[WORDS];
    CHECK(ivshmem_send(&caller, filled(number), LONG) == LONG, number);
    CHECK(ivshmem_receive(&acceptor, words, LONG) == LONG, number);
    CHECK(number_in(words) == number, number);
}

static void connect_both(void)
{
    static struct ivshmem_listener listener;
    listener.channel = caller.channel = &peer.channel;
    listener.member = caller.member = &peer.member;
    CHECK(ivshmem_listen(&listener) == 0, 0);
    CHECK(ivshmem_stream_connect(&caller) == 0, 0);
    CHECK(ivshmem_accept(&listener, &acceptor) == 0, 0);
}

static const struct {
    const char *name;
    void (*act)(uint64_t number);
    struct ivshmem_geometry geometry;
} kinds[] = {
    {"messages", messages, {.kind = IVSHMEM_MESSAGES, .overflow = IVSHMEM_BLOCK, .slots = SLOTS,
                            .loans = LOANS, .views = LOANS, .limit = LONG}},
    {"value", value, {.kind = IVSHMEM_VALUE, .overflow = IVSHMEM_OVERWRITE, .slots = SLOTS,
                      .loans = LOANS, .views = LOANS, .limit = LONG}},
    {"queue", queue,
     {.kind = IVSHMEM_QUEUE, .slots = SLOTS, .loans = LOANS, .views = LOANS, .limit = LONG}},
    {"bytes", bytes, {.kind = IVSHMEM_BYTES, .slots = 256, .loans = 1, .views = 1, .limit = 1}},
};

int main(void)
{
    static struct aside clock;
    const struct ivshmem_memory memory = {region = malloc(SIZE), SIZE, IVSHMEM_WRITE_COMBINING, 0};
    struct ivshmem_area area;
    aside = &clock;
    for (unsigned i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        struct ivshmem_geometry geometry = kinds[i].geometry;
        geometry.writers = geometry.readers = 1;
        memset(region, 0, SIZE);
        CHECK(ivshmem_area_make(&area, &memory, 8192, SIZE - 8192, 8, 4) == 0, i);
        CHECK(join(&peer) == 0, i);
        peer.member.area.memory.mapping = IVSHMEM_WRITE_COMBINING;
        CHECK(create(&peer, channel_name, &geometry) == 0, i);
        CHECK(open_channel(&peer, channel_name) == 0, i);
        if (geometry.kind == IVSHMEM_BYTES) {
            connect_both();
        } else {
            CHECK(open_writer(&peer) == 0, i);
            CHECK(open_reader(&peer, (enum ivshmem_overflow)geometry.overflow) == 0, i);
        }
        if (geometry.kind == IVSHMEM_QUEUE && !ivshmem_can_exchange(&peer.channel.area.memory)) {
            struct ivshmem_taken taken;
            CHECK(ivshmem_queue_take(&peer.reader, IVSHMEM_CLAIM_ONCE, 1, &taken) ==
                      IVSHMEM_NO_ATOMICS,
                  i);
            printf("queue: not in this mapping\n");
            continue;
        }
        stores = barriers = fences = exchanges = 0;
        for (uint64_t number = 0; number < ROUNDS; number++)
            kinds[i].act(number);
        printf("%s: %u stores, %u barriers, %u fences, %u exchanges\n", kinds[i].name, stores,
               barriers, fences, exchanges);
    }
    free(region);
    return 0;
}
