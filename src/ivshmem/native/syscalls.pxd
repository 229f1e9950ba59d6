# System calls, constants and structures that Cython's own libc and posix packages lack.
# All of it is Linux: eventfd(2), epoll(7), sendmmsg(2), recvmmsg(2), unix(7), preadv2(2),
# madvise(2), io_submit(2).

from cpython.ref cimport PyObject
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t


cdef extern from "<errno.h>" nogil:
    int errno
    enum: EAGAIN, ECANCELED, EINTR, EINVAL, EIO, ENOSYS, ESHUTDOWN


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
    long sysconf(int name)
    enum: _SC_PAGESIZE


cdef extern from "<fcntl.h>" nogil:
    int fcntl(int fd, int command, int flags)
    enum: F_SETFL, O_RDWR, O_NONBLOCK


cdef extern from "<sys/stat.h>" nogil:
    struct file_stat "stat":
        unsigned long st_dev
        unsigned long st_ino


cdef extern from *:
    """
    #include <sys/stat.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    /* glibc has fstat(2) as a symbol since 2.33 only, and wheels are for 2.28. */
    static inline int ivshmem_fstat(int fd, struct stat *status)
    {
    #if defined(__x86_64__) || defined(__aarch64__) /* the kernel's structure is glibc's */
        return (int)syscall(SYS_fstat, fd, status);
    #else
        return fstat(fd, status);
    #endif
    }
    """
    int c_fstat "ivshmem_fstat"(int fd, file_stat *status) nogil


cdef extern from "<sys/eventfd.h>" nogil:
    int c_eventfd "eventfd"(unsigned int initial, int flags)
    int eventfd_read(int fd, uint64_t *value)
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
    enum: POLLIN, POLLOUT


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
    enum: EPOLLIN, EPOLLOUT, EPOLLERR, EPOLLHUP, EPOLLET


cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len
    ssize_t preadv2(int fd, const iovec *iov, int count, long offset, int flags)
    ssize_t readv(int fd, const iovec *iov, int count)
    ssize_t writev(int fd, const iovec *iov, int count)
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
    int mlock(const void *address, size_t size)
    void *mmap(void *address, size_t size, int protection, int flags, int fd, int64_t offset)
    int munmap(void *address, size_t size)
    int madvise(void *address, size_t size, int advice)
    int mincore(void *address, size_t size, unsigned char *pages)
    void *MAP_FAILED
    enum: MAP_SHARED, MAP_PRIVATE, MAP_ANONYMOUS, PROT_NONE, PROT_READ, PROT_WRITE


cdef extern from *:
    """
    #include <sys/socket.h>

    /* The control buffer of a message, which carries one descriptor. On 64-bit machines
       CMSG_SPACE(sizeof(int)) has room for a second one: a receiver must look at cmsg_len. */
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

    /* Faults a page in for writing, and changes nothing that another process may be writing. */
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
    static inline long ivshmem_io_destroy(aio_context_t context)
    {
        return syscall(SYS_io_destroy, context);
    }

    /* A context is the address of its ring, in which the kernel notes each request that has ended.
       The ring begins with these fields. libaio relies on that as well. */
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

    /* Takes the ends of `count` requests off the ring. There must be no other requests. They end
       within io_submit, so it is enough to advance the ring's head, which user space may do. That
       saves a system call, a third of the time. */
    static inline void ivshmem_io_forget(aio_context_t context, long count)
    {
        struct ivshmem_aio_ring *ring = (struct ivshmem_aio_ring *)context;
        struct io_event ends[64];
        if (ivshmem_io_has_ring(context)) {
            unsigned tail = __atomic_load_n(&ring->tail, __ATOMIC_ACQUIRE);
            if ((tail + ring->nr - ring->head) % ring->nr == (unsigned)count) {
                __atomic_store_n(&ring->head, tail, __ATOMIC_RELEASE);
                return;
            }
        }
        while (count > 0) {
            long n = syscall(SYS_io_getevents, context, 1L, count < 64 ? count : 64L, ends, NULL);
            count -= n > 0 ? n : 0;
        }
    }
    """
    long ivshmem_io_setup(unsigned int events, aio_context_t *context) nogil
    long ivshmem_io_submit(aio_context_t context, long count, iocb **requests) nogil
    long ivshmem_io_destroy(aio_context_t context) nogil
    bint ivshmem_io_has_ring(aio_context_t context) nogil
    bint ivshmem_io_any_end(aio_context_t context) nogil
    void ivshmem_io_forget(aio_context_t context, long count) nogil


