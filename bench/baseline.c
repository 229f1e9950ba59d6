/* The floor: what the same system calls cost from C, in the same run as the figures of ours.
 *
 *   baseline ring COUNT          eventfd write
 *   baseline wait COUNT          eventfd write, then preadv2(RWF_NOWAIT) of it
 *   baseline send COUNT BATCH    8-byte messages, each with a descriptor, BATCH in a sendmmsg call,
 *                                to a process that takes them and closes the descriptors
 *
 * Prints nanoseconds each: of wall time for ring and wait, of the sender's CPU time for send.
 */

#define _GNU_SOURCE
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
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

int main(int argc, char **argv)
{
    if (argc < 3)
        return 2;
    long count = atol(argv[2]);
    if (!strcmp(argv[1], "ring"))
        printf("%.1f\n", ring(count, 0));
    else if (!strcmp(argv[1], "wait"))
        printf("%.1f\n", ring(count, 1));
    else if (!strcmp(argv[1], "send") && argc == 4)
        printf("%.1f\n", send_all(count, atoi(argv[3])));
    else
        return 2;
    return 0;
}
