/* Processes that join, create channels, remove them and leave, all at the same time.
 *
 *   creators ROUNDS [KILLS]    with KILLS the parent kills one of them that often, at any moment
 *
 * Before its steps a process often lets another one run. Each notes in memory beside the region which
 * place, and which units of the area, are its own: two that have the same one at once are found.
 */
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>

static uint64_t chance = 1;

static uint64_t draw(void)
{
    chance ^= chance << 13;
    chance ^= chance >> 7;
    chance ^= chance << 17;
    return chance;
}

static void at_step(void)
{
    if (draw() % 32 == 0)
        sched_yield();
}

#define IVSHMEM_STEP(what) at_step()
#include "ivshmem_channel.h"

#include "peers.h"

enum { MANY = 3, PLACES = 16, RECORDS = 4, UNITS = 4096, PIDS = 1 << 15 };

/* Whose each is: the number of a process, from 1 on. */
static struct aside {
    uint32_t place[PLACES], unit[UNITS], common;
    uint64_t created[MANY + 1], refused;
    int32_t dead[PIDS]; /* killed, and what it had is noted here no more */
    uint32_t deaths, failed;
} *aside;

static uint32_t me; /* 0: the parent */

static void fail(const char *what, long value)
{
    printf("process %u: %s: %ld\n", me, what, value);
    fflush(stdout);
    __atomic_store_n(&aside->failed, 1, __ATOMIC_SEQ_CST);
    _exit(1);
}

/* In milliseconds. */
static int64_t now(void *context)
{
    struct timespec time;
    (void)context;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000) + time.tv_nsec / 1000000;
}

static void ring(void *context, unsigned peer, unsigned vector)
{
    (void)context, (void)peer, (void)vector;
}

static int ended(void *context, uint64_t process, uint64_t started)
{
    uint32_t deaths = __atomic_load_n(&aside->deaths, __ATOMIC_SEQ_CST);
    (void)context, (void)started;
    for (uint32_t i = 0; i < deaths; i++)
        if ((uint64_t)aside->dead[i] == process)
            return 1;
    return 0;
}

static void note(uint32_t *whose, const char *what)
{
    uint32_t other = __atomic_exchange_n(whose, me, __ATOMIC_SEQ_CST);
    if (other != 0)
        fail(what, (long)other);
}

static void note_no_more(uint32_t *whose)
{
    uint32_t mine = __atomic_exchange_n(whose, 0, __ATOMIC_SEQ_CST);
    CHECK(mine == me, mine);
}

static struct ivshmem_record wanted(int common)
{
    struct ivshmem_record record;
    memset(&record, 0, sizeof record);
    snprintf(record.name, sizeof record.name, common ? "common" : "of %u", me);
    record.geometry = (struct ivshmem_geometry){
        IVSHMEM_VALUE, IVSHMEM_OVERWRITE, 0, 1, 1, SLOTS, LOANS, 2, 8u + draw() % 3000};
    return record;
}

static void use_channel(struct peer *peer, struct ivshmem_record *record, int common)
{
    struct ivshmem_record found;
    uint32_t first = record->first_unit;
    for (uint32_t i = 0; i < record->units; i++)
        note(&aside->unit[first + i], "a unit of two channels");
    if (common)
        note(&aside->common, "a name of two channels");
    CHECK(ivshmem_find(&peer->member.area, record->name, &found) == 0, 0);
    CHECK(found.state == record->state && found.first_unit == first, found.first_unit);
    if (draw() % 4 == 0)
        sched_yield();
    if (common)
        note_no_more(&aside->common);
    for (uint32_t i = 0; i < record->units; i++)
        note_no_more(&aside->unit[first + i]);
    ivshmem_channel_open(&peer->channel, &peer->member.area, &found);
    CHECK(ivshmem_remove(&peer->member, &peer->channel, 0) == 0, 0);
}

static void one_round(int killed)
{
    struct peer peer;
    int code;
    while ((code = join(&peer)) == IVSHMEM_TAKEN && killed)
        sched_yield(); /* until the places of those that were killed are free */
    CHECK(code == 0, code);
    note(&aside->place[peer.member.place.index], "a place of two processes");
    for (uint64_t channels = draw() % 4; channels > 0; channels--) {
        int common = !killed && draw() % 2;
        struct ivshmem_record record = wanted(common);
        code = ivshmem_create(&peer.member, &record);
        if (code == 0) {
            aside->created[me]++;
            use_channel(&peer, &record, common);
        } else {
            /* Again: of another process, or of one that was killed while it made one. */
            CHECK(code == IVSHMEM_NO_ROOM || (common && code == IVSHMEM_TAKEN) ||
                      ((common || killed) && code == IVSHMEM_AGAIN),
                  code);
            __atomic_fetch_add(&aside->refused, 1, __ATOMIC_SEQ_CST);
        }
    }
    note_no_more(&aside->place[peer.member.place.index]);
    ivshmem_leave_area(&peer.member);
}

