/* What a channel is made of, and where its parts are.
 *
 * Knows: kinds, limits, offsets. Does not know: memory.
 */
#ifndef IVSHMEM_CHANNEL_GEOMETRY_H
#define IVSHMEM_CHANNEL_GEOMETRY_H

#include <stddef.h>
#include <stdint.h>

#include "words.h"

enum ivshmem_kind {
    IVSHMEM_MESSAGES = 1,
    IVSHMEM_QUEUE = 2,
    IVSHMEM_VALUE = 3,
    IVSHMEM_CALLS = 4,
    IVSHMEM_BYTES = 5
};

/* What a full channel does to a reader; a channel allows some of them. */
enum ivshmem_overflow {
    IVSHMEM_OVERWRITE = 1, /* the oldest message; the reader is told how many it lost */
    IVSHMEM_BLOCK = 2,     /* writers wait for the reader, up to their time limit */
    IVSHMEM_DISCARD = 4    /* the newest message is not given to the reader; the writer is told */
};

enum ivshmem_option {
    IVSHMEM_TIMES = 1,      /* each message has the time of its publication */
    IVSHMEM_RING_ALWAYS = 2 /* writers ring all peers: some cannot say that they sleep */
};

#define IVSHMEM_MOST_WRITERS 64u
#define IVSHMEM_MOST_READERS 64u
#define IVSHMEM_MOST_SLOTS 65536u
#define IVSHMEM_MOST_LOANS 256u
#define IVSHMEM_MOST_BYTES ((UINT64_C(1) << 31) - 64)
#define IVSHMEM_CHANNEL_NAME 64u
#define IVSHMEM_CHANNEL_TYPE 256u

/* What a channel is, fixed when it is created. */
struct ivshmem_geometry {
    uint32_t kind, overflow, options;
    uint32_t writers, readers; /* how many at once */
    uint32_t slots;            /* messages of each writer that are kept; a power of two */
    uint32_t loans, views;     /* at once: of each writer, of each reader */
    uint64_t limit;            /* bytes of the longest message */
};

/* Where the parts of a channel are, in bytes from its start; follows from the geometry alone. */
struct ivshmem_layout {
    uint64_t writer_owners, reader_owners, writer_sleepers, reader_sleepers;
    uint64_t rows, row_bytes;
    uint64_t heads;
    uint64_t entries, claims, replies;
    uint64_t backlogs, backlog_bytes; /* of the discarding readers, for each writer */
    uint64_t cells, cell_bytes, cells_each;
    uint64_t size;
};

/* Words of a channel's first line. */
#define IVSHMEM_JOINS 0u

/* An entry: what a writer says of the message at a position.
 *
 *      0  stamp  the position
 *      8  cell   cell (17 bits) | length (31) | the epoch's low 16 bits
 *     16  time   of publication: microseconds since 1970, modulo 2^44 | epoch (20 bits); or 0
 *     24  user   what the two ends agree on: 44 bits, and the epoch
 *
 * Each word has the epoch, so that a late store of a former owner is seen for what it is.
 */
#define IVSHMEM_ENTRY_BYTES 32u
#define IVSHMEM_ENTRY_CELL 8u
#define IVSHMEM_ENTRY_TIME 16u
#define IVSHMEM_ENTRY_USER 24u
#define IVSHMEM_VOID 1u /* flag of a stamp: a new owner has written nothing here yet */
#define IVSHMEM_MOST_CELLS (1u << 17)

static inline uint64_t ivshmem_cell_word(uint32_t cell, uint32_t length, unsigned epoch)
{
    return (uint64_t)cell << 47 | (uint64_t)length << 16 | (epoch & 0xffffu);
}

/* Of bytes: `writers` is how many connections there are at once, `readers` how many listeners, and
 * `slots` how many bytes each direction of a connection holds, a power of two. The rest is 1. */
#define IVSHMEM_MOST_CONNECTIONS 4096u
#define IVSHMEM_MOST_BUFFER (1u << 30)
#define IVSHMEM_CONNECTION_BYTES (3u * IVSHMEM_CACHE_LINE)

