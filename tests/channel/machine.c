/* What the compiler makes of machine.h: a function for each primitive and each kind of mapping, to be
 * disassembled. Nothing here is run. */
#include "ivshmem_channel.h"

#define MEMORY(which) const struct ivshmem_memory memory = {at, 1 << 20, which, 0}
#define PROBE(type, name, which, call)                                                            \
    type name(unsigned char *at, uint64_t a, uint64_t b);                                         \
    type name(unsigned char *at, uint64_t a, uint64_t b)                                          \
    {                                                                                             \
        MEMORY(which);                                                                            \
        (void)a;                                                                                  \
        (void)b;                                                                                  \
        call;                                                                                     \
    }
#define PROBES(kind, which)                                                                       \
    PROBE(void, store_barrier_##kind, which, ivshmem_store_barrier(&memory))                      \
    PROBE(void, load_barrier_##kind, which, ivshmem_load_barrier(&memory))                        \
    PROBE(void, full_fence_##kind, which, ivshmem_full_fence(&memory))                            \
    PROBE(uint64_t, load_##kind, which, return ivshmem_load(&memory, 8))                          \
    PROBE(void, store_##kind, which, ivshmem_store(&memory, 8, a))                                \
    PROBE(void, announce_##kind, which, ivshmem_announce(&memory, 8, a))                          \
    PROBE(int, exchange_##kind, which, return ivshmem_exchange(&memory, 8, a, b))

PROBES(write_back, IVSHMEM_WRITE_BACK)
PROBES(write_combining, IVSHMEM_WRITE_COMBINING)
PROBES(uncached, IVSHMEM_UNCACHED)
