/* The floor: what the same system calls cost from C, in the same run as the figures of ours.
 *
 *   baseline ring COUNT          eventfd write
 *   baseline wait COUNT          eventfd write, then preadv2(RWF_NOWAIT) of it
 *   baseline send COUNT BATCH    8-byte messages, each with a descriptor, BATCH in a sendmmsg call,
 *                                to a process that takes them and closes the descriptors
 *   baseline tell COUNT PEERS BATCH   the same to so many sockets in turn, BATCH to each, and all of
 *                                them are read only when each has its own, by this process: what
 *                                a server does that tells many peers of one
 *
 * Prints nanoseconds each: of wall time for ring and wait, of the sender's CPU time for send.
 *
 *   baseline trips WAY ROLE THERE HERE
 *
 * One end of a round trip, as src/ivshmem/bench/end.py says: prints "ready", then for each line with
 * a number makes so many trips and writes their nanoseconds as int64_t (ROLE ping), or answers so
 * many rings (ROLE echo). THERE and HERE are inherited descriptors. WAY is one of
 *
 *   block     of two eventfds: write, blocking read
 *   poll      of two eventfds with O_NONBLOCK: write, poll, read
 *   spin      the same: write, read again and again
 *   gently    of two eventfds: a read of /dev/zero by AIO, whose completion rings and never waits,
 *             whatever was done to the eventfd; and epoll_wait for an edge, which takes no count
 *   word      of one file in memory: the other's word is stored to, the own one read again and again
 */

#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MAX_BATCH = 64 };

static double now(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec * 1e9 + t.tv_nsec;
}

static void check(int ok, const char *what)
{
    if (!ok) {
        perror(what);
        exit(1);
    }
}

static double ring(long count, int take)
{
    int fd = eventfd(0, EFD_NONBLOCK);
    uint64_t one = 1, value;
    struct iovec iov = { &value, sizeof value };
    double start = now(CLOCK_MONOTONIC);
    for (long i = 0; i < count; i++) {
        check(write(fd, &one, sizeof one) == sizeof one, "write");
        if (take)
            check(preadv2(fd, &iov, 1, -1, RWF_NOWAIT) == sizeof value, "preadv2");
    }
    return (now(CLOCK_MONOTONIC) - start) / count;
}

union control {
    struct cmsghdr align;
    char bytes[CMSG_SPACE(sizeof(int))];
};

struct batch {
    struct mmsghdr messages[MAX_BATCH];
    struct iovec iov[MAX_BATCH];
    int64_t values[MAX_BATCH];
    union control controls[MAX_BATCH];
};

static void prepare(struct batch *b)
{
    memset(b, 0, sizeof *b);
    for (int i = 0; i < MAX_BATCH; i++) {
        struct msghdr *m = &b->messages[i].msg_hdr;
        b->iov[i] = (struct iovec){ &b->values[i], sizeof b->values[i] };
        m->msg_iov = &b->iov[i];
        m->msg_iovlen = 1;
        m->msg_control = &b->controls[i];
        m->msg_controllen = sizeof b->controls[i];
    }
}

static void take_all(int sock, long count)
{
    struct batch b;
    while (count > 0) {
        prepare(&b);
        int n = recvmmsg(sock, b.messages, MAX_BATCH, MSG_WAITFORONE | MSG_CMSG_CLOEXEC, NULL);
        check(n > 0, "recvmmsg");
        for (int i = 0; i < n; i++)
            close(*(int *)CMSG_DATA(CMSG_FIRSTHDR(&b.messages[i].msg_hdr)));
        count -= n;
    }
}

