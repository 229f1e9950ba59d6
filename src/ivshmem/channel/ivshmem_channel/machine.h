/* What depends on the compiler, the processor and the kind of mapping.
 *
 * Knows: one load, one store, fences, compare-exchange. Does not know: what the words mean.
 *
 * Define a macro before the inclusion to replace it, for another compiler or an RTOS.
 */
#ifndef IVSHMEM_CHANNEL_MACHINE_H
#define IVSHMEM_CHANNEL_MACHINE_H

#include <stddef.h>
#include <stdint.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "ivshmem channels are little-endian: peers would read these words in another order"
#endif

#if defined(__GNUC__) || defined(__clang__)
#ifndef IVSHMEM_LOAD
#define IVSHMEM_LOAD(word) __atomic_load_n((word), __ATOMIC_ACQUIRE)
#define IVSHMEM_STORE(word, value) __atomic_store_n((word), (value), __ATOMIC_RELEASE)
#endif
#ifndef IVSHMEM_COMPARE_EXCHANGE /* whether *word was `expected`, and is `desired` now */
static inline int ivshmem_compare_exchange_word(uint64_t *word, uint64_t expected, uint64_t desired)
{
    return __atomic_compare_exchange_n(word, &expected, desired, 0, __ATOMIC_SEQ_CST,
                                       __ATOMIC_SEQ_CST);
}
#define IVSHMEM_COMPARE_EXCHANGE ivshmem_compare_exchange_word
#endif
#ifndef IVSHMEM_COPY
#define IVSHMEM_COPY(to, from, size) __builtin_memcpy((to), (from), (size))
#endif
#ifndef IVSHMEM_PREFETCH /* a line that will be stored into; no effect but on the time */
#if defined(__x86_64__) /* the builtin prefetches for loads, unless the compiler is told otherwise */
#define IVSHMEM_PREFETCH(at) __asm__ __volatile__("prefetchw %0" : : "m"(*(const char *)(at)))
#else
#define IVSHMEM_PREFETCH(at) __builtin_prefetch((at), 1)
#endif
#endif
#if defined(__x86_64__)
#define IVSHMEM_COMPILER_BARRIER() __asm__ __volatile__("" ::: "memory")
#define IVSHMEM_LFENCE() __asm__ __volatile__("lfence" ::: "memory")
#define IVSHMEM_SFENCE() __asm__ __volatile__("sfence" ::: "memory")
#define IVSHMEM_MFENCE() __asm__ __volatile__("mfence" ::: "memory")
/* Orders what is cached as mfence does, in a third of the time. */
#define IVSHMEM_LOCKED() __asm__ __volatile__("lock; orl $0, (%%rsp)" ::: "memory", "cc")
#elif defined(__aarch64__)
#define IVSHMEM_COMPILER_BARRIER() __asm__ __volatile__("" ::: "memory")
#define IVSHMEM_DMB(which) __asm__ __volatile__("dmb " #which ::: "memory")
#endif
#elif defined(_MSC_VER) && defined(_M_X64)
#include <intrin.h>
#include <string.h>
#define inline __inline
#ifndef IVSHMEM_LOAD /* /volatile:ms: loads acquire, stores release */
#define IVSHMEM_LOAD(word) (*(const volatile uint64_t *)(word))
#define IVSHMEM_STORE(word, value) (*(volatile uint64_t *)(word) = (value))
#endif
#ifndef IVSHMEM_COMPARE_EXCHANGE
#define IVSHMEM_COMPARE_EXCHANGE(word, expected, desired)                                         \
    ((uint64_t)_InterlockedCompareExchange64((volatile long long *)(word), (long long)(desired),  \
                                             (long long)(expected)) == (expected))
#endif
#ifndef IVSHMEM_COPY
#define IVSHMEM_COPY(to, from, size) memcpy((to), (from), (size))
#endif
#ifndef IVSHMEM_PREFETCH
#define IVSHMEM_PREFETCH(at) _m_prefetchw((const volatile void *)(at))
#endif
#define IVSHMEM_COMPILER_BARRIER() _ReadWriteBarrier()
#define IVSHMEM_LFENCE() _mm_lfence()
#define IVSHMEM_SFENCE() _mm_sfence()
#define IVSHMEM_MFENCE() _mm_mfence()
#define IVSHMEM_LOCKED() _mm_mfence()
#endif

/* A test build defines it: called before each shared store, fence and compare-exchange. */
#ifndef IVSHMEM_STEP
#define IVSHMEM_STEP(what) ((void)0)
#endif

/* Payload that may change while it is copied: what was copied counts only after the stamp, or the
 * claim, was found unchanged. ThreadSanitizer takes that for a race. */
