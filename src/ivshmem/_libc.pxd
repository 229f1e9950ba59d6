# System calls, constants and structures that Cython's own libc and posix packages lack.
# All of it is Linux: eventfd(2), epoll(7), sendmmsg(2), recvmmsg(2), unix(7), preadv2(2),
# madvise(2), io_submit(2).

from cpython.ref cimport PyObject
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t


cdef extern from "<errno.h>" nogil:
    int errno
    enum: EAGAIN, EINTR, EINVAL, ENOSYS


cdef extern from "<time.h>" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec
    int clock_gettime(int clock, timespec *now)
    enum: CLOCK_MONOTONIC


cdef extern from "<unistd.h>" nogil:
    int c_close "close"(int fd)
    ssize_t c_read "read"(int fd, void *buffer, size_t size)
    ssize_t c_write "write"(int fd, const void *buffer, size_t size)
    ssize_t pread(int fd, void *buffer, size_t size, int64_t offset)
    ssize_t pwrite(int fd, const void *buffer, size_t size, int64_t offset)
    int getpid()


cdef extern from "<sys/eventfd.h>" nogil:
    int c_eventfd "eventfd"(unsigned int initial, int flags)
    enum: EFD_CLOEXEC, EFD_NONBLOCK


cdef extern from "<sys/timerfd.h>" nogil:
    struct itimerspec:
        timespec it_interval
        timespec it_value
    int timerfd_create(int clock, int flags)
    int timerfd_settime(int fd, int flags, const itimerspec *new, itimerspec *old)
    enum: TFD_CLOEXEC, TFD_NONBLOCK


cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int ppoll(pollfd *fds, unsigned long count, const timespec *timeout, const void *sigmask)
    enum: POLLIN


cdef extern from "<sys/epoll.h>" nogil:
    union epoll_data:
        uint64_t u64
    struct epoll_event:
        uint32_t events
        epoll_data data
    int epoll_create1(int flags)
    int epoll_ctl(int epfd, int op, int fd, epoll_event *event)
    int epoll_wait(int epfd, epoll_event *events, int limit, int milliseconds)
    enum: EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_MOD, EPOLL_CTL_DEL
    enum: EPOLLIN, EPOLLOUT, EPOLLERR, EPOLLHUP


cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len
    ssize_t preadv2(int fd, const iovec *iov, int count, long offset, int flags)
    enum: RWF_NOWAIT


cdef extern from "<sys/socket.h>" nogil:
    struct msghdr:
        void *msg_name
        unsigned int msg_namelen
        iovec *msg_iov
        size_t msg_iovlen
        void *msg_control
        size_t msg_controllen
        int msg_flags
    struct mmsghdr:
        msghdr msg_hdr
        unsigned int msg_len
    struct cmsghdr:
        size_t cmsg_len
        int cmsg_level
        int cmsg_type
    int sendmmsg(int fd, mmsghdr *messages, unsigned int count, int flags)
    int recvmmsg(int fd, mmsghdr *messages, unsigned int count, int flags, timespec *timeout)
    cmsghdr *CMSG_FIRSTHDR(msghdr *message)
    cmsghdr *CMSG_NXTHDR(msghdr *message, cmsghdr *control)
    unsigned char *CMSG_DATA(cmsghdr *control)
    size_t CMSG_LEN(size_t size)
    enum: SOL_SOCKET, SCM_RIGHTS
    enum: MSG_DONTWAIT, MSG_NOSIGNAL, MSG_CMSG_CLOEXEC, MSG_CTRUNC


cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *address, size_t size, int protection, int flags, int fd, int64_t offset)
    int munmap(void *address, size_t size)
    int madvise(void *address, size_t size, int advice)
    int mincore(void *address, size_t size, unsigned char *pages)
    void *MAP_FAILED
    enum: MAP_SHARED, PROT_READ, PROT_WRITE


cdef extern from *:
    """
    #include <sys/socket.h>

    /* One message carries one descriptor: this is its control buffer. On 64-bit
       CMSG_SPACE(sizeof(int)) admits a second one: a receiver must look at cmsg_len. */
    typedef union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int))];
    } ivshmem_control;

    /* Since Linux 5.14; older headers lack the name. */
    #ifndef MADV_POPULATE_READ
    #define MADV_POPULATE_READ 22
    #endif
    #ifndef MADV_POPULATE_WRITE
    #define MADV_POPULATE_WRITE 23
    #endif

    /* Faults one page in for writing without changing what another process may be writing there. */
    static inline void ivshmem_touch(volatile char *byte)
    {
        __atomic_fetch_or(byte, 0, __ATOMIC_RELAXED);
    }
    """
    ctypedef union ivshmem_control:
        char bytes[1]
    enum: MADV_POPULATE_READ, MADV_POPULATE_WRITE
    void ivshmem_touch(char *byte) nogil


