/* Shared words, results, and small arithmetic.
 *
 * Knows: value, flags and epoch of a word; error codes. Does not know: where words are.
 */
#ifndef IVSHMEM_CHANNEL_WORDS_H
#define IVSHMEM_CHANNEL_WORDS_H

#include <stddef.h>
#include <stdint.h>

enum ivshmem_error {
    IVSHMEM_AGAIN = -1,     /* nothing there, or no room now */
    IVSHMEM_CORRUPT = -2,   /* a shared word is impossible; struct ivshmem_fault says which */
    IVSHMEM_NO_AREA = -3,   /* no channels here */
    IVSHMEM_VERSION = -4,   /* an area of another version */
    IVSHMEM_NO_ROOM = -5,   /* the area, or its table of records, is full */
    IVSHMEM_TAKEN = -6,     /* every slot of that role, or the name, is taken */
    IVSHMEM_NOT_FOUND = -7, /* no channel of that name */
    IVSHMEM_TOO_LONG = -8,  /* longer than the channel's limit */
    IVSHMEM_TOO_MANY = -9,  /* loans or views */
    IVSHMEM_CLOSED = -10,   /* the channel, or one's own place, was removed */
    IVSHMEM_OVERTAKEN = -11, /* the message was overwritten while it was looked at */
    IVSHMEM_READ_ONLY = -12, /* this needs memory that can be written */
    IVSHMEM_NO_ATOMICS = -13, /* compare-exchange cannot work in this mapping */
    IVSHMEM_BAD = -14       /* an argument */
};

/* Which word was impossible, and whose it is. Any peer may have spoiled it. */
struct ivshmem_fault {
    const char *word; /* "head", "entry", .. */
    uint64_t offset;  /* in the region */
    uint64_t seen;
    uint64_t owner;   /* the owner word of the slot that it belongs to; 0: it is all readers' */
};

/* Each shared word has one writer, or is changed by compare-exchange alone:
 *
 *     value (40 bits) | flags (4) | epoch (20)
 *
 * The epoch is that of the owner word which says whose the word is. A word of another epoch is a
 * late store of a former owner, or was not stored yet: it tells nothing. Positions are values, and
 * are compared modulo 2^40.
 */
#define IVSHMEM_VALUE_MASK ((UINT64_C(1) << 40) - 1)
#define IVSHMEM_EPOCH_MASK 0xfffffu
#define IVSHMEM_CACHE_LINE 64u

static inline uint64_t ivshmem_word(uint64_t value, unsigned flags, unsigned epoch)
{
    return value << 24 | (uint64_t)(flags & 15u) << 20 | (epoch & IVSHMEM_EPOCH_MASK);
}

static inline uint64_t ivshmem_value(uint64_t word)
{
    return word >> 24;
}

static inline unsigned ivshmem_flags(uint64_t word)
{
    return (unsigned)(word >> 20) & 15u;
}

static inline unsigned ivshmem_epoch(uint64_t word)
{
    return (unsigned)word & IVSHMEM_EPOCH_MASK;
}

/* How far position a is behind b, modulo 2^40: 2^39 and more mean that b is behind. */
static inline uint64_t ivshmem_ahead(uint64_t b, uint64_t a)
{
    return (b - a) & IVSHMEM_VALUE_MASK;
}

static inline int ivshmem_is_behind(uint64_t b, uint64_t a)
{
    return ivshmem_ahead(b, a) > IVSHMEM_VALUE_MASK / 2;
}

/* CRC-32 as in zlib, for what is written once. */
static inline uint32_t ivshmem_crc32(const void *data, size_t size)
{
    const unsigned char *byte = (const unsigned char *)data;
    uint32_t crc = 0xffffffffu;
    for (size_t i = 0; i < size; i++) {
        crc ^= byte[i];
        for (int bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (0xedb88320u & (0u - (crc & 1u)));
    }
    return ~crc;
}

static inline uint64_t ivshmem_rounded(uint64_t size, uint64_t unit)
{
    return (size + unit - 1) / unit * unit;
}

#endif