static double send_all(long count, int batch)
{
    int pair[2], fd = eventfd(0, EFD_NONBLOCK);
    check(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0, "socketpair");
    pid_t child = fork();
    if (child == 0) {
        close(pair[0]);
        take_all(pair[1], count);
        _exit(0);
    }
    struct batch b;
    double start = now(CLOCK_PROCESS_CPUTIME_ID);
    for (long sent = 0; sent < count;) {
        prepare(&b);
        for (int i = 0; i < batch; i++) {
            struct cmsghdr *header = CMSG_FIRSTHDR(&b.messages[i].msg_hdr);
            header->cmsg_len = CMSG_LEN(sizeof(int));
            header->cmsg_level = SOL_SOCKET;
            header->cmsg_type = SCM_RIGHTS;
            memcpy(CMSG_DATA(header), &fd, sizeof fd);
        }
        int wanted = count - sent < batch ? count - sent : batch;
        int n = sendmmsg(pair[0], b.messages, wanted, MSG_DONTWAIT);
        if (n < 0) {
            struct pollfd room = { pair[0], POLLOUT, 0 };
            poll(&room, 1, -1);
            continue;
        }
        sent += n;
    }
    double cost = (now(CLOCK_PROCESS_CPUTIME_ID) - start) / count;
    waitpid(child, NULL, 0);
    return cost;
}

static double tell(long count, int peers, int batch)
{
    int (*pairs)[2] = calloc(peers, sizeof *pairs), fds[MAX_BATCH];
    for (int i = 0; i < batch; i++)
        fds[i] = eventfd(0, EFD_NONBLOCK);
    for (int i = 0; i < peers; i++)
        check(socketpair(AF_UNIX, SOCK_STREAM, 0, pairs[i]) == 0, "socketpair");
    double cost = 0;
    struct batch b;
    long sent = 0;
    while (sent < count) {
        double start = now(CLOCK_PROCESS_CPUTIME_ID);
        for (int p = 0; p < peers; p++) {
            prepare(&b);
            for (int i = 0; i < batch; i++) {
                struct cmsghdr *header = CMSG_FIRSTHDR(&b.messages[i].msg_hdr);
                header->cmsg_len = CMSG_LEN(sizeof(int));
                header->cmsg_level = SOL_SOCKET;
                header->cmsg_type = SCM_RIGHTS;
                memcpy(CMSG_DATA(header), &fds[i], sizeof(int));
            }
            check(sendmmsg(pairs[p][0], b.messages, batch, MSG_DONTWAIT) == batch, "sendmmsg");
        }
        cost += now(CLOCK_PROCESS_CPUTIME_ID) - start;
        for (int p = 0; p < peers; p++)
            take_all(pairs[p][1], batch);
        sent += (long)peers * batch;
    }
    return cost / sent;
}

/* -- round trips ------------------------------------------------------------------------------ */

enum { APART = 128 }; /* bytes between the two words: no common cache line, nor a pair of them */

struct end {
    int there, here;
    uint32_t *their_word, *own_word, turn;
};

static void ring_eventfd(struct end *e)
{
    uint64_t one = 1;
    check(write(e->there, &one, sizeof one) == sizeof one, "write");
}

static void wait_block(struct end *e)
{
    uint64_t value;
    check(read(e->here, &value, sizeof value) == sizeof value, "read");
}

static void wait_poll(struct end *e)
{
    struct pollfd event = { e->here, POLLIN, 0 };
    check(poll(&event, 1, -1) == 1, "poll");
    wait_block(e);
}

static void wait_spin(struct end *e)
{
    uint64_t value;
    while (read(e->here, &value, sizeof value) < 0)
        ;
}

static void ring_gently(struct end *e)
{
    static aio_context_t context;
    static struct iocb call;
    static char byte;
    struct iocb *calls = &call;
    if (context == 0) {
        call.aio_lio_opcode = IOCB_CMD_PREAD;
        call.aio_fildes = open("/dev/zero", O_RDONLY);
        call.aio_buf = (uintptr_t)&byte;
        call.aio_nbytes = 1;
        call.aio_flags = IOCB_FLAG_RESFD;
        call.aio_resfd = e->there;
        check(syscall(SYS_io_setup, 64, &context) == 0, "io_setup");
    }
    check(syscall(SYS_io_submit, context, 1, &calls) == 1, "io_submit");
    uint32_t *ring = (uint32_t *)context; /* id, size, head, tail: what was completed is not read */
    ring[2] = ring[3];
}

