/* Several parties run the header in one process, step by step, on memory that is as weak as it allows.
 *
 * A program includes this in place of the header. Each party is a coroutine. What it does with shared
 * memory goes through the functions below, and each load, exchange, fence, ring and wait is a step at
 * which another party may be next. The header is not changed: its functions of machine.h are replaced
 * by macros, after they were declared.
 *
 * The memory is that of tests/model/automaton.py:
 *
 * - A store waits in its party's buffer. It may become visible before an older store to another word,
 *   unless a store barrier stands between the two. A full fence and an exchange wait until the buffer
 *   is empty.
 * - A load of a word acquires, as IVSHMEM_LOAD must: what is loaded later is not older. A load of
 *   payload does not: until the next load barrier, or load of a word, a later load may see what was
 *   there at any time since the barrier before it; but of one word never what is older than before.
 *
 * Payload is stored and loaded by words of 8 bytes, so that a message of two of them can be torn.
 *
 * Who is next, and which store becomes visible, is what a schedule says: `choose` is the program's.
 */
#ifndef SCHEDULES_H
#define SCHEDULES_H
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

static void copy_bytes(void *to, const void *from, uint64_t size);
#define IVSHMEM_COPY(to, from, size) copy_bytes((to), (from), (size))
#include "ivshmem_channel/machine.h"

static uint64_t load_word(const struct ivshmem_memory *memory, uint64_t at, const char *function);
static void store_word(const struct ivshmem_memory *memory, uint64_t at, uint64_t word,
                       const char *function);
static void store_barrier(void);
static void load_barrier(void);
static void full_fence(const char *function);
static int exchange_words(const struct ivshmem_memory *memory, uint64_t at, uint64_t expected,
                          uint64_t desired, const char *function);
#define ivshmem_load(memory, at) load_word((memory), (at), __func__)
#define ivshmem_store(memory, at, word) store_word((memory), (at), (word), __func__)
#define ivshmem_store_barrier(memory) ((void)(memory), store_barrier())
#define ivshmem_load_barrier(memory) ((void)(memory), load_barrier())
#define ivshmem_full_fence(memory) ((void)(memory), full_fence(__func__))
#define ivshmem_announce(memory, at, word)                                                        \
    (ivshmem_store_barrier(memory), ivshmem_store((memory), (at), (word)))
#define ivshmem_exchange(memory, at, expected, desired)                                           \
    exchange_words((memory), (at), (expected), (desired), __func__)
/* A copy of the header, in which a load knows its function, and which can do without one of its points:
 * see tests/support/header_points.py. */
#define IVSHMEM_GET(of, offset)                                                                   \
    load_word(&(of)->area.memory, (of)->at + (offset), __func__)
static int removed_point; /* 0: none */
#define IVSHMEM_WRITER_OWNER(of, slot) IVSHMEM_GET(of, ivshmem_writer_owner_at(of, slot))
#define IVSHMEM_READER_OWNER(of, slot) IVSHMEM_GET(of, ivshmem_reader_owner_at(of, slot))
#define IVSHMEM_HAS(point) (removed_point != (point))
#define IVSHMEM_POINT_STORE_BARRIER(has, memory) ((has) ? ivshmem_store_barrier(memory) : (void)0)
#define IVSHMEM_POINT_LOAD_BARRIER(has, memory) ((has) ? ivshmem_load_barrier(memory) : (void)0)
#define IVSHMEM_POINT_FULL_FENCE(has, memory) ((has) ? ivshmem_full_fence(memory) : (void)0)
#define IVSHMEM_POINT_ANNOUNCE(has, memory, at, word)                                             \
    (IVSHMEM_POINT_STORE_BARRIER(has, memory), ivshmem_store((memory), (at), (word)))
#include "ivshmem_channel.h"
#include "peers.h"

enum { PARTIES = 4, STORES = 512, CHANGES = 1 << 14, STACK = 1 << 16, STEPS = 20000 };