cdef extern from *:
    """
    #include <stdint.h>

    /* All stores before this line, also write-combined ones, come before the stores after it. */
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

    /* A device's registers are little-endian. Each access is one load or store. */
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
    """
    uint32_t ivshmem_load32(const void *address) nogil
    void ivshmem_store32(void *address, uint32_t value) nogil


cdef extern from *:
    r"""
    #include <stdint.h>

    /* One operation on a word of 64 bits, or of 32 if not `wide`. */
    #define IVSHMEM_ON(operation, ...)                    \
        (wide ? operation((uint64_t *)word, __VA_ARGS__)  \
              : operation((uint32_t *)word, __VA_ARGS__))

    /* The compilers treat an order that is not a constant as seq_cst. So each order has a case. */
    static inline uint64_t word_load(void *word, int wide, int order)
    {
        switch (order) {
        case __ATOMIC_RELAXED: return IVSHMEM_ON(__atomic_load_n, __ATOMIC_RELAXED);
        case __ATOMIC_ACQUIRE: return IVSHMEM_ON(__atomic_load_n, __ATOMIC_ACQUIRE);
        default: return IVSHMEM_ON(__atomic_load_n, __ATOMIC_SEQ_CST);
        }
    }
    static inline void word_store(void *word, int wide, uint64_t value, int order)
    {
        switch (order) {
        case __ATOMIC_RELAXED: IVSHMEM_ON(__atomic_store_n, value, __ATOMIC_RELAXED); break;
        case __ATOMIC_RELEASE: IVSHMEM_ON(__atomic_store_n, value, __ATOMIC_RELEASE); break;
        default: IVSHMEM_ON(__atomic_store_n, value, __ATOMIC_SEQ_CST);
        }
    }

    /* Operations that change the word and return its old value. */
    #define IVSHMEM_CHANGE(name, operation)                                                      \
        static inline uint64_t name(void *word, int wide, uint64_t value, int order)             \
        {                                                                                        \
            switch (order) {                                                                     \
            case __ATOMIC_RELAXED: return IVSHMEM_ON(operation, value, __ATOMIC_RELAXED);        \
            case __ATOMIC_ACQUIRE: return IVSHMEM_ON(operation, value, __ATOMIC_ACQUIRE);        \
            case __ATOMIC_RELEASE: return IVSHMEM_ON(operation, value, __ATOMIC_RELEASE);        \
            case __ATOMIC_ACQ_REL: return IVSHMEM_ON(operation, value, __ATOMIC_ACQ_REL);        \
            default: return IVSHMEM_ON(operation, value, __ATOMIC_SEQ_CST);                      \
            }                                                                                    \
        }
    IVSHMEM_CHANGE(word_exchange, __atomic_exchange_n)
    IVSHMEM_CHANGE(word_add, __atomic_fetch_add)
    IVSHMEM_CHANGE(word_sub, __atomic_fetch_sub)
    IVSHMEM_CHANGE(word_and, __atomic_fetch_and)
    IVSHMEM_CHANGE(word_or, __atomic_fetch_or)
    IVSHMEM_CHANGE(word_xor, __atomic_fetch_xor)

    /* If the word is not as expected, it is only loaded, and a load cannot have release order. */
    #define IVSHMEM_COMPARE(type, order, otherwise)                                              \
        {                                                                                        \
            type seen = (type)expected;                                                          \
            __atomic_compare_exchange_n((type *)word, &seen, (type)desired, 0, order, otherwise); \
            return seen;                                                                         \
        }
    #define IVSHMEM_CASE(order, otherwise)                                                       \
        case order:                                                                              \
            if (wide)                                                                            \
                IVSHMEM_COMPARE(uint64_t, order, otherwise)                                      \
            IVSHMEM_COMPARE(uint32_t, order, otherwise)
    static inline uint64_t word_compare_exchange(void *word, int wide, uint64_t expected,
                                                    uint64_t desired, int order)
    {
        switch (order) {
            IVSHMEM_CASE(__ATOMIC_RELAXED, __ATOMIC_RELAXED)
            IVSHMEM_CASE(__ATOMIC_ACQUIRE, __ATOMIC_ACQUIRE)
            IVSHMEM_CASE(__ATOMIC_RELEASE, __ATOMIC_RELAXED)
            IVSHMEM_CASE(__ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)
        default:
            IVSHMEM_CASE(__ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)
        }
    }
    """
    enum:
        RELAXED "__ATOMIC_RELAXED"
        ACQUIRE "__ATOMIC_ACQUIRE"
        RELEASE "__ATOMIC_RELEASE"
        ACQ_REL "__ATOMIC_ACQ_REL"
        SEQ_CST "__ATOMIC_SEQ_CST"
    uint64_t word_load(void *word, bint wide, int order) noexcept nogil
    void word_store(void *word, bint wide, uint64_t value, int order) noexcept nogil
    uint64_t word_exchange(void *word, bint wide, uint64_t value, int order) noexcept nogil
    uint64_t word_add(void *word, bint wide, uint64_t value, int order) noexcept nogil
    uint64_t word_sub(void *word, bint wide, uint64_t value, int order) noexcept nogil
    uint64_t word_and(void *word, bint wide, uint64_t value, int order) noexcept nogil
    uint64_t word_or(void *word, bint wide, uint64_t value, int order) noexcept nogil
    uint64_t word_xor(void *word, bint wide, uint64_t value, int order) noexcept nogil
    uint64_t word_compare_exchange(
        void *word, bint wide, uint64_t expected, uint64_t desired, int order
    ) noexcept nogil


