/* A value: the newest content alone.
 */
#ifndef IVSHMEM_CHANNEL_VALUE_H
#define IVSHMEM_CHANNEL_VALUE_H

#include "reader.h"

/* A value is a channel of messages with one writer whose readers look at the newest message alone.
 * Its writer is an ivshmem_writer; when that one dies, what it published last stays.
 *
 * A reader is an ivshmem_reader too, which keeps no tail: it is opened with IVSHMEM_OVERWRITE.
 */

/* Look at the value. IVSHMEM_AGAIN: it was never set, or its writer is faster than this reader.
 * `ivshmem_check` says afterwards whether what was copied or seen is whole.
 *
 * A new writer leaves what a former one set, until it sets the value itself; also if it ends before it
 * has stored a head of its own. So a head need not have the epoch of the slot's owner. But one that is
 * older than a head that this reader has seen is a former owner's late store, and tells nothing. */
static inline int ivshmem_value_look(struct ivshmem_reader *reader,
                                     struct ivshmem_message *message)
{
    struct ivshmem_channel *channel = reader->channel;
    struct ivshmem_source *source = &reader->sources[0];
    for (unsigned tries = 0; tries < 64; tries++) {
        uint64_t head = ivshmem_head(channel, 0), position, entry;
        unsigned older = (source->epoch - ivshmem_epoch(head)) & IVSHMEM_EPOCH_MASK;
        int code;
        if (older != 0 && older <= IVSHMEM_EPOCH_MASK / 2 &&
            ivshmem_epoch(ivshmem_writer_owner(channel, 0)) != ivshmem_epoch(head))
            return IVSHMEM_AGAIN;
        position = (ivshmem_value(head) - 1) & IVSHMEM_VALUE_MASK;
        entry = ivshmem_entry_at(channel, 0, position);
        /* A head of 0 is that of a value that was never set; or positions have wrapped, and there is an
         * entry, unless the writer has overwritten it by now: then the head is another one, too. */
        if (ivshmem_value(head) == 0 && ivshmem_value(ivshmem_get(channel, entry)) != position) {
            if (tries > 0)
                return IVSHMEM_AGAIN;
            continue;
        }
        source->epoch = ivshmem_epoch(head);
        code = ivshmem_entry_read(channel, entry, 0, position,
                                  ivshmem_epoch(ivshmem_get(channel, entry)), message);
        source->next = ivshmem_value(head);
        if (code != IVSHMEM_OVERTAKEN)
            return code;
    }
    return IVSHMEM_AGAIN;
}

#endif
