/* The floor of doorbell round trips: an endpoint in C, in a guest or on the host.
 *
 *   roundtrip guest ADDRESS      a guest's device, by vfio: 0000:00:05.0
 *   roundtrip client SOCKET      a host process, connected to a server
 *
 * Prints "READY ID", then obeys lines of its standard input, until that ends:
 *
 *   ping PEER ROUNDS             rings the peer and waits for its answer, so many times; prints
 *                                "TOOK P50 P99", in nanoseconds for each round trip
 *   echo PEER                    answers each ring, until a signal ends the process
 *
 * Only vector 0 is used. roundtrip.py is the same by way of the library.
 */

#include "peer.h"

#include <inttypes.h>
#include <time.h>

enum { WARM_UP = 200, KNOCK_MS = 100 };

static int64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

static int ascending(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

/* The other end's QEMU may not know of this one yet, and drop its answer: ring until one comes. */
static void knock(int64_t peer, int fd)
{
    do {
        ring(peer, fd);
    } while (poll_own(KNOCK_MS) == 0);
    do {
        wait_ring();
    } while (poll_own(KNOCK_MS) == 1);
}

static void ping(int64_t peer, long rounds)
{
    int fd = registers ? -1 : bell(peer);
    int64_t *took = calloc(rounds, sizeof *took);
    knock(peer, fd);
    for (long i = 0; i < WARM_UP; i++) {
        ring(peer, fd);
        wait_ring();
    }
    int64_t before = now(), after;
    for (long i = 0; i < rounds; i++) {
        ring(peer, fd);
        wait_ring();
        after = now();
        took[i] = after - before;
        before = after;
    }
    qsort(took, rounds, sizeof *took, ascending);
    printf("TOOK %" PRId64 " %" PRId64 "\n", took[rounds / 2], took[rounds * 99 / 100]);
    free(took);
}

static void echo(int64_t peer)
{
    int fd = registers ? -1 : bell(peer);
    while (1) {
        wait_ring();
        ring(peer, fd);
    }
}

int main(int argc, char **argv)
{
    char line[64];
    long peer, rounds;
    setlinebuf(stdout);
    if (argc != 3 || !open_peer(argv[1], argv[2]))
        return 2;
    printf("READY %" PRId64 "\n", id);
    while (fgets(line, sizeof line, stdin)) {
        if (sscanf(line, "ping %ld %ld", &peer, &rounds) == 2 && peer >= 0 && peer < PEERS)
            ping(peer, rounds);
        else if (sscanf(line, "echo %ld", &peer) == 1 && peer >= 0 && peer < PEERS)
            echo(peer);
        else
            return 2;
    }
    return 0;
}