cdef extern from *:
    """
    /* One word that counts the calls which use an object without the GIL, and says whether the
       object is closing. The last user of a closing object frees it. Because it is one word, no
       order of events frees the object twice, or never. */
    #define IVSHMEM_CLOSING (1u << 31)

    /* Count one user more; 0: the object is closing. */
    static inline int ivshmem_enter(unsigned int *state)
    {
        unsigned int seen = __atomic_load_n(state, __ATOMIC_RELAXED);
        do {
            if (seen & IVSHMEM_CLOSING)
                return 0;
        } while (!__atomic_compare_exchange_n(state, &seen, seen + 1, 1, __ATOMIC_ACQUIRE,
                                              __ATOMIC_RELAXED));
        return 1;
    }
    /* Count one user less; 1: the caller must free the object. */
    static inline int ivshmem_leave(unsigned int *state)
    {
        return __atomic_sub_fetch(state, 1, __ATOMIC_ACQ_REL) == IVSHMEM_CLOSING;
    }
    /* Admit no more users; 1: the caller must free the object. */
    static inline int ivshmem_shut(unsigned int *state)
    {
        return __atomic_fetch_or(state, IVSHMEM_CLOSING, __ATOMIC_ACQ_REL) == 0;
    }
    static inline unsigned int ivshmem_state(const unsigned int *state)
    {
        return __atomic_load_n(state, __ATOMIC_ACQUIRE);
    }

    /* Loads and stores before this line happen before loads and stores after it. If two sides each
       store a word, fence, and then load the other's word, at least one of them sees the other's
       store. */
    static inline void ivshmem_fence(void)
    {
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
    }

    /* Adds to a number, and returns the sum. This is a full barrier. On x86 the locked instruction
       is one by itself. On arm64 without LSE a later load can pass the addition's store. */
    static inline int ivshmem_count(int *number, int amount)
    {
    #if defined(__x86_64__) || defined(__i386__)
        return __atomic_add_fetch(number, amount, __ATOMIC_SEQ_CST);
    #else
        int result;
        ivshmem_fence();
        result = __atomic_add_fetch(number, amount, __ATOMIC_SEQ_CST);
        ivshmem_fence();
        return result;
    #endif
    }

    /* For an array that grows while other threads read it without a lock. A reader that sees a
       length finds that many elements. A reader that sees a new address finds the old elements
       there. */
    static inline Py_ssize_t ivshmem_length(const Py_ssize_t *length)
    {
        return __atomic_load_n(length, __ATOMIC_ACQUIRE);
    }
    static inline void ivshmem_set_length(Py_ssize_t *length, Py_ssize_t value)
    {
        __atomic_store_n(length, value, __ATOMIC_RELEASE);
    }
    static inline int *ivshmem_elements(int *const *elements)
    {
        return __atomic_load_n(elements, __ATOMIC_ACQUIRE);
    }
    static inline void ivshmem_set_elements(int **elements, int *value)
    {
        __atomic_store_n(elements, value, __ATOMIC_RELEASE);
    }

    /* Tells the processor that a loop waits for memory. */
    static inline void ivshmem_pause(void)
    {
    #if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
    #elif defined(__aarch64__)
        __asm__ __volatile__("yield" ::: "memory");
    #endif
    }
    """
    enum: IVSHMEM_CLOSING
    bint ivshmem_enter(unsigned int *state) nogil
    bint ivshmem_leave(unsigned int *state) nogil
    bint ivshmem_shut(unsigned int *state) nogil
    unsigned int ivshmem_state(const unsigned int *state) nogil
    void ivshmem_fence() nogil
    int ivshmem_count(int *number, int amount) nogil
    Py_ssize_t ivshmem_length(const Py_ssize_t *length) nogil
    void ivshmem_set_length(Py_ssize_t *length, Py_ssize_t value) nogil
    int *ivshmem_elements(int **elements) nogil
    void ivshmem_set_elements(int **elements, int *value) nogil
    void ivshmem_pause() nogil


