/* Calls everything that a peer can do with channels while their shared words hold whatever a hostile
 * peer may have written.
 *
 *   hostile COUNT [SEED]
 *
 * Each of COUNT states is some words of the area overwritten (with random numbers, zeros, ones, what
 * stands elsewhere, positions just before they wrap), then one call. In half of them words change
 * while the call is under way, too, often the one that it has just read. A call must end, return a
 * result that it documents, and touch nothing but the area and what it was given: the pages around
 * the region cannot be touched, the bytes around the area are checked.
 */
#include <stdint.h>

static uint64_t load(const uint64_t *word);
#define IVSHMEM_LOAD(word) load(word)
#define IVSHMEM_STORE(word, value) __atomic_store_n((word), (value), __ATOMIC_RELEASE)
#include "steps.h"

enum { FIRST = 8192, KINDS = 5, AREA_WORDS = (SIZE - 2 * FIRST) / 8 };

static uint64_t state;
static unsigned seldom; /* a word changes during a call with one of so many loads; 0: none does */

static uint64_t draw(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

static const struct ivshmem_geometry geometries[KINDS] = {
    {IVSHMEM_MESSAGES, 7, 0, 2, READERS, SLOTS, LOANS, 2, LONG},
    {IVSHMEM_QUEUE, 0, 0, 2, 2, SLOTS, LOANS, 2, LONG},
    {IVSHMEM_VALUE, IVSHMEM_OVERWRITE, 0, 1, 2, SLOTS, LOANS, 2, LONG},
    {IVSHMEM_CALLS, 0, 0, 2, 2, SLOTS, LOANS, 2, LONG},
    {IVSHMEM_BYTES, 0, 0, 3, 2, 128, 1, 1, 1}};

/* One end of each kind, and another that it talks to, in one process. */
struct party {
    struct peer ends[2];
    struct ivshmem_listener listener;
    struct ivshmem_stream streams[2];
    int has_streams[2];
};

static struct party parties[KINDS];
static unsigned char *outside;
static uint64_t seen[20];

static void make_all(void)
{
    const struct ivshmem_memory memory = {region, SIZE, IVSHMEM_WRITE_BACK, 0};
    struct ivshmem_area area;
    memset(region, 0, SIZE);
    CHECK(ivshmem_area_make(&area, &memory, FIRST, SIZE - 2 * FIRST, 16, 8) == 0, 0);
    for (int i = 0; i < KINDS; i++) {
        struct party *party = &parties[i];
        char name[IVSHMEM_CHANNEL_NAME] = "channel ";
        memset(party, 0, sizeof *party);
        name[8] = (char)('0' + i);
        CHECK(join(&party->ends[0]) == 0, i);
        CHECK(join(&party->ends[1]) == 0, i);
        CHECK(create(&party->ends[0], name, &geometries[i]) == 0, i);
        for (int j = 0; j < 2; j++)
            CHECK(open_channel(&party->ends[j], name) == 0, i);
        if (geometries[i].kind != IVSHMEM_BYTES) {
            CHECK(open_writer(&party->ends[0]) == 0, i);
            CHECK(open_reader(&party->ends[1], i != 0           ? IVSHMEM_OVERWRITE
                                               : draw() % 2 == 0 ? IVSHMEM_BLOCK
                                                                 : IVSHMEM_DISCARD) == 0, i);
            continue;
        }
        party->listener.channel = &party->ends[1].channel;
        party->listener.member = &party->ends[1].member;
        CHECK(ivshmem_listen(&party->listener) == 0, i);
    }
}

/* Where a hostile peer would store: the number of a word of the region. */
static uint64_t any_word(void)
{
    const struct ivshmem_channel *channel = &parties[draw() % KINDS].ends[0].channel;
    switch (draw() % 8) {
    case 0:
        return FIRST / 8 + draw() % AREA_WORDS;
    case 1: /* the places */
        return channel->area.places_at / 8 + draw() % (16u * 16u);
    case 2: /* the units and records */
        return channel->area.units_at / 8 +
               draw() % ((channel->area.data_at - channel->area.units_at) / 8);
    default: /* a channel's control words */
        return channel->at / 8 + draw() % (channel->layout.cells / 8);
    }
}

/* Overwrite a word of the area as a hostile peer would. */
static void spoil(uint64_t at)
{
    uint64_t *words = (uint64_t *)(void *)region, value = words[at];
    switch (draw() % 8) {
    case 0:
        value = draw();
        break;
    case 1:
        value = 0;
        break;
    case 2:
        value = ~UINT64_C(0);
        break;
    case 3: /* a position just before it wraps, of the same owner */
        value = ivshmem_word(IVSHMEM_VALUE_MASK - draw() % 8, ivshmem_flags(value),
                             ivshmem_epoch(value));
        break;
    case 4: /* a little more, or less */
        value += (draw() % 17 - 8) << (draw() % 2 ? 24 : 0);
        break;
    case 5: /* another state */
        value ^= UINT64_C(1) << (20 + draw() % 4);
        break;
    case 6:
        value ^= UINT64_C(1) << draw() % 64;
        break;
    default: /* what stands elsewhere */
        value = words[FIRST / 8 + draw() % AREA_WORDS];
    }
    words[at] = value;
}

/* What the header loads a word by. */
static uint64_t load(const uint64_t *word)
{
    uint64_t value = *word, at = (uint64_t)(word - (const uint64_t *)(const void *)region);
    if (seldom != 0 && draw() % seldom == 0)
        spoil(draw() % 2 && at >= FIRST / 8 && at < FIRST / 8 + AREA_WORDS ? at : any_word());
    return value;
}

static void result(int64_t code)
{
    CHECK(code <= 0 && code >= IVSHMEM_BAD, code);
    seen[-code]++;
}

/* What a reader was given lies in the cells of its channel. */
static void in_cells(const struct ivshmem_channel *channel, uint64_t offset, uint64_t length)
{
    CHECK(length <= channel->record.geometry.limit, length);
    CHECK(offset >= channel->at + channel->layout.cells, offset);
    CHECK(offset + length <= channel->at + channel->layout.size, offset);
}

static void call_messages(struct party *party)
{
    struct ivshmem_message message;
    unsigned char bytes[LONG];
    struct peer *writer = &party->ends[0], *reader = &party->ends[1];
    int code;
    switch (draw() % 6) {
    case 0:
    case 1:
        result(ivshmem_put(&writer->writer, filled(draw()), (uint32_t)(draw() % (LONG + 1)), 0, 0));
        break;
    case 2:
        code = ivshmem_take(&reader->reader, &message);
        if (code == 0) {
            in_cells(&reader->channel, message.offset, message.length);
            ivshmem_release(&reader->reader, message.writer,
                            reader->reader.sources[message.writer].next);
        }
        result(code);
        break;
    case 3:
        result(ivshmem_read(&reader->reader, &message, bytes, LONG));
        break;
    case 4:
        result(ivshmem_reader_sleep(&reader->reader));
        ivshmem_sleep_end(&reader->channel, &reader->reader.sleep);
        ivshmem_reader_beat(&reader->reader);
        break;
    default:
        result(ivshmem_writer_sleep(&writer->writer));
        ivshmem_sleep_end(&writer->channel, &writer->writer.sleep);
        ivshmem_writer_beat(&writer->writer);
    }
}

static void call_value(struct party *party)
{
    struct ivshmem_message message;
    struct peer *writer = &party->ends[0], *reader = &party->ends[1];
    int code;
    if (draw() % 2) {
        result(ivshmem_put(&writer->writer, filled(draw()), LONG, 0, 0));
        return;
    }
    code = ivshmem_value_look(&reader->reader, &message);
    if (code == 0) {
        in_cells(&reader->channel, message.offset, message.length);
        result(ivshmem_check(&reader->channel, &message));
    }
    result(code);
}

static void call_queue(struct party *party)
{
    struct ivshmem_taken taken;
    unsigned char bytes[LONG];
    struct peer *writer = &party->ends[0], *reader = &party->ends[1];
    int code;
    switch (draw() % 4) {
    case 0:
    case 1:
        result(ivshmem_queue_put(&writer->writer, filled(draw()), LONG, 0, 0));
        break;
    case 2:
        result(ivshmem_queue_read(&reader->reader, draw() % 2, bytes, LONG, &taken));
        break;
    default:
        result(ivshmem_queue_sleep(&reader->reader));
        ivshmem_queue_awake(&reader->reader);
        code = ivshmem_queue_take(&reader->reader, IVSHMEM_CLAIM_TAKEN, 1, &taken);
        ivshmem_queue_pass_on(&reader->reader);
        if (code == 0) {
            in_cells(&reader->channel, taken.message.offset, taken.message.length);
            result(draw() % 2 ? ivshmem_queue_done(&reader->reader, &taken)
                              : ivshmem_queue_return(&reader->reader, &taken));
        }
        result(code);
    }
}

static void call_calls(struct party *party)
{
    static uint64_t position;
    struct ivshmem_taken taken;
    struct peer *caller = &party->ends[0], *server = &party->ends[1];
    uint32_t cell, length = 0;
    unsigned status;
    int code, never;
    switch (draw() % 3) {
    case 0:
        code = ivshmem_queue_ready(&caller->writer);
        if (code == 0)
            code = ivshmem_loan(&caller->writer, &cell);
        if (code == 0) {
            in_cells(&caller->channel,
                     caller->channel.at +
                         ivshmem_cell_at(&caller->channel, caller->writer.slot, cell),
                     LONG);
            position = ivshmem_queue_publish(&caller->writer, cell, LONG, 0, 0);
        }
        result(code);
        break;
    case 1:
        code = ivshmem_queue_take(&server->reader, IVSHMEM_CLAIM_TAKEN, draw() % 2, &taken);
        if (code == 0) {
            in_cells(&server->channel, taken.message.offset, taken.message.length);
            in_cells(&server->channel,
                     ivshmem_reply_offset(&server->channel, taken.message.writer,
                                          taken.message.position),
                     LONG);
            result(ivshmem_reply(&server->reader, &taken, LONG, 0));
        }
        result(code);
        break;
    default:
        code = ivshmem_call_look(&caller->writer, position, &length, &status);
        CHECK(code != 0 || length <= LONG, length);
        result(code);
        ivshmem_call_end(&caller->writer, position, &never);
    }
}

static void call_bytes(struct party *party)
{
    unsigned char bytes[256];
    int end = (int)(draw() % 2);
    struct ivshmem_stream *stream = &party->streams[end];
    int64_t code;
    if (!party->has_streams[end]) {
        stream->channel = &party->ends[end].channel;
        stream->member = &party->ends[end].member;
        code = end == 0 ? ivshmem_stream_connect(stream)
                        : ivshmem_accept(&party->listener, stream);
        party->has_streams[end] = code == 0;
        result(code);
        return;
    }
    switch (draw() % 8) {
    case 0:
        ivshmem_stream_close(stream);
        party->has_streams[end] = 0;
        return;
    case 1:
        ivshmem_stream_shutdown(stream, draw() % 4 == 0, 0);
        ivshmem_stream_sleep(stream);
        ivshmem_sleep_end(stream->channel, &stream->sleep);
        return;
    case 2:
    case 3:
    case 4:
        memset(bytes, 7, sizeof bytes);
        code = ivshmem_send(stream, bytes, draw() % sizeof bytes);
        break;
    default:
        code = ivshmem_receive(stream, bytes, draw() % sizeof bytes);
    }
    CHECK(code <= (int64_t)sizeof bytes, code);
    result(code > 0 ? 0 : code);
}

/* Everything but the data path: with a place and a channel of its own. */
static void call_others(void)
{
    static struct peer visitor;
    struct ivshmem_area area;
    const struct ivshmem_memory memory = {region, SIZE, IVSHMEM_WRITE_BACK, 0};
    char name[IVSHMEM_CHANNEL_NAME] = "channel ";
    int kind = (int)(draw() % KINDS), code = ivshmem_area_open(&area, &memory, FIRST);
    result(code);
    if (code != 0)
        return;
    code = join(&visitor);
    result(code);
    if (code != 0)
        return;
    aside->now += LEASE / 4;
    code = ivshmem_beat(&visitor.member);
    CHECK(code >= 0 || code == IVSHMEM_CLOSED, code);
    name[8] = (char)('0' + draw() % KINDS);
    code = open_channel(&visitor, name);
    result(code);
    if (code == 0 && visitor.channel.record.geometry.kind != IVSHMEM_BYTES &&
        visitor.channel.record.geometry.slots == SLOTS &&
        visitor.channel.record.geometry.loans == LOANS) {
        result(open_writer(&visitor));
        result(open_reader(&visitor, IVSHMEM_OVERWRITE));
    }
    name[8] = 'x';
    code = create(&visitor, name, &geometries[kind]);
    result(code);
    if (open_channel(&visitor, name) == 0)
        result(ivshmem_remove(&visitor.member, &visitor.channel, draw() % 2 == 0));
    ivshmem_leave_area(&visitor.member);
}

int main(int argc, char **argv)
{
    long count = argc > 1 ? atol(argv[1]) : 1000;
    unsigned char *memory = mmap(NULL, SIZE + 2 * 4096, PROT_NONE,
                                 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    region = memory + 4096;
    CHECK(mprotect(region, SIZE, PROT_READ | PROT_WRITE) == 0, errno);
    aside = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    outside = malloc(FIRST);
    memset(outside, 0xa5, FIRST);
    aside->now = 1;
    state = argc > 2 ? (uint64_t)atoll(argv[2]) : 1;
    state = state * UINT64_C(0x9e3779b97f4a7c15) | 1;
    for (fatal = 0; fatal < count; fatal++) {
        if (fatal % 64 == 0) {
            make_all();
            memcpy(region, outside, FIRST);
            memcpy(region + SIZE - FIRST, outside, FIRST);
        }
        alarm(20);
        if (draw() % 4096 == 0)
            memset(region + FIRST, 0, SIZE - 2 * FIRST); /* a punched hole */
        for (uint64_t i = draw() % 4; i > 0; i--)
            spoil(any_word());
        seldom = draw() % 2 ? 0 : 1u << draw() % 8;
        switch (draw() % 8) {
        case 0:
        case 1:
            call_messages(&parties[0]);
            break;
        case 2:
            call_queue(&parties[1]);
            break;
        case 3:
            call_value(&parties[2]);
            break;
        case 4:
            call_calls(&parties[3]);
            break;
        case 5:
        case 6:
            call_bytes(&parties[4]);
            break;
        default:
            call_others();
        }
        seldom = 0;
        if (fatal % 64 == 63) {
            CHECK(memcmp(region, outside, FIRST) == 0, 0);
            CHECK(memcmp(region + SIZE - FIRST, outside, FIRST) == 0, 0);
        }
    }
    printf("%ld states; results:", fatal);
    for (int i = 0; i < 15; i++)
        printf(" %d: %llu", -i, (unsigned long long)seen[i]);
    printf("\n");
    return 0;
}
