/* What channels cost without Python: the header's program, and below it a bare ring.
 *
 *     channel FILE OFFSET ring|header stream|pingpong COUNT SIZE
 *
 * Two processes on two cores (this one forks) pass messages through a file that is mapped: by
 * ivshmem_channel.h, in the area at OFFSET of the file; or by a ring with a head and a tail, which checks
 * nothing: the floor. Prints nanoseconds for each message, or for each round trip.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "ivshmem_channel.h"

#define SLOTS 1024u

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

static void pin(int core)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(core, &set);
    sched_setaffinity(0, sizeof set, &set);
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

static void bare_put(struct bare *ring, uint64_t *head, const void *data, size_t size)
{
    while (*head - __atomic_load_n(&ring->tail, __ATOMIC_ACQUIRE) == SLOTS)
        ;
    memcpy(ring->cells + (*head % SLOTS) * size, data, size);
    __atomic_store_n(&ring->head, ++*head, __ATOMIC_RELEASE);
}

static void bare_get(struct bare *ring, uint64_t *tail, void *data, size_t size)
{
    while (__atomic_load_n(&ring->head, __ATOMIC_ACQUIRE) == *tail)
        ;
    memcpy(data, ring->cells + (*tail % SLOTS) * size, size);
    __atomic_store_n(&ring->tail, ++*tail, __ATOMIC_RELEASE);
}

/* -- the header -------------------------------------------------------------------------------- */

struct end {
    struct ivshmem_member member;
    struct ivshmem_channel channel;
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

static void open_channel(struct end *end, const char *name)
{
    struct ivshmem_record record;
    char padded[IVSHMEM_CHANNEL_NAME] = {0};
    strncpy(padded, name, sizeof padded - 1);
    check(ivshmem_find(&end->member.area, padded, &record), "find");
    ivshmem_channel_open(&end->channel, &end->member.area, &record);
}

static void create(struct end *end, const char *name, uint64_t limit)
{
    struct ivshmem_record record;
    memset(&record, 0, sizeof record);
    strncpy(record.name, name, sizeof record.name - 1);
    record.geometry = (struct ivshmem_geometry){
        IVSHMEM_MESSAGES, IVSHMEM_BLOCK, 0, 1, 1, SLOTS, 2, SLOTS, limit};
    check(ivshmem_create(&end->member, &record), "create");
}

static void open_writer(struct end *end)
{
    end->writer.channel = &end->channel;
    end->writer.member = &end->member;
    end->writer.tables.cell_of = calloc(SLOTS, sizeof(uint32_t));
    end->writer.tables.free = calloc(SLOTS + 2, sizeof(uint32_t));
    check(ivshmem_writer_open(&end->writer), "open a writer");
}

static void open_reader(struct end *end)
{
    end->reader.channel = &end->channel;
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

/* -- both -------------------------------------------------------------------------------------- */

struct sides {
    int by_header;
    size_t size;
    struct bare *there, *back;
    uint64_t position, other;
    struct end out, in;
};

static void send_one(struct sides *sides, struct bare *ring, const void *data)
{
    if (sides->by_header)
        put(&sides->out, data, (uint32_t)sides->size);
    else
        bare_put(ring, &sides->position, data, sides->size);
}

static void receive_one(struct sides *sides, struct bare *ring, void *data)
{
    if (sides->by_header)
        get(&sides->in, data, (uint32_t)sides->size);
    else
        bare_get(ring, &sides->other, data, sides->size);
}

int main(int count, char **words)
{
    struct stat status;
    struct ivshmem_memory memory;
    struct ivshmem_area area;
    struct sides sides;
    unsigned char *start, *data;
    long messages, i;
    int fd, pingpong, *ready;
    int64_t begun;
    if (count != 7) {
        fprintf(stderr, "usage: channel FILE OFFSET ring|header stream|pingpong COUNT SIZE\n");
        return 2;
    }
    fd = open(words[1], O_RDWR);
    if (fd < 0 || fstat(fd, &status) < 0) {
        perror(words[1]);
        return 1;
    }
    start = mmap(NULL, (size_t)status.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    ready = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    memset(&sides, 0, sizeof sides);
    sides.by_header = strcmp(words[3], "header") == 0;
    pingpong = strcmp(words[4], "pingpong") == 0;
    messages = atol(words[5]);
    sides.size = (size_t)atol(words[6]);
    data = calloc(1, sides.size);
    memory = (struct ivshmem_memory){start, (uint64_t)status.st_size, IVSHMEM_WRITE_BACK, 0};
    if (sides.by_header) {
        check(ivshmem_area_open(&area, &memory, strtoull(words[2], NULL, 0)), "open the area");
        join(&sides.out, &area);
        create(&sides.out, "bench there", sides.size);
        create(&sides.out, "bench back", sides.size);
    } else {
        size_t bytes = sizeof(struct bare) + SLOTS * sides.size;
        sides.there = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        sides.back = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    }
    if (fork() == 0) {
        pin(1);
        if (sides.by_header) {
            join(&sides.in, &area);
            open_channel(&sides.in, "bench there");
            open_reader(&sides.in);
            join(&sides.out, &area);
            open_channel(&sides.out, "bench back");
            open_writer(&sides.out);
        }
        __atomic_store_n(ready, 1, __ATOMIC_RELEASE);
        for (i = 0; i < messages; i++) {
            receive_one(&sides, sides.there, data);
            if (pingpong)
                send_one(&sides, sides.back, data);
        }
        if (!pingpong)
            send_one(&sides, sides.back, data);
        _exit(0); /* its places are freed with the file */
    }
    pin(0);
    if (sides.by_header) {
        join(&sides.in, &area);
        open_channel(&sides.in, "bench back");
        open_reader(&sides.in);
        open_channel(&sides.out, "bench there");
        open_writer(&sides.out);
    }
    while (!__atomic_load_n(ready, __ATOMIC_ACQUIRE))
        ;
    begun = now(NULL);
    for (i = 0; i < messages; i++) {
        send_one(&sides, sides.there, data);
        if (pingpong)
            receive_one(&sides, sides.back, data);
    }
    if (!pingpong)
        receive_one(&sides, sides.back, data);
    printf("%.2f\n", (double)(now(NULL) - begun) / (double)messages);
    wait(NULL);
    return 0;
}