static void wait_edge(struct end *e)
{
    static int epoll = -1;
    struct epoll_event event = { .events = EPOLLIN | EPOLLET };
    if (epoll < 0) {
        epoll = epoll_create1(EPOLL_CLOEXEC);
        check(epoll_ctl(epoll, EPOLL_CTL_ADD, e->here, &event) == 0, "epoll_ctl");
    }
    check(epoll_wait(epoll, &event, 1, -1) == 1, "epoll_wait");
}

static void ring_word(struct end *e)
{
    __atomic_store_n(e->their_word, ++e->turn, __ATOMIC_RELEASE);
}

static void wait_word(struct end *e)
{
    static uint32_t seen;
    while (__atomic_load_n(e->own_word, __ATOMIC_ACQUIRE) == seen)
        ;
    seen++;
}

static const struct way {
    const char *name;
    void (*ring)(struct end *), (*wait)(struct end *);
} ways[] = {
    { "block", ring_eventfd, wait_block },
    { "poll", ring_eventfd, wait_poll },
    { "spin", ring_eventfd, wait_spin },
    { "gently", ring_gently, wait_edge },
    { "word", ring_word, wait_word },
};

static int64_t nanoseconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

static void ping(struct end *e, const struct way *way, long count)
{
    int64_t *times = malloc((count + 1) * sizeof *times);
    check(times != NULL, "malloc");
    memset(times, 0, (count + 1) * sizeof *times); /* no page faults while it is measured */
    times[0] = nanoseconds();
    for (long i = 1; i <= count; i++) {
        way->ring(e);
        way->wait(e);
        times[i] = nanoseconds();
    }
    for (long i = 0; i < count; i++)
        times[i] = times[i + 1] - times[i];
    fwrite(times, sizeof *times, count, stdout);
    fflush(stdout);
    free(times);
}

static void echo(struct end *e, const struct way *way, long count)
{
    for (long i = 0; i < count; i++) {
        way->wait(e);
        way->ring(e);
    }
}

static int trips(const char *name, int pings, struct end *e)
{
    const struct way *way = NULL;
    char line[32];
    for (size_t i = 0; i < sizeof ways / sizeof *ways; i++)
        if (!strcmp(name, ways[i].name))
            way = &ways[i];
    if (!way)
        return 2;
    if (way->ring == ring_word) {
        char *memory = mmap(NULL, 2 * APART, PROT_READ | PROT_WRITE, MAP_SHARED, e->there, 0);
        check(memory != MAP_FAILED, "mmap");
        e->their_word = (uint32_t *)(memory + (pings ? 0 : APART));
        e->own_word = (uint32_t *)(memory + (pings ? APART : 0));
    }
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    puts("ready");
    fflush(stdout);
    while (fgets(line, sizeof line, stdin)) {
        if (pings)
            ping(e, way, atol(line));
        else
            echo(e, way, atol(line));
    }
    return 0;
}

int main(int argc, char **argv)
{
    if (argc < 3)
        return 2;
    if (!strcmp(argv[1], "trips") && argc == 6) {
        struct end e = { .there = atoi(argv[4]), .here = atoi(argv[5]) };
        return trips(argv[2], !strcmp(argv[3], "ping"), &e);
    }
    long count = atol(argv[2]);
    if (!strcmp(argv[1], "ring"))
        printf("%.1f\n", ring(count, 0));
    else if (!strcmp(argv[1], "wait"))
        printf("%.1f\n", ring(count, 1));
    else if (!strcmp(argv[1], "send") && argc == 4)
        printf("%.1f\n", send_all(count, atoi(argv[3])));
    else if (!strcmp(argv[1], "tell") && argc == 5)
        printf("%.1f\n", tell(count, atoi(argv[3]), atoi(argv[4])));
    else
        return 2;
    return 0;
}
