/* A program in C at the other end of two queues: it answers each message in capital letters.
 *
 *   cc -I$(python -c 'from ivshmem import channel; print(channel.get_include())') channel.c -o channel
 *   ./channel /dev/shm/NAME
 *
 * Its argument is the file of the region: that of `ivshmem serve --name NAME --channels 1M`. Another
 * program created the queues "questions" and "answers". The program ends when it reads an empty
 * message. It needs nothing but the header, and has no doorbells: it looks again and again, and so
 * do its peers (IVSHMEM_PEER_MUTE).
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "ivshmem_channel.h"

enum { LIMIT = 256, SLOTS = 64, CELLS = 2 * SLOTS, PLACES = 1024 };
#define BEAT 100000000 /* nanoseconds */

static int64_t now(void *context)
{
    struct timespec time;
    (void)context;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

static void ring(void *context, unsigned peer, unsigned vector)
{
    (void)context, (void)peer, (void)vector;
}

static void check(const char *what, int code)
{
    if (code < 0) {
        fprintf(stderr, "%s: error %d of ivshmem_channel.h\n", what, -code);
        exit(1);
    }
}

static void map(struct ivshmem_memory *memory, const char *path)
{
    struct stat status;
    int file = open(path, O_RDWR | O_CLOEXEC);
    if (file < 0 || fstat(file, &status) != 0) {
        perror(path);
        exit(1);
    }
    memory->size = (uint64_t)status.st_size;
    memory->start =
        mmap(NULL, (size_t)memory->size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (memory->start == MAP_FAILED) {
        perror(path);
        exit(1);
    }
    memory->mapping = IVSHMEM_WRITE_BACK;
    memory->readonly = 0;
}

static void find(struct ivshmem_channel *channel, const struct ivshmem_area *area, const char *name)
{
    char padded[IVSHMEM_CHANNEL_NAME] = {0};
    struct ivshmem_record record;
    strncpy(padded, name, sizeof padded - 1);
    check(name, ivshmem_find(area, padded, &record));
    ivshmem_channel_open(channel, area, &record);
    if (record.geometry.kind != IVSHMEM_QUEUE || record.geometry.slots > SLOTS ||
        record.geometry.limit > LIMIT || channel->layout.cells_each > CELLS)
        check(name, IVSHMEM_BAD);
}

int main(int argc, char **argv)
{
    static struct ivshmem_pulse pulses[PLACES];
    static struct ivshmem_channel questions, answers;
    static struct ivshmem_reader reader;
    static struct ivshmem_writer writer;
    static uint32_t cell_of[SLOTS], free_cells[CELLS];
    struct ivshmem_member member = {.pulses = pulses, .lease = 10 * BEAT};
    struct ivshmem_memory memory;
    uint64_t offset = 0, random;
    int64_t beaten = 0;

    if (argc != 2) {
        fprintf(stderr, "usage: channel FILE\n");
        return 2;
    }
    map(&memory, argv[1]);
    check("area", ivshmem_find_area(&memory, &offset));
    check("area", ivshmem_area_open(&member.area, &memory, offset));
    if (member.area.places > PLACES)
        check("area", IVSHMEM_BAD);
    member.user.ring = ring;
    member.user.now = now;
    member.looked = now(NULL);
    member.peer = IVSHMEM_PEER_MUTE;
    member.process = (uint64_t)getpid();
    if (getrandom(&random, sizeof random, 0) != sizeof random)
        return 1;
    check("place", ivshmem_join(&member, random, "channel.c"));

    find(&questions, &member.area, "questions");
    find(&answers, &member.area, "answers");
    reader.channel = &questions;
    reader.member = writer.member = &member;
    check("reader", ivshmem_reader_open(&reader, 0));
    writer.channel = &answers;
    writer.tables.cell_of = cell_of;
    writer.tables.free = free_cells;
    check("writer", ivshmem_writer_open(&writer));

    for (;;) {
        const struct timespec pause = {0, 20000};
        char text[LIMIT];
        struct ivshmem_taken taken;
        uint32_t length;
        int code;
        if (now(NULL) - beaten >= BEAT) { /* others take a process that does not beat for silent */
            beaten = now(NULL);
            check("beat", ivshmem_beat(&member));
        }
        code = ivshmem_queue_read(&reader, 1, text, sizeof text, &taken);
        if (code == IVSHMEM_AGAIN) {
            nanosleep(&pause, NULL);
            continue;
        }
        check("read", code);
        length = taken.message.length;
        if (length == 0)
            break;
        for (uint32_t i = 0; i < length; i++)
            text[i] = (char)toupper((unsigned char)text[i]);
        while ((code = ivshmem_queue_put(&writer, text, length, 0, 0)) == IVSHMEM_AGAIN) {
            check("beat", ivshmem_beat(&member));
            nanosleep(&pause, NULL);
        }
        check("put", code);
    }
    ivshmem_writer_close(&writer);
    ivshmem_reader_close(&reader);
    ivshmem_leave_area(&member);
    return 0;
}
