/* What a program in C finds in the directory of names at a region's end.
 *
 *   directory FD NAME..    the area, and the peers of these names, in the region that FD is
 *   directory hostile COUNT    directories that a hostile peer spoiled
 */
#include "steps.h"

#include <sys/stat.h>

enum { END = 1 << 16, NAMES = 7 };

static int look(int fd, char **names)
{
    struct stat status;
    struct ivshmem_memory memory = {NULL, 0, IVSHMEM_WRITE_BACK, 1};
    struct ivshmem_area area;
    uint64_t offset;
    int code;
    CHECK(fstat(fd, &status) == 0, errno);
    memory.size = (uint64_t)status.st_size;
    memory.start = mmap(NULL, (size_t)memory.size, PROT_READ, MAP_SHARED, fd, 0);
    CHECK(memory.start != MAP_FAILED, errno);
    code = ivshmem_find_area(&memory, &offset);
    if (code == 0)
        code = ivshmem_area_open(&area, &memory, offset);
    if (code == 0)
        printf("area %llu %llu %u %u\n", (unsigned long long)area.at,
               (unsigned long long)area.size, area.places, area.records);
    else
        printf("no area: %d\n", code);
    for (; *names != NULL; names++) {
        struct ivshmem_named named;
        int slot = ivshmem_lookup(&memory, *names, 0, &named);
        if (slot < 0)
            printf("%d\n", slot);
        else
            printf("%u: %u from %u\n", named.peer, named.vectors, named.first_vector);
    }
    return 0;
}

static uint64_t state = 88172645463325252u;

static uint64_t draw(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

static void make_right(uint64_t *words)
{
    unsigned char covered[116];
    memcpy(covered, words, 8);
    memcpy(covered + 8, (unsigned char *)words + 20, 108);
    words[2] = (words[2] & ~UINT64_C(0xffffffff)) | ivshmem_crc32(covered, sizeof covered);
}

/* The pages around the region cannot be touched. */
static int meet_hostile(long count)
{
    const struct ivshmem_memory memory = {region, END, IVSHMEM_WRITE_BACK, 1};
    uint64_t *end = (uint64_t *)(void *)(region + END);
    long areas = 0, found = 0;
    for (fatal = 0; fatal < count; fatal++) {
        uint64_t *trailer = end - 16, offset;
        struct ivshmem_named named;
        int slot;
        memset(trailer, 0, 128);
        trailer[0] = IVSHMEM_NAMES_MAGIC;
        trailer[2] = UINT64_C(1) << 32;
        trailer[3] = draw() % 4 ? NAMES : draw() >> draw() % 64;
        trailer[4] = draw() % 2 ? draw() % END / 4096 * 4096 : draw() << draw() % 64;
        trailer[5] = draw() % 2 ? draw() % END : draw() >> draw() % 64;
        if (draw() % 8 == 0)
            trailer[draw() % 16] = draw();
        for (int i = 1; i <= NAMES; i++) {
            uint64_t *words = trailer - 16 * i;
            for (int j = 0; j < 16; j++)
                words[j] = draw() % 2 ? 0 : draw();
            if (draw() % 2)
                memcpy(words + 4, "name", 5);
            if (draw() % 4 == 0)
                memset(words + 4, 'x', 48);
            if (draw() % 2)
                words[2] = words[2] & 0xffffffff, words[3] = draw() % 3000;
            if (draw() % 8)
                make_right(words);
        }
        if (draw() % 8)
            make_right(trailer);
        if (ivshmem_find_area(&memory, &offset) == 0) {
            CHECK(offset % 4096 == 0 && offset >= 8192, offset);
            CHECK(offset < END && trailer[5] <= END - 128 - offset, trailer[5]);
            areas++;
        }
        slot = ivshmem_lookup(&memory, draw() % 2 ? "name" : "", 0, &named);
        if (slot < 0) {
            CHECK(slot == IVSHMEM_NOT_FOUND || slot == IVSHMEM_VERSION, slot);
            continue;
        }
        CHECK(named.peer <= 0xffff && named.first_vector + named.vectors <= 2048, named.vectors);
        found++;
    }
    CHECK(areas > count / 100 && found > count / 10, areas);
    printf("ended well\n");
    return 0;
}

int main(int argc, char **argv)
{
    unsigned char *memory;
    if (argc > 2 && strcmp(argv[1], "hostile") != 0)
        return look(atoi(argv[1]), argv + 2);
    memory = mmap(NULL, END + 2 * 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    region = memory + 4096;
    CHECK(mprotect(region, END, PROT_READ | PROT_WRITE) == 0, errno);
    return meet_hostile(argc > 2 ? atol(argv[2]) : 1000);
}
