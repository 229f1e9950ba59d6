/* The floor of bench_memory.py: a library, so that both sides use the same memory.
 *
 * All but collapse return nanoseconds for each of COUNT, or for each small page.
 */

#define _GNU_SOURCE
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

enum { PAGE = 4096 };

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25 /* since Linux 6.1 */
#endif

/* What is in memory is wanted there: the compiler may not leave out a step of a loop. */
#define KEEP __asm__ __volatile__("" ::: "memory")

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e9 + t.tv_nsec;
}

#define MEASURE(count, step)                  \
    {                                         \
        double start = now();                 \
        for (long i = 0; i < (count); i++) {  \
            step;                             \
            KEEP;                             \
        }                                     \
        return (now() - start) / (count);     \
    }

double copy(void *to, const void *from, size_t size, long count)
{
    MEASURE(count, memcpy(to, from, size))
}

double load(uint64_t *word, long count)
{
    MEASURE(count, __atomic_load_n(word, __ATOMIC_ACQUIRE))
}

double store(uint64_t *word, long count)
{
    MEASURE(count, __atomic_store_n(word, 5, __ATOMIC_RELEASE))
}

double fetch_add(uint64_t *word, long count)
{
    MEASURE(count, __atomic_fetch_add(word, 5, __ATOMIC_SEQ_CST))
}

double compare_exchange(uint64_t *word, long count)
{
    uint64_t seen;
    MEASURE(count, (seen = 1, __atomic_compare_exchange_n(word, &seen, 1, 0, __ATOMIC_SEQ_CST,
                                                          __ATOMIC_SEQ_CST)))
}

/* Writes to each small page. */
double touch(volatile char *memory, size_t size)
{
    MEASURE((long)(size / PAGE), memory[i * PAGE] = 1)
}

/* Loads from all over the memory, which holds zeros there; each waits for the one before. */
double jump(const char *memory, size_t size, long count)
{
    uint64_t place = 1;
    MEASURE(count, place = place * 6364136223846793005u + 1442695040888963407u
                           + *(const volatile char *)(memory + (place >> 20) % size / 64 * 64 + 8))
}

/* Small pages that are there become huge ones; 0 where the kernel can. */
int collapse(void *memory, size_t size)
{
    return madvise(memory, size, MADV_COLLAPSE);
}