enum verb { BEGINS, LOADS, EXCHANGES, FENCES, RINGS, WAITS, PAUSES, KILLS, IS_OVER };

struct party {
    const char *name;
    void (*program)(struct party *party);
    struct peer *peer;
    ucontext_t context;
    enum verb verb; /* what it does next */
    uint64_t at;    /* the word, or the party that it rings or kills */
    const char *function;
    int is_dead, was_rung;
    unsigned long own;    /* steps, its stores that became visible among them */
    unsigned long paused; /* how many steps the others had done then */
    int idle;             /* pauses in which they did none */
    struct store {
        uint64_t at, word; /* at 0: a store barrier */
        const char *function;
    } stores[STORES];
    unsigned count;
    /* Loads: where the last barrier stands in `changes`, and, of words that were seen since, the
     * change from which on they may be seen. */
    unsigned since, seen_count;
    struct seen {
        uint64_t at;
        unsigned change;
    } seen[64];
    int has_loaded;
    /* For the checks. */
    uint64_t expected[4], got, lost;
};

static struct party parties[PARTIES];
static unsigned party_count;
static struct party *running; /* NULL: loads and stores are done at once */
static ucontext_t outside;
static unsigned long steps;
static const char *failure;
static long failure_value;
static struct change {
    uint64_t at, old;
} changes[CHANGES];
static unsigned change_count;
static int trace, loads_are_relaxed;

/* The next party, which can do its step; NULL: there is none. Called at each step. */
static struct party *choose(void);
/* Which of the words that a load may see: 0 is the newest, `count` the oldest. */
static unsigned choose_age(unsigned count);
static const char *name_of(uint64_t at); /* of a word, for a trace */

static void fail(const char *what, long value)
{
    failure = what;
    failure_value = value;
    running = NULL;
    setcontext(&outside);
    abort();
}

/* -- the memory ---------------------------------------------------------------------------------- */

static uint64_t *word_at(uint64_t at)
{
    return (uint64_t *)(void *)(region + at);
}

static int may_show(const struct party *party, unsigned index)
{
    uint64_t at = party->stores[index].at;
    if (at == 0)
        return 0;
    for (unsigned i = 0; i < index; i++)
        if (party->stores[i].at == 0 || party->stores[i].at == at)
            return 0;
    return 1;
}

static void sees(struct party *party, uint64_t at, unsigned change)
{
    unsigned i = 0;
    while (i < party->seen_count && party->seen[i].at != at)
        i++;
    if (i == 64)
        fail("too many words since a barrier", 64);
    party->seen[i].at = at;
    party->seen[i].change = change;
    if (i == party->seen_count)
        party->seen_count++;
}

static void change(struct party *party, uint64_t at, uint64_t word)
{
    if (change_count == CHANGES)
        fail("too many stores", CHANGES);
    changes[change_count].at = at;
    changes[change_count++].old = *word_at(at);
    *word_at(at) = word;
    sees(party, at, change_count);
}

/* A store of the buffer becomes visible. */
static void show(struct party *party, unsigned index)
{
    struct store store = party->stores[index];
    if (trace)
        printf("%s: %s = %llx becomes visible\n", party->name, name_of(store.at),
               (unsigned long long)store.word);
    change(party, store.at, store.word);
    steps++;
    party->own++;
    party->count--;
    memmove(party->stores + index, party->stores + index + 1,
            sizeof(struct store) * (party->count - index));
    while (party->count > 0 && party->stores[0].at == 0) {
        party->count--;
        memmove(party->stores, party->stores + 1, sizeof(struct store) * party->count);
    }
}

static int is_able(const struct party *party)
{
    if (party->is_dead || party->verb == IS_OVER)
        return 0;
    if (party->verb == FENCES || party->verb == EXCHANGES)
        return party->count == 0;
    if (party->verb == WAITS)
        return party->was_rung;
    return party->verb != PAUSES || party->idle < 2 || party->paused != steps - party->own;
}

