/* What messages cost without Python: the header's program, and below it a bare ring.
 *
 *     channel ring|header ping|echo FILE OFFSET SIZE COUNT
 *
 * One end of an exchange, as src/ivshmem/bench/worker.py says of ends. In each turn the ping end sends
 * COUNT messages of SIZE bytes and takes one answer; the echo end takes them all and answers. The two
 * ends share a file: by ivshmem_channel.h, in the channels "there" and "back" of the area at OFFSET; or
 * by two rings with a head and a tail, which check nothing: the floor.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "ivshmem_channel.h"

#define ANSWER 64u /* bytes */

static int64_t now(void *context)
{
    struct timespec t;
    (void)context;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void ring_nobody(void *context, unsigned peer, unsigned vector)
{
    (void)context;
    (void)peer;
    (void)vector;
}

static void check(int code, const char *what)
{
    if (code != 0) {
        fprintf(stderr, "channel: %s: %d\n", what, code);
        exit(1);
    }
}

/* -- a bare ring ---------------------------------------------------------------------------- */

struct bare {
    _Alignas(64) uint64_t head;
    _Alignas(64) uint64_t tail;
    _Alignas(64) unsigned char cells[];
};

/* How many messages a ring of messages of this size holds. */
static inline uint64_t slots_of(size_t size)
{
    return size <= 4096 ? 1024 : 4;
}

static void bare_put(struct bare *ring, uint64_t *head, const void *data, size_t size)
{
    uint64_t slots = slots_of(size);
    while (*head - __atomic_load_n(&ring->tail, __ATOMIC_ACQUIRE) == slots)
        ;
    memcpy(ring->cells + (*head & (slots - 1)) * size, data, size);
    __atomic_store_n(&ring->head, ++*head, __ATOMIC_RELEASE);
}

static void bare_get(struct bare *ring, uint64_t *tail, void *data, size_t size)
{
    uint64_t slots = slots_of(size);
    while (__atomic_load_n(&ring->head, __ATOMIC_ACQUIRE) == *tail)
        ;
    memcpy(data, ring->cells + (*tail & (slots - 1)) * size, size);
    __atomic_store_n(&ring->tail, ++*tail, __ATOMIC_RELEASE);
}

/* -- the header -------------------------------------------------------------------------------- */

struct end {
    struct ivshmem_member member;
    struct ivshmem_channel out, in;
    struct ivshmem_writer writer;
    struct ivshmem_reader reader;
};

static void join(struct end *end, const struct ivshmem_area *area)
{
    char name[32] = "bench";
    memset(end, 0, sizeof *end);
    end->member.area = *area;
    end->member.user.ring = ring_nobody;
    end->member.user.now = now;
    end->member.lease = 1000000000;
    end->member.looked = now(NULL);
    end->member.pulses = calloc(area->places, sizeof *end->member.pulses);
    check(ivshmem_join(&end->member, (uint64_t)getpid() << 20 | 1, name), "join");
}

static void open_channel(struct ivshmem_channel *channel, const struct ivshmem_area *area,
                         const char *name)
{
    struct ivshmem_record record;
    char padded[IVSHMEM_CHANNEL_NAME] = {0};
    strncpy(padded, name, sizeof padded - 1);
    check(ivshmem_find(area, padded, &record), "find");
    ivshmem_channel_open(channel, area, &record);
}

static void open_writer(struct end *end, const char *name)
{
    open_channel(&end->out, &end->member.area, name);
    end->writer.channel = &end->out;
    end->writer.member = &end->member;
    end->writer.tables.cell_of = calloc(end->out.record.geometry.slots, sizeof(uint32_t));
    end->writer.tables.free = calloc(end->out.layout.cells_each, sizeof(uint32_t));
    check(ivshmem_writer_open(&end->writer), "open a writer");
}

static void open_reader(struct end *end, const char *name)
{
    open_channel(&end->in, &end->member.area, name);
    end->reader.channel = &end->in;
    end->reader.member = &end->member;
    end->reader.overflow = IVSHMEM_BLOCK;
    check(ivshmem_reader_open(&end->reader, 0), "open a reader");
}

static void put(struct end *end, const void *data, uint32_t size)
{
    int code;
    while ((code = ivshmem_put(&end->writer, data, size, 0, 0)) == IVSHMEM_AGAIN)
        ;
    check(code, "put");
}

static void get(struct end *end, void *data, uint32_t size)
{
    struct ivshmem_message message;
    int code;
    while ((code = ivshmem_read(&end->reader, &message, data, size)) == IVSHMEM_AGAIN)
        ;
    check(code, "read");
}

/* -- one end ----------------------------------------------------------------------------------- */

struct side {
    int by_header;
    size_t size;
    struct bare *out_ring, *in_ring;
    uint64_t sent, taken;
    struct end end;
};

static void send_one(struct side *side, const void *data, size_t size)
{
    if (side->by_header)
        put(&side->end, data, (uint32_t)size);
    else
        bare_put(side->out_ring, &side->sent, data, size);
}

static void receive_one(struct side *side, void *data, size_t size)
{
    if (side->by_header)
        get(&side->end, data, (uint32_t)size);
    else
        bare_get(side->in_ring, &side->taken, data, size);
}

static void ping(struct side *side, long turns, long count, unsigned char *data)
{
    int64_t *took = calloc((size_t)turns, sizeof *took), before = now(NULL), after;
    for (long turn = 0; turn < turns; turn++) {
        for (long i = 0; i < count; i++)
            send_one(side, data, side->size);
        receive_one(side, data, ANSWER);
        after = now(NULL);
        took[turn] = after - before;
        before = after;
    }
    check(fwrite(took, sizeof *took, (size_t)turns, stdout) != (size_t)turns, "write");
    fflush(stdout);
    free(took);
}

static void echo(struct side *side, long turns, long count, unsigned char *data)
{
    for (long turn = 0; turn < turns; turn++) {
        for (long i = 0; i < count; i++)
            receive_one(side, data, side->size);
        send_one(side, data, ANSWER);
    }
}

int main(int count, char **words)
{
    struct stat status;
    struct ivshmem_memory memory;
    struct ivshmem_area area;
    static struct side side;
    unsigned char *start, *data;
    char line[64];
    int fd, pinging;
    long at_once;
    if (count != 7) {
        fprintf(stderr, "usage: channel ring|header ping|echo FILE OFFSET SIZE COUNT\n");
        return 2;
    }
    prctl(PR_SET_PDEATHSIG, SIGKILL); /* an end must not outlive who started it */
    fd = open(words[3], O_RDWR);
    if (fd < 0 || fstat(fd, &status) < 0) {
        perror(words[3]);
        return 1;
    }
    start = mmap(NULL, (size_t)status.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    side.by_header = strcmp(words[1], "header") == 0;
    pinging = strcmp(words[2], "ping") == 0;
    side.size = (size_t)atol(words[5]);
    at_once = atol(words[6]);
    data = calloc(1, side.size > ANSWER ? side.size : ANSWER);
    if (side.by_header) {
        memory = (struct ivshmem_memory){start, (uint64_t)status.st_size, IVSHMEM_WRITE_BACK, 0};
        check(ivshmem_area_open(&area, &memory, strtoull(words[4], NULL, 0)), "open the area");
        join(&side.end, &area);
        open_reader(&side.end, pinging ? "back" : "there");
        open_writer(&side.end, pinging ? "there" : "back");
    } else {
        struct bare *there = (struct bare *)(void *)start;
        struct bare *back = (struct bare *)(void *)(start + status.st_size / 2);
        side.out_ring = pinging ? there : back;
        side.in_ring = pinging ? back : there;
    }
    printf("ready\n");
    fflush(stdout);
    while (fgets(line, sizeof line, stdin))
        (pinging ? ping : echo)(&side, atol(line), at_once, data);
    return 0;
}