cdef extern from "<linux/aio_abi.h>" nogil:
    ctypedef unsigned long aio_context_t
    struct iocb:
        uint16_t aio_lio_opcode
        uint32_t aio_fildes
        uint64_t aio_buf
        uint64_t aio_nbytes
        uint32_t aio_flags
        uint32_t aio_resfd
    struct io_event:
        int64_t res
    enum: IOCB_CMD_POLL, IOCB_CMD_PREAD, IOCB_FLAG_RESFD


cdef extern from *:
    """
    #include <linux/aio_abi.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    static inline long ivshmem_io_setup(unsigned int events, aio_context_t *context)
    {
        return syscall(SYS_io_setup, events, context);
    }
    static inline long ivshmem_io_submit(aio_context_t context, long count, struct iocb **requests)
    {
        return syscall(SYS_io_submit, context, count, requests);
    }
    static inline long ivshmem_io_getevents(aio_context_t context, long count,
                                            struct io_event *events)
    {
        return syscall(SYS_io_getevents, context, count, count, events, NULL);
    }
    static inline long ivshmem_io_destroy(aio_context_t context)
    {
        return syscall(SYS_io_destroy, context);
    }

    /* A context is the address of its ring of ends, which begins so; libaio rests on it as well. */
    struct ivshmem_aio_ring {
        unsigned id, nr, head, tail, magic;
    };
    static inline int ivshmem_io_has_ring(aio_context_t context)
    {
        return ((const struct ivshmem_aio_ring *)context)->magic == 0xa10a10a1;
    }
    static inline int ivshmem_io_any_end(aio_context_t context)
    {
        const struct ivshmem_aio_ring *ring = (const struct ivshmem_aio_ring *)context;
        return __atomic_load_n(&ring->tail, __ATOMIC_ACQUIRE) != ring->head;
    }
    """
    long ivshmem_io_setup(unsigned int events, aio_context_t *context) nogil
    long ivshmem_io_submit(aio_context_t context, long count, iocb **requests) nogil
    long ivshmem_io_getevents(aio_context_t context, long count, io_event *events) nogil
    long ivshmem_io_destroy(aio_context_t context) nogil
    bint ivshmem_io_has_ring(aio_context_t context) nogil
    bint ivshmem_io_any_end(aio_context_t context) nogil


cdef extern from *:
    """
    #include <stdint.h>

    /* Everything stored to memory before, write-combined stores too, comes before what follows. */
    static inline void ivshmem_write_barrier(void)
    {
    #if defined(__x86_64__) || defined(__i386__)
        __asm__ __volatile__("sfence" ::: "memory");
    #elif defined(__aarch64__)
        __asm__ __volatile__("dsb st" ::: "memory");
    #else
        __sync_synchronize();
    #endif
    }

    /* A device's registers are little-endian, and one load or store each. */
    static inline uint32_t ivshmem_load32(const void *address)
    {
        uint32_t value = *(const volatile uint32_t *)address;
    #if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
        value = __builtin_bswap32(value);
    #endif
        return value;
    }
    static inline void ivshmem_store32(void *address, uint32_t value)
    {
    #if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
        value = __builtin_bswap32(value);
    #endif
        ivshmem_write_barrier();
        *(volatile uint32_t *)address = value;
    }

    static inline uint64_t ivshmem_load(const void *word)
    {
        return __atomic_load_n((const uint64_t *)word, __ATOMIC_ACQUIRE);
    }
    static inline void ivshmem_store(void *word, uint64_t value)
    {
        __atomic_store_n((uint64_t *)word, value, __ATOMIC_RELEASE);
    }
    static inline uint64_t ivshmem_compare_exchange(void *word, uint64_t expected, uint64_t desired)
    {
        __atomic_compare_exchange_n((uint64_t *)word, &expected, desired, 0, __ATOMIC_SEQ_CST,
                                    __ATOMIC_SEQ_CST);
        return expected;
    }
    static inline uint64_t ivshmem_add(void *word, uint64_t amount)
    {
        return __atomic_fetch_add((uint64_t *)word, amount, __ATOMIC_SEQ_CST);
    }
    """
    uint32_t ivshmem_load32(const void *address) nogil
    void ivshmem_store32(void *address, uint32_t value) nogil
    uint64_t ivshmem_load(const void *word) nogil
    void ivshmem_store(void *word, uint64_t value) nogil
    uint64_t ivshmem_compare_exchange(void *word, uint64_t expected, uint64_t desired) nogil
    uint64_t ivshmem_add(void *word, uint64_t amount) nogil


cdef extern from "Python.h":
    Py_ssize_t PyNumber_AsSsize_t(object number, PyObject *error) except? -1  # NULL: it clips


cdef extern from *:
    """
    /* Whether no other Python thread could want the interpreter. */
    static inline int ivshmem_is_only_thread(void)
    {
        PyInterpreterState *interpreter = PyInterpreterState_Head();
        return PyInterpreterState_Next(interpreter) == NULL
               && PyThreadState_Next(PyInterpreterState_ThreadHead(interpreter)) == NULL;
    }
    """
    bint ivshmem_is_only_thread()