/* Wait until it is this party's turn to do a step. */
static void step(enum verb verb, uint64_t at, const char *function)
{
    struct party *self = running, *next;
    self->verb = verb;
    self->at = at;
    self->function = function;
    next = choose();
    if (next == NULL)
        fail("asleep for ever", 0);
    if (next != self) {
        running = next;
        swapcontext(&self->context, &next->context);
    }
    if (++steps > STEPS)
        fail("no end", STEPS);
    self->own++;
    if (trace && verb != LOADS)
        printf("%s %s %s\n", self->name,
               verb == EXCHANGES ? "exchanges" : verb == FENCES ? "passes a fence"
               : verb == RINGS                                  ? "rings"
               : verb == WAITS                                  ? "wakes"
               : verb == KILLS                                  ? "kills"
                                                                : "continues",
               verb == RINGS || verb == KILLS ? parties[at].name : at ? name_of(at) : function);
}

static uint64_t load(uint64_t at, const char *function, int acquires)
{
    struct party *self = running;
    unsigned ages[64], count = 0, from, chosen = 0;
    uint64_t word;
    step(LOADS, at, function);
    for (unsigned i = self->count; i-- > 0;)
        if (self->stores[i].at == at)
            return self->stores[i].word;
    from = self->since;
    for (unsigned i = 0; i < self->seen_count; i++)
        if (self->seen[i].at == at && self->seen[i].change > from)
            from = self->seen[i].change;
    if (self->has_loaded)
        for (unsigned i = change_count; i-- > from && count < 64;)
            if (changes[i].at == at)
                ages[count++] = i;
    if (count != 0)
        chosen = choose_age(count);
    word = chosen == 0 ? *word_at(at) : changes[ages[chosen - 1]].old;
    if (trace)
        printf("%s loads%s %s: %llx\n", self->name, chosen ? " the older" : "", name_of(at),
               (unsigned long long)word);
    sees(self, at, chosen == 0 ? change_count : ages[chosen - 1]);
    self->has_loaded = 1;
    if (acquires && !loads_are_relaxed)
        load_barrier();
    return word;
}

static uint64_t load_word(const struct ivshmem_memory *memory, uint64_t at, const char *function)
{
    (void)memory;
    return running == NULL ? *word_at(at) : load(at, function, 1);
}

static void put_into_buffer(uint64_t at, uint64_t word, const char *function)
{
    if (running->has_loaded && at != 0) /* no acquiring load, and no barrier, came after it */
        fail("a store may overtake a load of payload before it", 0);
    if (running->count == STORES)
        fail("too many stores in the buffer", STORES);
    running->stores[running->count].at = at;
    running->stores[running->count].function = function;
    running->stores[running->count++].word = word;
}

static void store_word(const struct ivshmem_memory *memory, uint64_t at, uint64_t word,
                       const char *function)
{
    (void)memory;
    if (running == NULL)
        *word_at(at) = word;
    else
        put_into_buffer(at, word, function);
}

static void store_barrier(void)
{
    if (running != NULL && running->count != 0 && running->stores[running->count - 1].at != 0)
        put_into_buffer(0, 0, NULL);
}

static void load_barrier(void)
{
    if (running == NULL)
        return;
    running->since = change_count;
    running->seen_count = 0;
    running->has_loaded = 0;
}

static void full_fence(const char *function)
{
    if (running == NULL)
        return;
    if (running->count != 0)
        step(FENCES, 0, function);
    load_barrier();
}

static int exchange_words(const struct ivshmem_memory *memory, uint64_t at, uint64_t expected,
                          uint64_t desired, const char *function)
{
    int changed;
    (void)memory;
    if (running != NULL)
        step(EXCHANGES, at, function);
    changed = *word_at(at) == expected;
    if (changed && running != NULL)
        change(running, at, desired);
    else if (changed)
        *word_at(at) = desired;
    load_barrier();
    return changed;
}

