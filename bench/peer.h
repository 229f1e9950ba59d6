/* A peer in C without the package: a guest's device by vfio, or a client of the server.
 *
 * Knows: opening it, ringing a peer's vector 0, waiting for its own. Does not know: what rings mean.
 *
 * A guest waits by a blocking read of an eventfd of its own, the fastest way there is. A client's
 * eventfds are shared and O_NONBLOCK, by protocol: it polls, then reads.
 */
#ifndef PEER_H
#define PEER_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <fcntl.h>
#include <inttypes.h>
#include <linux/vfio.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { PEERS = 65536, ID = 2, DOORBELL = 3, PCI_COMMAND = 4, PCI_COMMAND_MASTER = 4 };

static volatile uint32_t *registers; /* of BAR0; NULL on the host */
static int bells[PEERS];             /* on the host: the eventfd of each peer's vector 0; or 0 */
static int server = -1;              /* on the host: the socket */
static int own;                      /* the eventfd of the own vector 0 */
static int64_t id;
static unsigned char *memory; /* the region */
static size_t memory_size;

static void check(int ok, const char *what)
{
    if (!ok) {
        perror(what);
        exit(1);
    }
}

/* -- a guest's device ------------------------------------------------------------------------- */

static void sysfs_write(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY);
    check(fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text), path);
    close(fd);
}

/* Gives the device to vfio-pci, unless it has it; returns its IOMMU group's number. */
static int bind_device(const char *address)
{
    char path[128], target[128];
    ssize_t n;
    snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/driver_override", address);
    sysfs_write(path, "vfio-pci");
    snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/driver", address);
    if (access(path, F_OK) < 0)
        sysfs_write("/sys/bus/pci/drivers_probe", address);
    snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/iommu_group", address);
    n = readlink(path, target, sizeof target - 1);
    check(n > 0, path);
    target[n] = 0;
    return atoi(strrchr(target, '/') + 1);
}

static struct vfio_region_info region(int device, unsigned index)
{
    struct vfio_region_info info = { .argsz = sizeof info, .index = index };
    check(ioctl(device, VFIO_DEVICE_GET_REGION_INFO, &info) == 0, "region info");
    return info;
}

/* All vectors in one call, as vfio cannot add to those that are enabled; returns vector 0's. */
static int listen_to_all(int device)
{
    struct vfio_irq_info info = { .argsz = sizeof info, .index = VFIO_PCI_MSIX_IRQ_INDEX };
    check(ioctl(device, VFIO_DEVICE_GET_IRQ_INFO, &info) == 0 && info.count, "interrupts");
    size_t size = sizeof(struct vfio_irq_set) + info.count * sizeof(int32_t);
    struct vfio_irq_set *set = calloc(1, size);
    int32_t *fds = (int32_t *)set->data;
    set->argsz = size;
    set->flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
    set->index = VFIO_PCI_MSIX_IRQ_INDEX;
    set->count = info.count;
    for (unsigned i = 0; i < info.count; i++)
        check((fds[i] = eventfd(0, EFD_CLOEXEC)) >= 0, "eventfd");
    check(ioctl(device, VFIO_DEVICE_SET_IRQS, set) == 0, "set interrupts");
    int first = fds[0];
    free(set);
    return first;
}

static void open_device(const char *address)
{
    char path[64];
    uint16_t command;
    struct vfio_group_status status = { .argsz = sizeof status };
    int container = open("/dev/vfio/vfio", O_RDWR | O_CLOEXEC), group, device;
    check(container >= 0, "/dev/vfio/vfio");
    snprintf(path, sizeof path, "/dev/vfio/%d", bind_device(address));
    check((group = open(path, O_RDWR | O_CLOEXEC)) >= 0, path);
    check(ioctl(group, VFIO_GROUP_GET_STATUS, &status) == 0, "group status");
    check(status.flags & VFIO_GROUP_FLAGS_VIABLE, "viable group");
    check(ioctl(group, VFIO_GROUP_SET_CONTAINER, &container) == 0, "container");
    check(ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU) == 0, "IOMMU");
    check((device = ioctl(group, VFIO_GROUP_GET_DEVICE_FD, address)) >= 0, "device");

    struct vfio_region_info bar = region(device, VFIO_PCI_BAR0_REGION_INDEX);
    registers = mmap(NULL, bar.size, PROT_READ | PROT_WRITE, MAP_SHARED, device, bar.offset);
    check(registers != MAP_FAILED, "mmap of BAR0");
    bar = region(device, VFIO_PCI_BAR2_REGION_INDEX);
    memory_size = bar.size;
    memory = mmap(NULL, bar.size, PROT_READ | PROT_WRITE, MAP_SHARED, device, bar.offset);
    check(memory != MAP_FAILED, "mmap of BAR2");
    own = listen_to_all(device);

    /* vfio clears the bus-master bit, and without it no interrupt reaches the processor. */
    off_t at = region(device, VFIO_PCI_CONFIG_REGION_INDEX).offset + PCI_COMMAND;
    check(pread(device, &command, sizeof command, at) == sizeof command, "command register");
    command |= PCI_COMMAND_MASTER;
    check(pwrite(device, &command, sizeof command, at) == sizeof command, "bus master");
    id = registers[ID];
}

