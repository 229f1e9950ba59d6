"""ivshmem_channel.h, for the modules in Cython that stand beside it."""

from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t


cdef extern from "ivshmem_channel.h" nogil:
    enum:
        IVSHMEM_AGAIN
        IVSHMEM_CORRUPT
        IVSHMEM_NO_AREA
        IVSHMEM_VERSION
        IVSHMEM_NO_ROOM
        IVSHMEM_TAKEN
        IVSHMEM_NOT_FOUND
        IVSHMEM_TOO_LONG
        IVSHMEM_TOO_MANY
        IVSHMEM_CLOSED
        IVSHMEM_OVERTAKEN
        IVSHMEM_READ_ONLY
        IVSHMEM_NO_ATOMICS
        IVSHMEM_BAD
        IVSHMEM_NO_SLOT
        IVSHMEM_VALUE_MASK
        IVSHMEM_MOST_WRITERS
        IVSHMEM_MOST_READERS
        IVSHMEM_MOST_SLOTS
        IVSHMEM_MOST_LOANS
        IVSHMEM_MOST_CELLS
        IVSHMEM_MOST_CONNECTIONS
        IVSHMEM_MOST_BUFFER
        IVSHMEM_CHANNEL_NAME
        IVSHMEM_CHANNEL_TYPE
        IVSHMEM_PLACE_PEER
        IVSHMEM_PLACE_MACHINE
        IVSHMEM_PLACE_PROCESS
        IVSHMEM_PLACE_NAME
        IVSHMEM_NAME_WORDS
        IVSHMEM_LIVE
        IVSHMEM_HAS_ROOM
        IVSHMEM_MAKING
        IVSHMEM_SLOT_FREE
        IVSHMEM_SLOT_OPEN
        IVSHMEM_MESSAGES
        IVSHMEM_QUEUE
        IVSHMEM_VALUE
        IVSHMEM_CALLS
        IVSHMEM_BYTES
        IVSHMEM_OVERWRITE
        IVSHMEM_BLOCK
        IVSHMEM_DISCARD
        IVSHMEM_TIMES
        IVSHMEM_RING_ALWAYS

    enum ivshmem_mapping:
        IVSHMEM_WRITE_BACK
        IVSHMEM_WRITE_COMBINING
        IVSHMEM_UNCACHED

    enum ivshmem_overflow:
        pass

    enum ivshmem_claim:
        IVSHMEM_CLAIM_OPEN
        IVSHMEM_CLAIM_TAKEN
        IVSHMEM_CLAIM_ONCE

    struct ivshmem_memory:
        unsigned char *start
        uint64_t size
        ivshmem_mapping mapping
        int readonly

    struct ivshmem_area:
        ivshmem_memory memory
        uint64_t at
        uint64_t size
        uint64_t unit
        uint32_t places
        uint32_t records
        uint32_t units
        uint64_t units_at

    struct ivshmem_fault:
        const char *word
        uint64_t offset
        uint64_t seen
        uint64_t owner

    struct ivshmem_user:
        void *context
        void (*ring)(void *context, unsigned peer, unsigned vector) noexcept nogil
        int64_t (*now)(void *context) noexcept nogil
        int (*ended)(void *context, uint64_t process, uint64_t started) noexcept nogil

    struct ivshmem_place:
        unsigned index
        unsigned epoch

    struct ivshmem_pulse:
        uint64_t beat
        int64_t since

    struct ivshmem_member:
        ivshmem_area area
        ivshmem_user user
        ivshmem_place place
        ivshmem_pulse *pulses
        uint64_t number
        uint64_t peer
        uint64_t machine
        uint64_t process
        uint64_t started
        uint64_t beats
        int64_t lease
        int64_t looked

    struct ivshmem_geometry:
        uint32_t kind
        uint32_t overflow
        uint32_t options
        uint32_t writers
        uint32_t readers
        uint32_t slots
        uint32_t loans
        uint32_t views
        uint64_t limit

    struct ivshmem_layout:
        uint64_t writer_owners
        uint64_t reader_owners
        uint64_t rows
        uint64_t row_bytes
        uint64_t heads
        uint64_t cell_bytes
        uint64_t cells_each
        uint64_t size

    struct ivshmem_record:
        unsigned index
        uint64_t state
        char *name
        ivshmem_geometry geometry
        uint32_t first_unit
        uint32_t units
        uint64_t created
        char *type

    struct ivshmem_channel:
        ivshmem_area area
        ivshmem_record record
        ivshmem_layout layout
        uint64_t at
        ivshmem_fault fault

    struct ivshmem_sleep:
        unsigned more

    struct ivshmem_rung:
        pass

    struct ivshmem_backlog:
        pass

    struct ivshmem_writer_tables:
        uint32_t *cell_of
        uint32_t *free
        uint16_t *references
        uint32_t *pinned
        ivshmem_backlog *backlogs

    struct ivshmem_writer:
        ivshmem_channel *channel
        ivshmem_member *member
        unsigned slot
        unsigned epoch
        uint64_t next
        ivshmem_writer_tables tables
        uint32_t loaned
        uint32_t missed
        uint64_t cells_at
        ivshmem_sleep sleep

    struct ivshmem_message:
        unsigned writer
        uint64_t position
        uint64_t offset
        uint32_t length
        uint64_t time
        uint64_t user
        uint64_t lost

    struct ivshmem_source:
        uint64_t next
        uint64_t lost

    struct ivshmem_reader:
        ivshmem_channel *channel
        ivshmem_member *member
        unsigned slot
        unsigned epoch
        ivshmem_overflow overflow
        ivshmem_source *sources
        unsigned turn
        ivshmem_sleep sleep
        ivshmem_rung rung

    struct ivshmem_taken:
        ivshmem_message message
        uint64_t claim, claim_at
        int redelivered

    struct ivshmem_listener:
        ivshmem_channel *channel
        ivshmem_member *member
        ivshmem_sleep sleep

    struct ivshmem_stream:
        ivshmem_channel *channel
        ivshmem_member *member
        unsigned connection
        unsigned end
        uint64_t sent
        uint64_t received
        unsigned sends_no_more
        unsigned receives_no_more
        ivshmem_sleep sleep

    struct ivshmem_pieces:
        unsigned char *first
        unsigned char *second
        uint64_t first_size
        uint64_t second_size

    struct ivshmem_other_end:
        int closed
        uint64_t sent
        uint64_t received
        int sends_no_more
        int receives_no_more

    uint64_t ivshmem_load(const ivshmem_memory *memory, uint64_t offset)
    void ivshmem_load_bytes(
        const ivshmem_memory *memory, uint64_t offset, void *bytes, size_t size
    )
    uint64_t ivshmem_value(uint64_t word)
    unsigned ivshmem_flags(uint64_t word)
    unsigned ivshmem_epoch(uint64_t word)
    uint64_t ivshmem_ahead(uint64_t b, uint64_t a)
    void ivshmem_copy_payload(void *to, const void *source, uint64_t size)

    int ivshmem_area_open(ivshmem_area *area, const ivshmem_memory *memory, uint64_t at)
    int ivshmem_join(ivshmem_member *member, uint64_t random, const char *name)
    void ivshmem_leave_area(ivshmem_member *member)
    int ivshmem_beat(ivshmem_member *member)
    void ivshmem_ring_places(const ivshmem_member *member)
    int ivshmem_is_rung_always(const ivshmem_member *member, const ivshmem_channel *channel)
    int ivshmem_is_silent(const ivshmem_member *member, ivshmem_place place)
    int ivshmem_is_gone(const ivshmem_area *area, ivshmem_place place)
    uint64_t ivshmem_place_at(const ivshmem_area *area, unsigned index)
    uint64_t ivshmem_peer_at(const ivshmem_area *area, unsigned index)
    int ivshmem_place_free(const ivshmem_area *area, unsigned index, uint64_t number)
    ivshmem_place ivshmem_place_of(uint64_t word)

    int ivshmem_lay_out(const ivshmem_geometry *geometry, ivshmem_layout *layout)
    int ivshmem_create(const ivshmem_member *member, ivshmem_record *wanted)
    int ivshmem_find(const ivshmem_area *area, const char *name, ivshmem_record *record)
    uint64_t ivshmem_record_holds(const ivshmem_area *area, unsigned index, const char *name)
    int ivshmem_record_read(
        const ivshmem_area *area, unsigned index, ivshmem_record *record
    )
    void ivshmem_records_sweep(const ivshmem_area *area)
    int ivshmem_unit_is_free(const ivshmem_area *area, uint64_t owner)
    void ivshmem_channel_open(
        ivshmem_channel *channel, const ivshmem_area *area, const ivshmem_record *record
    )
    int ivshmem_remove(
        const ivshmem_member *member, const ivshmem_channel *channel, int force
    )
    int ivshmem_is_there(const ivshmem_channel *channel)
    uint64_t ivshmem_get(const ivshmem_channel *channel, uint64_t offset)
    void ivshmem_sleep_end(const ivshmem_channel *channel, ivshmem_sleep *sleep)
    void ivshmem_wake_readers(
        const ivshmem_member *member,
        const ivshmem_channel *channel,
        unsigned most,
        ivshmem_rung *rung,
    )
    uint64_t ivshmem_row_at(const ivshmem_channel *channel, unsigned reader, unsigned writer)
    uint64_t ivshmem_head(const ivshmem_channel *channel, unsigned writer)
    uint64_t ivshmem_end_owner_at(
        const ivshmem_channel *channel, unsigned connection, unsigned end
    )

    int ivshmem_writer_open(ivshmem_writer *writer)
    int ivshmem_writer_ready(ivshmem_writer *writer)
    int ivshmem_writer_sleep(ivshmem_writer *writer)
    void ivshmem_writer_beat(ivshmem_writer *writer)
    void ivshmem_writer_add(
        ivshmem_writer *writer, uint32_t cell, uint32_t length, uint64_t time, uint64_t user
    )
    void ivshmem_writer_announce(ivshmem_writer *writer)
    void ivshmem_writer_close(ivshmem_writer *writer)
    int ivshmem_loan(ivshmem_writer *writer, uint32_t *cell)
    void ivshmem_loan_drop(ivshmem_writer *writer, uint32_t cell)
    int ivshmem_put(
        ivshmem_writer *writer, const void *data, uint32_t length, uint64_t time, uint64_t user
    )

    int ivshmem_reader_open(ivshmem_reader *reader, uint32_t history)
    int ivshmem_take(ivshmem_reader *reader, ivshmem_message *message)
    int ivshmem_check(const ivshmem_channel *channel, const ivshmem_message *message)
    void ivshmem_reader_lose(ivshmem_reader *reader, unsigned writer)
    void ivshmem_release(ivshmem_reader *reader, unsigned writer, uint64_t held)
    int ivshmem_reader_sleep(ivshmem_reader *reader)
    void ivshmem_reader_settle(ivshmem_reader *reader)
    void ivshmem_reader_beat(ivshmem_reader *reader)
    void ivshmem_reader_close(ivshmem_reader *reader)
    int ivshmem_value_look(ivshmem_reader *reader, ivshmem_message *message)

    uint64_t ivshmem_claim_word(
        uint64_t position, unsigned reader, ivshmem_claim claim, unsigned epoch
    )
    void ivshmem_load_barrier(const ivshmem_memory *memory)
    int ivshmem_claim_exchange(
        const ivshmem_channel *channel, uint64_t at, uint64_t expected, uint64_t desired
    )

    int ivshmem_queue_ready(ivshmem_writer *writer)
    uint64_t ivshmem_queue_publish(
        ivshmem_writer *writer, uint32_t cell, uint32_t length, uint64_t time, uint64_t user
    )
    void ivshmem_queue_writer_sleep(ivshmem_writer *writer)
    int ivshmem_queue_take(
        ivshmem_reader *reader, ivshmem_claim how, int thorough, ivshmem_taken *taken
    )
    int ivshmem_queue_done(ivshmem_reader *reader, const ivshmem_taken *taken)
    int ivshmem_queue_return(ivshmem_reader *reader, const ivshmem_taken *taken)
    int ivshmem_queue_sleep(ivshmem_reader *reader)
    void ivshmem_queue_awake(ivshmem_reader *reader)
    void ivshmem_queue_pass_on(ivshmem_reader *reader)

    uint64_t ivshmem_reply_offset(
        const ivshmem_channel *channel, unsigned caller, uint64_t position
    )
    int ivshmem_reply(
        ivshmem_reader *server, const ivshmem_taken *call, uint32_t length, unsigned status
    )
    int ivshmem_call_look(
        ivshmem_writer *caller, uint64_t position, uint32_t *length, unsigned *status
    )
    int ivshmem_call_end(ivshmem_writer *caller, uint64_t position, int *never)

    int ivshmem_listen(ivshmem_listener *listener)
    void ivshmem_listener_close(ivshmem_listener *listener)
    int ivshmem_accept(ivshmem_listener *listener, ivshmem_stream *stream)
    int ivshmem_stream_connect(ivshmem_stream *stream)
    int ivshmem_stream_look(ivshmem_stream *stream, ivshmem_other_end *other)
    int64_t ivshmem_send(ivshmem_stream *stream, const void *data, uint64_t size)
    int64_t ivshmem_receive(ivshmem_stream *stream, void *data, uint64_t room)
    void ivshmem_stream_shutdown(ivshmem_stream *stream, int sending, int receiving)
    void ivshmem_stream_sleep(ivshmem_stream *stream)
    void ivshmem_stream_close(ivshmem_stream *stream)
    void ivshmem_stream_abort(ivshmem_stream *stream)
    void ivshmem_stream_beat(ivshmem_stream *stream)
    int64_t ivshmem_stream_silence(const ivshmem_stream *stream)
    int64_t ivshmem_send_begin(ivshmem_stream *stream, uint64_t most, ivshmem_pieces *pieces)
    void ivshmem_send_end(ivshmem_stream *stream, uint64_t size)
    int64_t ivshmem_receive_begin(ivshmem_stream *stream, uint64_t most, ivshmem_pieces *pieces)
    void ivshmem_receive_end(ivshmem_stream *stream, uint64_t size)
    void ivshmem_sleep_begin(const ivshmem_channel *channel, ivshmem_sleep *sleep)
    void ivshmem_sleep_say(const ivshmem_channel *channel, ivshmem_sleep *sleep)
    uint64_t ivshmem_source_head_at(const ivshmem_reader *reader, unsigned writer)
    unsigned ivshmem_policy(uint64_t word)
    uint64_t ivshmem_reader_lost(const ivshmem_reader *reader)
    int ivshmem_queue_has_more(const ivshmem_reader *reader)
    int ivshmem_has_claims(const ivshmem_channel *channel)
    uint64_t ivshmem_claim_at(const ivshmem_channel *channel, unsigned writer, uint64_t position)
    int ivshmem_claim_is_published(uint64_t head, uint64_t claim)
    int ivshmem_call_waits(const ivshmem_writer *caller, uint64_t position)
    int ivshmem_listener_has_caller(const ivshmem_listener *listener)
    void ivshmem_listener_pass_on(ivshmem_listener *listener)
    void ivshmem_full_fence(const ivshmem_memory *memory)