cdef extern from *:
    """
    /* If there are no users, admit no more. Returns the state before; 0: the caller must free. */
    static inline unsigned int ivshmem_shut_unused(unsigned int *state)
    {
        unsigned int seen = 0;
        __atomic_compare_exchange_n(state, &seen, IVSHMEM_CLOSING, 0, __ATOMIC_ACQ_REL,
                                    __ATOMIC_ACQUIRE);
        return seen;
    }

    /* ivshmem_enter and ivshmem_leave for a call that keeps the GIL. While it does, no other thread
       can close the object. So only a Python without a GIL has to count such calls. */
    static inline int ivshmem_enter_held(unsigned int *state)
    {
    #ifdef Py_GIL_DISABLED
        return ivshmem_enter(state);
    #else
        return !(*state & IVSHMEM_CLOSING);
    #endif
    }
    static inline int ivshmem_leave_held(unsigned int *state)
    {
    #ifdef Py_GIL_DISABLED
        return ivshmem_leave(state);
    #else
        (void)state;
        return 0;
    #endif
    }
    """
    unsigned int ivshmem_shut_unused(unsigned int *state) nogil
    bint ivshmem_enter_held(unsigned int *state) nogil
    bint ivshmem_leave_held(unsigned int *state) nogil


cdef extern from *:
    """
    #ifdef IVSHMEM_LIMITED_API /* see limited_api.h */
    #define PyBytes_AS_STRING PyBytes_AsString
    #define PyFloat_AS_DOUBLE PyFloat_AsDouble
    /* Cython takes fast calls only from 3.12 on. Without them each call makes a tuple and a dict,
       which takes 60 ns. */
    #undef CYTHON_VECTORCALL
    #define CYTHON_VECTORCALL 1
    #undef __Pyx_METH_FASTCALL
    #define __Pyx_METH_FASTCALL METH_FASTCALL
    #undef __Pyx_PyCFunction_FastCall
    #define __Pyx_PyCFunction_FastCall __Pyx_PyCFunctionFast
    #undef __Pyx_PyCFunction_FastCallWithKeywords
    #define __Pyx_PyCFunction_FastCallWithKeywords __Pyx_PyCFunctionFastWithKeywords
    #undef __pyx_vectorcallfunc
    #define __pyx_vectorcallfunc vectorcallfunc
    #undef __Pyx_PY_VECTORCALL_ARGUMENTS_OFFSET
    #define __Pyx_PY_VECTORCALL_ARGUMENTS_OFFSET PY_VECTORCALL_ARGUMENTS_OFFSET
    #undef __Pyx_PyVectorcall_NARGS
    #define __Pyx_PyVectorcall_NARGS(n) PyVectorcall_NARGS((size_t)(n))
    #endif
    """


