/* A process is killed, or stopped and later continued, at each step of what it does with channels.
 *
 * A step is a shared store, a fence or a compare-exchange (IVSHMEM_STEP). A program that includes
 * this has a table of operations, and `main` runs one of them once for each step that it has:
 *
 *   PROGRAM kill|stop|evict OPERATION [FIRST [LAST]]
 *
 * With "evict" it is stopped, its place is freed at a user's word, which was wrong, and others use
 * what it had when it continues.
 *
 * It prints how many steps the operation has. If something was wrong it says what, and at which
 * step; the exit status is 1 then.
 *
 * Time is a word in shared memory, which the test moves, so that a lease passes at once.
 */
#ifndef STEPS_H
#define STEPS_H
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef IVSHMEM_STEP
static void step(void);
#define IVSHMEM_STEP(what) step()
#endif
#include "ivshmem_channel.h"
#include "peers.h"

/* What the processes tell one another beside the channels: for the test's checks alone. */
struct aside {
    int64_t now;
    int64_t began, ended; /* calls of the child: those that began, and those that returned */
    int code;             /* what ended the child's operation, if it was not 0 */
};

/* What one operation needs and proves. The test has one process beside the child: `peer`. */
struct operation {
    const char *name;
    const struct ivshmem_geometry *geometry;
    void (*before)(struct peer *peer);
    void (*act)(void);                       /* the child's */
    void (*while_silent)(struct peer *peer); /* the child is stopped, and its lease is over */
    void (*after)(struct peer *peer);        /* the child is gone, and that is proven */
    void (*evicted)(struct peer *peer);      /* the stopped child's place was freed */
    void (*returned)(struct peer *peer);     /* and it has continued to its end */
};

static volatile struct aside *aside;
static _Thread_local long steps;
static long fatal;
static int signal_at_fatal; /* in the child */

static inline void step(void)
{
    if (steps++ == fatal && signal_at_fatal != 0)
        raise(signal_at_fatal);
}

static void fail(const char *what, long value)
{
    printf("step %ld: %s (%ld)\n", fatal, what, value);
    fflush(stdout);
    _exit(1);
}

/* In the child: this must not fail, however long it was stopped. */
static inline void must(int code)
{
    if (code != 0) {
        aside->code = code;
        _exit(0);
    }
}

static int64_t now(void *context)
{
    (void)context;
    return aside->now;
}

static void ring(void *context, unsigned peer, unsigned vector)
{
    (void)context;
    (void)peer;
    (void)vector;
}

static int ended(void *context, uint64_t process, uint64_t started)
{
    (void)context;
    (void)started;
    return kill((pid_t)process, 0) != 0 && errno == ESRCH;
}

/* Message `number`: every word says which one it is, so that a torn one is seen. */
static inline const void *filled(uint64_t number)
{
    static uint64_t words[WORDS];
    for (int i = 0; i < WORDS; i++)
        words[i] = number;
    return words;
}

static inline uint64_t number_in(const uint64_t *words)
{
    for (int i = 1; i < WORDS; i++)
        CHECK(words[i] == words[0], words[i]);
    return words[0];
}

/* Let two leases pass, in which one peer beats. */
static void pass_lease(struct peer *peer)
{
    for (int i = 0; i < 8; i++) {
        CHECK(ivshmem_beat(&peer->member) >= 0, 0);
        aside->now += LEASE / 4;
    }
    CHECK(ivshmem_beat(&peer->member) >= 0, 0);
}

/* Free the place of a process at a user's word. */
static void free_place_of(const struct ivshmem_area *area, pid_t process)
{
    for (unsigned i = 0; i < area->places; i++) {
        uint64_t at = ivshmem_place_at(area, i), number = ivshmem_load(&area->memory, at);
        uint64_t owner = ivshmem_load(&area->memory, at + IVSHMEM_PLACE_PROCESS);
        if (ivshmem_value(number) != 0 && ivshmem_value(owner) == (uint64_t)process)
            CHECK(ivshmem_place_free(area, i, number), i);
    }
}

enum way { KILL, STOP, EVICT };

