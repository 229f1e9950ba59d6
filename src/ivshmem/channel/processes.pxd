"""Internal: whether a process of this PID namespace has ended, in C, because the beat has no GIL.

Knows: /proc and kill(2). Does not know: places.
"""

from libc.stdint cimport uint64_t

cdef extern from *:
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <signal.h>
    #include <stdio.h>
    #include <stdlib.h>
    #include <string.h>
    #include <unistd.h>

    /* Read what /proc says of a process of this PID namespace, into `text`. Return the end of its
       name, which the program chooses; NULL: there is no such process. */
    static char *ivshmem_process_name_end(uint64_t process, char *text, size_t room)
    {
        char path[40];
        int fd;
        ssize_t size;
        snprintf(path, sizeof path, "/proc/%lu/stat", (unsigned long)process);
        fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0)
            return NULL;
        size = read(fd, text, room - 1);
        close(fd);
        if (size <= 0)
            return NULL;
        text[size] = 0;
        return strrchr(text, ')');
    }

    /* When a process started, in clock ticks, modulo 2^40; 0: unknown. */
    static uint64_t ivshmem_process_start(uint64_t process)
    {
        char text[512], *at = ivshmem_process_name_end(process, text, sizeof text);
        for (int field = 2; at != NULL && field < 22; field++)
            at = strchr(at + 1, ' ');
        return at == NULL ? 0 : strtoull(at + 1, NULL, 10) & ((UINT64_C(1) << 40) - 1);
    }

    /* Whether a process has ended and its parent has yet to ask how: a zombie without threads. */
    static int ivshmem_process_is_zombie(uint64_t process)
    {
        char text[512], state = 0, *at = ivshmem_process_name_end(process, text, sizeof text);
        long threads = 0;
        if (at == NULL || sscanf(at + 1, " %c %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s"
                                 " %*s %*s %*s %ld", &state, &threads) != 2)
            return 0;
        /* The first thread of a process can end before the others, which still store. */
        return (state == 'Z' || state == 'X') && threads <= 1;
    }

    /* Whether a process has ended. kill(2) tells it also where /proc hides other users' processes;
       a number that is in use again has another start. */
    static int ivshmem_process_ended(void *context, uint64_t process, uint64_t started)
    {
        uint64_t now;
        (void)context;
        if (process == 0 || process > INT32_MAX)
            return 0;
        if (kill((pid_t)process, 0) < 0 && errno == ESRCH)
            return 1;
        now = ivshmem_process_start(process);
        return (now != 0 && started != 0 && now != started) || ivshmem_process_is_zombie(process);
    }
    """
    uint64_t ivshmem_process_start(uint64_t process) nogil
    int ivshmem_process_ended(void *context, uint64_t process, uint64_t started) noexcept nogil