static void copy_bytes(void *to, const void *from, uint64_t size)
{
    unsigned char *in = (unsigned char *)to;
    const unsigned char *out = (const unsigned char *)from;
    uint64_t word;
    if (running == NULL || size % 8 != 0) {
        memcpy(to, from, size);
    } else if (in >= region && in < region + SIZE) {
        for (uint64_t i = 0; i < size; i += 8) {
            memcpy(&word, out + i, 8);
            put_into_buffer((uint64_t)(in - region) + i, word, __func__);
        }
    } else if (out >= region && out < region + SIZE) {
        for (uint64_t i = 0; i < size; i += 8) {
            word = load((uint64_t)(out - region) + i, __func__, 0);
            memcpy(in + i, &word, 8);
        }
    } else {
        memcpy(to, from, size);
    }
}

/* -- what the user of the header supplies --------------------------------------------------------- */

/* A ring overtakes stores that are not visible yet. */
static void ring(void *context, unsigned peer, unsigned vector)
{
    (void)context;
    (void)vector;
    if (running != NULL)
        step(RINGS, peer, __func__);
    if (peer < party_count)
        parties[peer].was_rung = 1;
}

static int64_t now(void *context)
{
    (void)context;
    return 1;
}

static int ended(void *context, uint64_t process, uint64_t started)
{
    (void)context;
    (void)process;
    (void)started;
    return 0;
}

/* Sleep until somebody has rung since the last wait. */
static inline void wait_for_ring(void)
{
    step(WAITS, 0, __func__);
    running->was_rung = 0;
}

/* Let others run before one looks again, as a process does that polls. */
static inline void pause_party(void)
{
    unsigned long others = steps - running->own;
    running->idle = others == running->paused ? running->idle + 1 : 0;
    running->paused = others;
    step(PAUSES, 0, __func__);
}

/* A party ends where it stands. Which of its stores were visible is what the steps before say. */
static inline void kill_party(unsigned index)
{
    struct party *party = &parties[index];
    step(KILLS, index, __func__);
    party->is_dead = 1;
    party->count = 0;
}

/* -- one run ------------------------------------------------------------------------------------- */

static void start(void)
{
    struct party *self = running;
    self->program(self);
    self->verb = IS_OVER;
    running = choose();
    if (running == NULL) {
        for (unsigned i = 0; i < party_count; i++)
            if (!parties[i].is_dead && parties[i].verb != IS_OVER)
                fail("asleep for ever", (long)i);
        setcontext(&outside);
    }
    setcontext(&running->context);
}

static void rest(void (*finish)(void))
{
    running = NULL;
    finish();
    setcontext(&outside);
}

static void begin_context(ucontext_t *context, char *stack, void (*function)(void))
{
    getcontext(context);
    context->uc_stack.ss_sp = stack;
    context->uc_stack.ss_size = STACK;
    context->uc_link = NULL;
    makecontext(context, function, 0);
}

static void (*at_the_end)(void);

static void finish(void)
{
    rest(at_the_end);
}

/* Run the parties to their ends, and `check` afterwards. Whether all was right. */
static int run_parties(void (*check)(void))
{
    static char stacks[PARTIES + 1][STACK];
    static ucontext_t last;
    failure = NULL;
    steps = 0;
    change_count = 0;
    for (unsigned i = 0; i < party_count; i++) {
        struct party *party = &parties[i];
        party->verb = BEGINS;
        party->is_dead = party->was_rung = party->has_loaded = 0;
        party->own = party->paused = 0;
        party->idle = 0;
        party->count = party->since = party->seen_count = 0;
        memset(party->expected, 0, sizeof party->expected);
        party->got = party->lost = 0;
        begin_context(&party->context, stacks[i], start);
    }
    running = choose();
    swapcontext(&outside, &running->context);
    running = NULL;
    if (failure == NULL) {
        at_the_end = check;
        begin_context(&last, stacks[PARTIES], finish);
        swapcontext(&outside, &last);
    }
    return failure == NULL;
}

#endif