static inline int ivshmem_lay_out_bytes(const struct ivshmem_geometry *g,
                                        struct ivshmem_layout *layout)
{
    uint64_t at = IVSHMEM_CACHE_LINE;
    if (g->writers < 1 || g->writers > IVSHMEM_MOST_CONNECTIONS || g->readers < 1 ||
        g->readers > IVSHMEM_MOST_READERS || g->slots < IVSHMEM_CACHE_LINE ||
        g->slots > IVSHMEM_MOST_BUFFER || (g->slots & (g->slots - 1)) != 0 || g->loans != 1 ||
        g->views != 1 || g->limit != 1 || g->overflow != 0 || g->options != 0)
        return IVSHMEM_BAD;
    layout->reader_owners = at;
    at += ivshmem_rounded(8u * g->readers, IVSHMEM_CACHE_LINE);
    layout->reader_sleepers = at;
    at += ivshmem_rounded(8u * g->readers, IVSHMEM_CACHE_LINE);
    layout->heads = at; /* of the connections' words */
    at += (uint64_t)IVSHMEM_CONNECTION_BYTES * g->writers;
    layout->cells = at;
    layout->cell_bytes = g->slots;
    layout->cells_each = 2;
    layout->size = at + 2u * layout->cell_bytes * g->writers;
    layout->writer_owners = layout->writer_sleepers = layout->rows = layout->row_bytes = 0;
    layout->entries = layout->claims = layout->replies = 0;
    layout->backlogs = layout->backlog_bytes = 0;
    return 0;
}

/* Work out where the parts of a channel are; IVSHMEM_BAD: the geometry is not allowed. */
static inline int ivshmem_lay_out(const struct ivshmem_geometry *geometry,
                                  struct ivshmem_layout *layout)
{
    const struct ivshmem_geometry *g = geometry;
    const uint64_t line = IVSHMEM_CACHE_LINE;
    uint64_t at = line; /* the first line: joins */
    uint64_t discarding = g->overflow & IVSHMEM_DISCARD ? g->readers : 0;
    int claims = g->kind == IVSHMEM_QUEUE || g->kind == IVSHMEM_CALLS;
    if (g->kind == IVSHMEM_BYTES)
        return ivshmem_lay_out_bytes(g, layout);
    if (g->kind < IVSHMEM_MESSAGES || g->kind > IVSHMEM_CALLS || g->overflow > 7u ||
        g->options > 3u || g->writers < 1 || g->writers > IVSHMEM_MOST_WRITERS ||
        g->readers > IVSHMEM_MOST_READERS || g->slots < 1 || g->slots > IVSHMEM_MOST_SLOTS ||
        (g->slots & (g->slots - 1)) != 0 || g->loans < 1 || g->loans > IVSHMEM_MOST_LOANS ||
        g->views < 1 || g->views > g->slots || g->limit < 1 || g->limit > IVSHMEM_MOST_BYTES)
        return IVSHMEM_BAD;
    layout->writer_owners = at;
    at += ivshmem_rounded(8u * g->writers, line);
    layout->reader_owners = at;
    at += ivshmem_rounded(8u * g->readers, line);
    layout->writer_sleepers = at;
    at += ivshmem_rounded(8u * g->writers, line);
    layout->reader_sleepers = at;
    at += ivshmem_rounded(8u * g->readers, line);
    layout->rows = at;
    layout->row_bytes = ivshmem_rounded(8u + 8u * g->writers, line);
    at += layout->row_bytes * g->readers;
    layout->heads = at;
    at += line * g->writers;
    layout->entries = at;
    at += ivshmem_rounded((uint64_t)IVSHMEM_ENTRY_BYTES * g->slots, line) * g->writers;
    layout->claims = at;
    at += claims ? ivshmem_rounded(8u * (uint64_t)g->slots, line) * g->writers : 0;
    layout->replies = at;
    at += g->kind == IVSHMEM_CALLS ? ivshmem_rounded(8u * (uint64_t)g->slots, line) * g->writers : 0;
    layout->backlogs = at;
    layout->backlog_bytes =
        line + ivshmem_rounded((uint64_t)IVSHMEM_ENTRY_BYTES * g->slots, line);
    at += layout->backlog_bytes * discarding * g->writers;
    layout->cells = at;
    layout->cell_bytes = ivshmem_rounded(g->limit, line);
    layout->cells_each = (uint64_t)g->slots + g->loans + g->slots * discarding;
    if (g->kind == IVSHMEM_CALLS)
        layout->cells_each *= 2; /* each request has a cell for its reply */
    if (layout->cells_each > IVSHMEM_MOST_CELLS)
        return IVSHMEM_BAD;
    /* At most 2^17 cells of 2^31 bytes for each of 2^6 writers: no overflow. */
    layout->size = at + layout->cells_each * layout->cell_bytes * g->writers;
    return 0;
}

#endif