/* One run: the child is killed, or stopped, at step `fatal`. Whether it came so far. */
static int run(const struct operation *operation, enum way way)
{
    const struct ivshmem_memory memory = {region, SIZE, IVSHMEM_WRITE_BACK, 0};
    struct ivshmem_area area;
    static struct peer peer, second;
    unsigned units, places;
    int status, reached = 1;
    pid_t child;
    memset((void *)aside, 0, sizeof *aside);
    aside->now = 1;
    memset(region, 0, SIZE);
    CHECK(ivshmem_area_make(&area, &memory, 8192, SIZE - 8192, 8, 4) == 0, 0);
    CHECK(join(&peer) == 0, 0);
    units = count_free_units(&area);
    CHECK(create(&peer, channel_name, operation->geometry) == 0, 0);
    CHECK(open_channel(&peer, channel_name) == 0, 0);
    places = count_free_places(&area);
    operation->before(&peer);
    fflush(stdout);
    child = fork();
    if (child == 0) {
        steps = 0;
        signal_at_fatal = way == KILL ? SIGKILL : SIGSTOP;
        operation->act();
        _exit(steps <= fatal ? 78 : 77); /* it never came to that step, or it did */
    }
    CHECK(waitpid(child, &status, WUNTRACED) == child, errno);
    if (WIFSTOPPED(status) && way == EVICT) {
        free_place_of(&area, child);
        operation->evicted(&peer);
        kill(child, SIGCONT);
        CHECK(waitpid(child, &status, 0) == child, errno);
        operation->returned(&peer);
        aside->code = 0; /* it may have been told that it has no place */
    } else if (WIFSTOPPED(status)) {
        /* Silent: no peer waits for it, and its place is not used again. */
        pass_lease(&peer);
        operation->while_silent(&peer);
        CHECK(join(&second) == 0, 0);
        ivshmem_leave_area(&second.member);
        kill(child, SIGCONT);
        CHECK(waitpid(child, &status, 0) == child, errno);
    }
    if (WIFEXITED(status) && WEXITSTATUS(status) == 1)
        _exit(1); /* it said why */
    CHECK(aside->code == 0, aside->code);
    reached = !WIFEXITED(status) || WEXITSTATUS(status) != 78;
    pass_lease(&peer);
    CHECK(count_free_places(&area) == places, count_free_places(&area));
    operation->after(&peer);
    /* A name that was being made or removed is free, and in the end all memory is back. */
    ivshmem_leave_area(&peer.member);
    CHECK(join(&peer) == 0, 0);
    if (open_channel(&peer, other_name) == 0)
        CHECK(ivshmem_remove(&peer.member, &peer.channel, 0) == 0, 0);
    CHECK(create(&peer, other_name, operation->geometry) == 0, 0);
    CHECK(open_channel(&peer, other_name) == 0, 0);
    CHECK(ivshmem_remove(&peer.member, &peer.channel, 0) == 0, 0);
    CHECK(open_channel(&peer, channel_name) == 0, 0);
    CHECK(ivshmem_remove(&peer.member, &peer.channel, 0) == 0, 0);
    CHECK(count_free_units(&area) == units, count_free_units(&area));
    return reached;
}

static inline int run_all(int argc, char **argv, const struct operation *operations, size_t count)
{
    static const char *const ways[] = {"kill", "stop", "evict"};
    long last = argc > 4 ? atol(argv[4]) : 100000;
    enum way way = KILL;
    for (unsigned i = 0; argc > 1 && i < 3; i++)
        if (strcmp(argv[1], ways[i]) == 0)
            way = (enum way)i;
    region = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    aside = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    for (size_t i = 0; argc > 2 && i < count; i++) {
        if (strcmp(operations[i].name, argv[2]) != 0)
            continue;
        fatal = argc > 3 ? atol(argv[3]) : 0;
        while (fatal <= last && run(&operations[i], way))
            fatal++;
        printf("%s: %ld steps\n", operations[i].name, fatal);
        return 0;
    }
    fprintf(stderr, "usage: %s kill|stop|evict OPERATION [FIRST [LAST]]\n", argv[0]);
    return 2;
}

#endif