static pid_t begin(uint32_t number, long rounds, int killed)
{
    pid_t pid = fork();
    CHECK(pid >= 0, errno);
    if (pid != 0)
        return pid;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    me = number;
    chance = (uint64_t)getpid() * UINT64_C(0x9e3779b97f4a7c15) | 1u;
    srandom((unsigned)getpid());
    for (long i = 0; i < rounds && !__atomic_load_n(&aside->failed, __ATOMIC_SEQ_CST); i++)
        one_round(killed);
    _exit(0);
}

/* What a killed process had is its own no more, and then the others may know of its death. */
static void bury(struct peer *parent, uint32_t number, pid_t pid)
{
    struct ivshmem_record found;
    char name[IVSHMEM_CHANNEL_NAME] = {0};
    for (uint32_t i = 0; i < PLACES; i++)
        if (aside->place[i] == number)
            aside->place[i] = 0;
    for (uint32_t i = 0; i < UNITS; i++)
        if (aside->unit[i] == number)
            aside->unit[i] = 0;
    CHECK(aside->deaths < PIDS, aside->deaths);
    aside->dead[aside->deaths] = pid;
    __atomic_fetch_add(&aside->deaths, 1, __ATOMIC_SEQ_CST);
    snprintf(name, sizeof name, "of %u", number);
    if (ivshmem_find(&parent->member.area, name, &found) == 0) {
        ivshmem_channel_open(&parent->channel, &parent->member.area, &found);
        CHECK(ivshmem_remove(&parent->member, &parent->channel, 0) == 0, 0);
    }
}

int main(int argc, char **argv)
{
    long rounds = argc > 1 ? atol(argv[1]) : 1000, kills = argc > 2 ? atol(argv[2]) : 0;
    struct ivshmem_memory memory = {NULL, SIZE, IVSHMEM_WRITE_BACK, 0};
    struct ivshmem_area area;
    struct peer parent;
    pid_t pids[MANY + 1];
    region = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    aside = mmap(NULL, sizeof *aside, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (region == MAP_FAILED || aside == MAP_FAILED)
        return 2;
    memory.start = region;
    CHECK(ivshmem_area_make(&area, &memory, 8192, SIZE / 8, PLACES, RECORDS) == 0, 0);
    CHECK(area.units <= UNITS, area.units);
    CHECK(join(&parent) == 0, 0);
    parent.member.lease = 50; /* after which a process that was killed while it joined has no place */
    for (uint32_t i = 1; i <= MANY; i++)
        pids[i] = begin(i, kills ? INT32_MAX : rounds, kills != 0);
    for (long i = 0; i < kills; i++) {
        uint32_t number = 1 + (uint32_t)(draw() % MANY);
        int status;
        usleep((useconds_t)(draw() % 500));
        ivshmem_beat(&parent.member);
        kill(pids[number], SIGKILL);
        CHECK(waitpid(pids[number], &status, 0) == pids[number], errno);
        CHECK(WIFSIGNALED(status), WEXITSTATUS(status));
        bury(&parent, number, pids[number]);
        pids[number] = begin(number, INT32_MAX, 1);
    }
    for (uint32_t i = 1; i <= MANY; i++) {
        int status;
        if (kills)
            kill(pids[i], SIGKILL);
        CHECK(waitpid(pids[i], &status, 0) == pids[i], errno);
        if (kills && WIFSIGNALED(status))
            bury(&parent, i, pids[i]);
        else
            CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, status);
    }
    for (int i = 0; i < 3000 && count_free_places(&area) < PLACES - 1; i++) {
        ivshmem_beat(&parent.member);
        usleep(10000);
    }
    ivshmem_records_sweep(&area);
    CHECK(count_free_units(&area) == area.units, area.units - count_free_units(&area));
    CHECK(count_free_places(&area) == PLACES - 1, count_free_places(&area));
    CHECK(aside->created[1] + aside->created[2] + aside->created[3] > 0, 0);
    printf("ended well: %llu created, %llu refused\n",
           (unsigned long long)(aside->created[1] + aside->created[2] + aside->created[3]),
           (unsigned long long)aside->refused);
    return 0;
}
