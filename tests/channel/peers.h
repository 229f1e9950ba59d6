/* Processes that take part in an area, and their ends of one channel: what tests of the header share.
 *
 * A program includes ivshmem_channel.h before this, with its own hooks, and defines `ring`, `now` and
 * `ended` (see struct ivshmem_user), and `fail`, which ends the test.
 */
#ifndef PEERS_H
#define PEERS_H
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SIZE = 1 << 20, SLOTS = 4, LOANS = 2, LONG = 192, WORDS = LONG / 8, LEASE = 1000 };
enum { READERS = 3, CELLS = SLOTS + LOANS + READERS * SLOTS }; /* at most, of a channel */

/* One process, with its place and, as it needs them, its ends. */
struct peer {
    struct ivshmem_member member;
    struct ivshmem_pulse pulses[16];
    struct ivshmem_channel channel;
    struct ivshmem_writer writer;
    struct ivshmem_reader reader;
    struct tables {
        uint32_t cell_of[SLOTS], free[CELLS], pinned[READERS * SLOTS];
        uint16_t references[CELLS];
        struct ivshmem_backlog backlogs[READERS];
    } tables;
};

static unsigned char *region;

static void fail(const char *what, long value);
static int64_t now(void *context);
static void ring(void *context, unsigned peer, unsigned vector);
static int ended(void *context, uint64_t process, uint64_t started);

#define CHECK(condition, value)                                                                   \
    do {                                                                                          \
        if (!(condition))                                                                         \
            fail(#condition, (long)(value));                                                      \
    } while (0)

static const char channel_name[IVSHMEM_CHANNEL_NAME] = "channel";
static const char other_name[IVSHMEM_CHANNEL_NAME] = "other";

static int join(struct peer *peer)
{
    static const char name[56] = "test";
    const struct ivshmem_memory memory = {region, SIZE, IVSHMEM_WRITE_BACK, 0};
    int code;
    memset(peer, 0, sizeof *peer);
    code = ivshmem_area_open(&peer->member.area, &memory, 8192);
    if (code != 0)
        return code;
    peer->member.user.ring = ring;
    peer->member.user.now = now;
    peer->member.user.ended = ended;
    peer->member.pulses = peer->pulses;
    peer->member.lease = LEASE;
    peer->member.machine = 1;
    peer->member.process = (uint64_t)getpid();
    return ivshmem_join(&peer->member, (uint64_t)random() << 9 ^ (uint64_t)getpid(), name);
}

static inline int create(struct peer *peer, const char *name, const struct ivshmem_geometry *geometry)
{
    struct ivshmem_record record;
    memset(&record, 0, sizeof record);
    memcpy(record.name, name, sizeof record.name);
    record.geometry = *geometry;
    return ivshmem_create(&peer->member, &record);
}

static inline int open_channel(struct peer *peer, const char *name)
{
    struct ivshmem_record record;
    int code = ivshmem_find(&peer->member.area, name, &record);
    if (code == 0)
        ivshmem_channel_open(&peer->channel, &peer->member.area, &record);
    return code;
}

static inline int open_writer(struct peer *peer)
{
    peer->writer.channel = &peer->channel;
    peer->writer.member = &peer->member;
    peer->writer.tables.cell_of = peer->tables.cell_of;
    peer->writer.tables.free = peer->tables.free;
    peer->writer.tables.pinned = peer->tables.pinned;
    peer->writer.tables.references = peer->tables.references;
    peer->writer.tables.backlogs = peer->tables.backlogs;
    return ivshmem_writer_open(&peer->writer);
}

static inline int open_reader(struct peer *peer, enum ivshmem_overflow overflow)
{
    peer->reader.channel = &peer->channel;
    peer->reader.member = &peer->member;
    peer->reader.overflow = overflow;
    return ivshmem_reader_open(&peer->reader, 0);
}

static unsigned count_free_units(const struct ivshmem_area *area)
{
    unsigned free = 0;
    for (unsigned i = 0; i < area->units; i++)
        free += (unsigned)ivshmem_unit_is_free(
            area, ivshmem_load(&area->memory, area->units_at + 8u * i));
    return free;
}

static unsigned count_free_places(const struct ivshmem_area *area)
{
    unsigned free = 0;
    for (unsigned i = 0; i < area->places; i++)
        free += ivshmem_value(ivshmem_load(&area->memory, ivshmem_place_at(area, i))) == 0;
    return free;
}

#endif
