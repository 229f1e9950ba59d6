/* Round trips through channels between ends that sleep, by ivshmem_channel.h alone.
 *
 *   sleeping OFFSET guest ADDRESS      a guest's device, by vfio: 0000:00:05.0
 *   sleeping OFFSET client SOCKET      a host process, connected to a server
 *
 * The area of channels is at OFFSET of the region. Prints "READY ID", then obeys lines of its standard
 * input, until that ends or a signal comes:
 *
 *   ping PEER ROUNDS     puts a message into "there" and waits for one of "back", so many times;
 *                        prints "TOOK P50 P99", in nanoseconds for each round trip
 *   echo PEER            answers each message of "there" in "back"
 *
 * PEER is ignored: channels know whom to ring. sleeping.py is the same by way of the library.
 */
#include "../peer.h"

#include <inttypes.h>
#include <signal.h>
#include <time.h>

#include "ivshmem_channel.h"

enum { WARM_UP = 200, SIZE = 64, BEAT_MS = 100 };

static struct ivshmem_member member;
static struct ivshmem_channel out, in;
static struct ivshmem_writer writer;
static struct ivshmem_reader reader;
static int64_t beaten;

static int64_t now(void *context)
{
    struct timespec t;
    (void)context;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

static void ring_vector(void *context, unsigned peer, unsigned vector)
{
    (void)context;
    (void)vector; /* every end listens at vector 0 */
    ring(peer, registers ? -1 : bell(peer));
}

static void leave(int number)
{
    (void)number;
    ivshmem_leave_area(&member);
    _exit(0);
}

static void join(uint64_t offset)
{
    struct ivshmem_memory mapped = { memory, memory_size,
                                     registers ? IVSHMEM_UNCACHED : IVSHMEM_WRITE_BACK, 0 };
    char name[32] = "sleeping";
    struct ivshmem_area area;
    check(ivshmem_area_open(&area, &mapped, offset) == 0, "open the area");
    member.area = area;
    member.peer = id;
    member.user.ring = ring_vector;
    member.user.now = now;
    member.lease = INT64_C(1000000000);
    member.looked = beaten = now(NULL);
    member.pulses = calloc(area.places, sizeof *member.pulses);
    check(ivshmem_join(&member, (uint64_t)now(NULL) << 8 | 1, name) == 0, "join");
    signal(SIGTERM, leave);
}

static void open_channel(struct ivshmem_channel *channel, const char *name)
{
    struct ivshmem_record record;
    char padded[IVSHMEM_CHANNEL_NAME] = { 0 };
    strncpy(padded, name, sizeof padded - 1);
    check(ivshmem_find(&member.area, padded, &record) == 0, name);
    ivshmem_channel_open(channel, &member.area, &record);
}

static void open_ends(const char *to, const char *from)
{
    open_channel(&out, to);
    open_channel(&in, from);
    reader.channel = &in;
    reader.member = &member;
    reader.overflow = IVSHMEM_BLOCK;
    check(ivshmem_reader_open(&reader, 0) == 0, "open a reader");
    writer.channel = &out;
    writer.member = &member;
    writer.tables.cell_of = calloc(out.record.geometry.slots, sizeof(uint32_t));
    writer.tables.free = calloc(out.layout.cells_each, sizeof(uint32_t));
    check(ivshmem_writer_open(&writer) == 0, "open a writer");
}

static void beat(int64_t time)
{
    if (time - beaten < BEAT_MS * INT64_C(1000000))
        return;
    beaten = time;
    ivshmem_beat(&member);
}

static void put(const void *data)
{
    check(ivshmem_put(&writer, data, SIZE, 0, 0) == 0, "put");
}

/* Take a message; 0: none came within a beat. No sleep trusts a ring, so none is longer. */
static int get(void *data)
{
    struct ivshmem_message message;
    int code, rung = 1;
    while ((code = ivshmem_read(&reader, &message, data, SIZE)) == IVSHMEM_AGAIN && rung) {
        if (ivshmem_reader_sleep(&reader) == 0)
            continue;
        rung = poll_own(BEAT_MS);
        if (rung)
            take_rings();
        ivshmem_sleep_end(&in, &reader.sleep);
    }
    check(code == 0 || code == IVSHMEM_AGAIN, "read");
    return code == 0;
}

static void wait_for(void *data)
{
    while (!get(data))
        beat(now(NULL));
}

static int ascending(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

static void ping(long rounds)
{
    char data[SIZE] = { 0 };
    int64_t *took = calloc(rounds, sizeof *took), before, after;
    open_ends("there", "back");
    /* The other end may have yet to open its own, and its QEMU to hear of this one. */
    do {
        put(data);
        beat(now(NULL));
    } while (!get(data));
    while (get(data))
        ;
    for (long i = 0; i < WARM_UP; i++) {
        put(data);
        wait_for(data);
    }
    before = now(NULL);
    for (long i = 0; i < rounds; i++) {
        put(data);
        wait_for(data);
        after = now(NULL);
        took[i] = after - before;
        before = after;
        beat(after);
    }
    qsort(took, rounds, sizeof *took, ascending);
    printf("TOOK %" PRId64 " %" PRId64 "\n", took[rounds / 2], took[rounds * 99 / 100]);
    free(took);
}

static void echo(void)
{
    char data[SIZE];
    open_ends("back", "there");
    while (1) {
        wait_for(data);
        put(data);
        beat(now(NULL));
    }
}

int main(int argc, char **argv)
{
    char line[64];
    long peer, rounds;
    setlinebuf(stdout);
    if (argc != 4 || !open_peer(argv[2], argv[3]))
        return 2;
    join(strtoull(argv[1], NULL, 0));
    printf("READY %" PRId64 "\n", id);
    while (fgets(line, sizeof line, stdin)) {
        if (sscanf(line, "ping %ld %ld", &peer, &rounds) == 2)
            ping(rounds);
        else if (sscanf(line, "echo %ld", &peer) == 1)
            echo();
        else
            return 2;
    }
    leave(0);
    return 0;
}