/* -- a client of the server ------------------------------------------------------------------- */

/* One message of protocol version 0; returns its descriptor, or -1. */
static int receive(int64_t *value)
{
    char control[CMSG_SPACE(sizeof(int))], *at = (char *)value;
    int fd = -1;
    for (size_t left = sizeof *value; left;) {
        struct iovec iov = { at, left };
        struct msghdr message = { .msg_iov = &iov,
                                  .msg_iovlen = 1,
                                  .msg_control = control,
                                  .msg_controllen = sizeof control };
        ssize_t n = recvmsg(server, &message, MSG_CMSG_CLOEXEC);
        check(n > 0 && !(message.msg_flags & MSG_CTRUNC), "recvmsg");
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        if (header)
            memcpy(&fd, CMSG_DATA(header), sizeof fd);
        at += n;
        left -= n;
    }
    return fd;
}

/* A message of a vector: keeps a peer's first one, and forgets peers that leave. */
static void take_message(int64_t peer, int fd)
{
    check(peer >= 0 && peer < PEERS, "peer id");
    if (fd >= 0 && bells[peer] == 0) {
        bells[peer] = fd;
    } else if (fd >= 0) {
        close(fd);
    } else if (bells[peer]) {
        close(bells[peer]);
        bells[peer] = 0;
    }
}

static void connect_to(const char *path)
{
    struct sockaddr_un name = { .sun_family = AF_UNIX };
    struct stat status;
    int64_t value;
    int fd;
    strncpy(name.sun_path, path, sizeof name.sun_path - 1);
    server = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    check(connect(server, (struct sockaddr *)&name, sizeof name) == 0, path);
    receive(&value);
    check(value == 0, "protocol version 0");
    receive(&id);
    fd = receive(&value); /* the memory */
    check(fd >= 0 && fstat(fd, &status) == 0, "the memory");
    memory_size = status.st_size;
    memory = mmap(NULL, memory_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    check(memory != MAP_FAILED, "mmap of the memory");
    close(fd);
    do {
        fd = receive(&value);
        take_message(value, fd);
    } while (value != id);
    own = bells[id];
}

/* The eventfd of a peer, which may have to be announced yet. */
static int bell(int64_t peer)
{
    while (bells[peer] == 0) {
        int64_t value;
        int fd = receive(&value);
        take_message(value, fd);
    }
    return bells[peer];
}

/* -- both ------------------------------------------------------------------------------------- */

static inline void ring(int64_t peer, int fd)
{
    uint64_t one = 1;
    if (registers)
        registers[DOORBELL] = (uint32_t)peer << 16;
    else
        check(write(fd, &one, sizeof one) == sizeof one, "ring");
}

static int poll_own(int milliseconds)
{
    struct pollfd event = { own, POLLIN, 0 };
    return poll(&event, 1, milliseconds);
}

static inline void take_rings(void)
{
    uint64_t count;
    check(read(own, &count, sizeof count) == sizeof count, "wait");
}

static inline void wait_ring(void)
{
    if (!registers)
        check(poll_own(-1) == 1, "poll");
    take_rings();
}

/* ROLE guest ADDRESS, or client SOCKET; whether it is one of the two. */
static int open_peer(const char *role, const char *where)
{
    if (strcmp(role, "guest") == 0)
        open_device(where);
    else if (strcmp(role, "client") == 0)
        connect_to(where);
    else
        return 0;
    return 1;
}

#endif