#if defined(__SANITIZE_THREAD__)
__attribute__((noinline, no_sanitize("thread"))) static void
ivshmem_copy_payload(void *to, const void *from, uint64_t size)
{
    for (uint64_t i = 0; i < size; i++)
        ((volatile unsigned char *)to)[i] = ((const volatile unsigned char *)from)[i];
}
#else
static inline void ivshmem_copy_payload(void *to, const void *from, uint64_t size)
{
    IVSHMEM_COPY(to, from, size);
}
#endif

/* How a region is mapped. Where it is not known, IVSHMEM_WRITE_COMBINING is always right. */
enum ivshmem_mapping {
    IVSHMEM_WRITE_BACK = 0,      /* ordinary memory: host processes, virtio-pmem in a guest */
    IVSHMEM_WRITE_COMBINING = 1, /* resource2_wc */
    IVSHMEM_UNCACHED = 2         /* vfio, resource2 */
};

struct ivshmem_memory {
    unsigned char *start; /* of the region's mapping, page-aligned */
    uint64_t size;        /* of the region */
    enum ivshmem_mapping mapping;
    int readonly;
};

static inline uint64_t ivshmem_load(const struct ivshmem_memory *memory, uint64_t offset)
{
    return IVSHMEM_LOAD((const uint64_t *)(const void *)(memory->start + offset));
}

/* What was stored before comes before what is stored after. */
static inline void ivshmem_store_barrier(const struct ivshmem_memory *memory)
{
    IVSHMEM_STEP("store barrier");
#if defined(__aarch64__)
    if (memory->mapping == IVSHMEM_WRITE_BACK)
        IVSHMEM_DMB(ishst);
    else
        IVSHMEM_DMB(oshst);
#else
    if (memory->mapping != IVSHMEM_WRITE_BACK)
        IVSHMEM_SFENCE();
    IVSHMEM_COMPILER_BARRIER();
#endif
}

/* What was loaded before comes before what is loaded after. */
static inline void ivshmem_load_barrier(const struct ivshmem_memory *memory)
{
#if defined(__aarch64__)
    if (memory->mapping == IVSHMEM_WRITE_BACK)
        IVSHMEM_DMB(ishld);
    else
        IVSHMEM_DMB(oshld);
#else
    if (memory->mapping != IVSHMEM_WRITE_BACK) /* loads of write-combining memory pass each other */
        IVSHMEM_LFENCE();
    IVSHMEM_COMPILER_BARRIER();
#endif
}

/* What was stored before can be seen by all before anything is loaded after. */
static inline void ivshmem_full_fence(const struct ivshmem_memory *memory)
{
    IVSHMEM_STEP("full fence");
#if defined(__aarch64__)
    if (memory->mapping == IVSHMEM_WRITE_BACK)
        IVSHMEM_DMB(ish);
    else
        IVSHMEM_DMB(sy);
#else
    if (memory->mapping == IVSHMEM_WRITE_BACK)
        IVSHMEM_LOCKED();
    else
        IVSHMEM_MFENCE();
#endif
}

static inline void ivshmem_store(const struct ivshmem_memory *memory, uint64_t offset,
                                 uint64_t word)
{
    IVSHMEM_STEP("store");
    IVSHMEM_STORE((uint64_t *)(void *)(memory->start + offset), word);
}

/* A word that others wait for: it does not stay in a buffer of the processor. */
static inline void ivshmem_announce(const struct ivshmem_memory *memory, uint64_t offset,
                                    uint64_t word)
{
    ivshmem_store_barrier(memory);
    ivshmem_store(memory, offset, word);
    if (memory->mapping != IVSHMEM_WRITE_BACK)
        ivshmem_store_barrier(memory);
}

/* Whether compare-exchange works in a mapping at all: arm64 may refuse exclusives on device memory. On
 * x86-64 it works everywhere; in uncached memory it locks the bus, which is slow. */
static inline int ivshmem_can_exchange(const struct ivshmem_memory *memory)
{
#if defined(__aarch64__)
    return memory->mapping == IVSHMEM_WRITE_BACK;
#else
    (void)memory;
    return 1;
#endif
}

/* Change a word, if it is as expected; a full fence at both sides, in any case. */
static inline int ivshmem_exchange(const struct ivshmem_memory *memory, uint64_t offset,
                                   uint64_t expected, uint64_t desired)
{
    int changed;
#if defined(__aarch64__)
    ivshmem_full_fence(memory); /* the instruction alone orders less than that */
#else
    ivshmem_store_barrier(memory);
#endif
    IVSHMEM_STEP("compare-exchange");
    changed = IVSHMEM_COMPARE_EXCHANGE((uint64_t *)(void *)(memory->start + offset), expected,
                                       desired);
#if defined(__aarch64__)
    ivshmem_full_fence(memory);
#endif
    return changed;
}

#endif
