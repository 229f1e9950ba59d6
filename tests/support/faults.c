/* Makes system calls fail, as they do when memory or descriptors are short; for LD_PRELOAD.
 *
 * The file named by FAULTS is what a test changes while the program runs: for each call in CALLS,
 * in that order, an errno, after how many more calls it comes, and how often.
 */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

enum { ACCEPT, EVENTFD, SENDMMSG, EPOLL_CTL, EPOLL_WAIT, SETSOCKOPT, SHUTDOWN, OPEN, CALLS };

struct fault {
    volatile int error, after, times, seen;
};

static struct fault *faults;

__attribute__((constructor)) static void begin(void)
{
    int fd = open(getenv("FAULTS"), O_RDWR | O_CLOEXEC);
    faults = mmap(NULL, CALLS * sizeof *faults, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (faults == MAP_FAILED)
        _exit(99);
}

static int fails(int call)
{
    struct fault *fault = &faults[call];
    if (fault->times == 0 || fault->after-- > 0)
        return 0;
    fault->times--;
    fault->seen++;
    errno = fault->error;
    return 1;
}

#define REAL(name) ((__typeof__(name) *)dlsym(RTLD_NEXT, #name))
#define WRAP(call, result, name, parameters, arguments)                                            \
    result name parameters { return fails(call) ? -1 : REAL(name) arguments; }

WRAP(ACCEPT, int, accept4, (int fd, struct sockaddr *a, socklen_t *n, int flags), (fd, a, n, flags))
WRAP(EVENTFD, int, eventfd, (unsigned count, int flags), (count, flags))
WRAP(SENDMMSG, int, sendmmsg, (int fd, struct mmsghdr *m, unsigned n, int flags), (fd, m, n, flags))
WRAP(EPOLL_CTL, int, epoll_ctl, (int e, int op, int fd, struct epoll_event *v), (e, op, fd, v))
WRAP(EPOLL_WAIT, int, epoll_wait, (int e, struct epoll_event *v, int n, int ms), (e, v, n, ms))
WRAP(SETSOCKOPT, int, setsockopt, (int fd, int l, int o, const void *v, socklen_t n),
     (fd, l, o, v, n))
WRAP(SHUTDOWN, int, shutdown, (int fd, int how), (fd, how))

int open64(const char *path, int flags, ...)
{
    va_list rest;
    va_start(rest, flags);
    int mode = va_arg(rest, int);
    va_end(rest);
    return fails(OPEN) ? -1 : REAL(open64)(path, flags, mode);
}
