/* A reader that overwrites, and a writer that overtakes it: every message is read or counted as lost.
 * One process has both ends.
 */
#include "steps.h"

static const struct ivshmem_geometry geometry = {.kind = IVSHMEM_MESSAGES,
                                                 .overflow = IVSHMEM_OVERWRITE,
                                                 .writers = 1,
                                                 .readers = 1,
                                                 .slots = SLOTS,
                                                 .loans = LOANS,
                                                 .views = 2,
                                                 .limit = LONG};

static struct peer writer, reader;
static uint64_t written;

static void put_as_many_as_are_kept(void)
{
    for (unsigned i = 0; i < SLOTS; i++, written++) {
        fatal = (long)written; /* a failure names the message */
        CHECK(ivshmem_put(&writer.writer, filled(written), LONG, 0, written) == 0, written);
    }
}

static void get(uint64_t number, uint64_t lost)
{
    struct ivshmem_message message;
    uint64_t words[WORDS];
    int code = ivshmem_read(&reader.reader, &message, words, LONG);
    CHECK(code == 0, code);
    CHECK(number_in(words) == number && message.user == number, words[0]);
    CHECK(message.lost == lost, message.lost);
}

/* The reader does not begin with the oldest, which the writer would overwrite next. */
static void overwritten_while_it_was_copied(void)
{
    struct ivshmem_message message;
    put_as_many_as_are_kept();
    CHECK(ivshmem_take(&reader.reader, &message) == 0 && message.user == 0, message.user);
    put_as_many_as_are_kept();
    CHECK(ivshmem_check(&reader.channel, &message) == IVSHMEM_OVERTAKEN, 0);
    ivshmem_reader_lose(&reader.reader, message.writer);
    get(5, 5); /* the one that was taken is among them */
    get(6, 0);
    get(7, 0);
}

/* The reader has seen a head, and more was written since then than is kept. */
static void overwritten_before_it_was_taken(void)
{
    put_as_many_as_are_kept();
    get(8, 0);
    put_as_many_as_are_kept();
    get(12, 3);
    for (uint64_t i = 13; i < 16; i++)
        get(i, 0);
}

int main(void)
{
    struct ivshmem_memory mapped = {NULL, SIZE, IVSHMEM_WRITE_BACK, 0};
    struct ivshmem_message message;
    struct ivshmem_area area;
    uint64_t words[WORDS];
    region = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    aside = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    mapped.start = region;
    aside->now = 1;
    CHECK(ivshmem_area_make(&area, &mapped, 8192, SIZE - 8192, 8, 4) == 0, 0);
    CHECK(join(&writer) == 0 && join(&reader) == 0, 0);
    CHECK(create(&writer, channel_name, &geometry) == 0, 0);
    CHECK(open_channel(&writer, channel_name) == 0, 0);
    CHECK(open_channel(&reader, channel_name) == 0, 0);
    CHECK(open_writer(&writer) == 0, 0);
    CHECK(open_reader(&reader, IVSHMEM_OVERWRITE) == 0, 0);
    overwritten_while_it_was_copied();
    overwritten_before_it_was_taken();
    CHECK(ivshmem_read(&reader.reader, &message, words, LONG) == IVSHMEM_AGAIN, 0);
    CHECK(ivshmem_reader_lost(&reader.reader) == 5 + 3, ivshmem_reader_lost(&reader.reader));
    printf("ended well\n");
    return 0;
}