cdef extern from "Python.h":
    Py_ssize_t PyNumber_AsSsize_t(object number, PyObject *error) except? -1  # NULL: it clips


cdef extern from *:
    """
    #ifdef IVSHMEM_LIMITED_API
    /* Not in the limited API, and weak for that reason: where one is missing, there is never known
       to be a single thread. CPython 3.10 to 3.15 have all four. */
    #pragma weak PyInterpreterState_Head
    #pragma weak PyInterpreterState_Next
    #pragma weak PyInterpreterState_ThreadHead
    #pragma weak PyThreadState_Next
    PyInterpreterState *PyInterpreterState_Head(void);
    PyInterpreterState *PyInterpreterState_Next(PyInterpreterState *);
    PyThreadState *PyInterpreterState_ThreadHead(PyInterpreterState *);
    PyThreadState *PyThreadState_Next(PyThreadState *);
    #endif

    /* Whether this is the only Python thread, so that no other can wait for the interpreter. */
    static inline int ivshmem_is_only_thread(void)
    {
    #ifdef Py_GIL_DISABLED
        return 0; /* there is no GIL: to release it costs nothing */
    #endif
    #ifdef IVSHMEM_LIMITED_API
        if (!PyInterpreterState_Head || !PyInterpreterState_Next
            || !PyInterpreterState_ThreadHead || !PyThreadState_Next)
            return 0;
    #endif
        PyInterpreterState *interpreter = PyInterpreterState_Head();
        return PyInterpreterState_Next(interpreter) == NULL
               && PyThreadState_Next(PyInterpreterState_ThreadHead(interpreter)) == NULL;
    }
    """
    bint ivshmem_is_only_thread()


cdef extern from *:
    """
    #include <sched.h>
    #include <signal.h>
    #include <sys/prctl.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    /* fork(2), but parent and child have one table of descriptors. What either of them opens or
       closes is open or closed in both. glibc keeps the thread's number at an address that the
       kernel clears at the thread's end. The child needs its own number there, as after fork.
       (Kernels without checkpoint/restore do not tell the address. Only raise(3) would need it.) */
    static inline long ivshmem_fork_sharing_files(void)
    {
        int *tid = 0;
        unsigned long flags = CLONE_FILES | SIGCHLD;
        if (prctl(PR_GET_TID_ADDRESS, &tid) == 0 && tid != 0)
            flags |= CLONE_CHILD_SETTID | CLONE_CHILD_CLEARTID;
    #if defined(__x86_64__)
        return syscall(SYS_clone, flags, 0L, 0L, tid, 0L);
    #else /* CONFIG_CLONE_BACKWARDS: the last two arguments are swapped */
        return syscall(SYS_clone, flags, 0L, 0L, 0L, tid);
    #endif
    }
    """
    long ivshmem_fork_sharing_files()


cdef extern from "Python.h":
    void PyOS_BeforeFork()
    void PyOS_AfterFork_Parent()
    void PyOS_AfterFork_Child()
