/* What scripts of all kinds of channels share: parties of one area, and that all of it comes back.
 *
 * The first party that is added creates the channel, of the geometry that `begin_area` was given.
 */
#ifndef SCRIPT_PARTIES_H
#define SCRIPT_PARTIES_H
#include "schedulers.h"

static struct ivshmem_geometry geometry;
static struct ivshmem_channel channel;
static struct ivshmem_area area;
static unsigned free_units;

static void must(int code)
{
    CHECK(code == 0, code);
}

static void begin_area(const struct ivshmem_geometry *of)
{
    const struct ivshmem_memory memory = {region, SIZE, IVSHMEM_WRITE_BACK, 0};
    geometry = *of;
    must(ivshmem_area_make(&area, &memory, 8192, 1 << 16, PARTIES + 1, 4));
}

static struct party *add_party(const char *name, void (*program)(struct party *party))
{
    struct party *party = &parties[party_count];
    party->name = name;
    party->program = program;
    party->peer = &peers[party_count];
    CHECK(join(party->peer) == 0, 0);
    party->peer->member.peer = party_count;
    ivshmem_place_store(&party->peer->member);
    if (party_count++ == 0) {
        area = party->peer->member.area;
        free_units = count_free_units(&area);
        CHECK(create(party->peer, channel_name, &geometry) == 0, 0);
    }
    CHECK(open_channel(party->peer, channel_name) == 0, 0);
    channel = party->peer->channel;
    the_channel = &channel;
    return party;
}

/* Free the place of a party, as a proof or a user does, and ring all. */
static void free_place(struct party *self, unsigned index)
{
    const struct ivshmem_member *member = &parties[index].peer->member;
    ivshmem_place_free(&self->peer->member.area, member->place.index, member->number);
    ivshmem_ring_places(&self->peer->member);
}

/* Wake all, as their beats do: for the test alone. */
static void wake_all(void)
{
    for (unsigned i = 0; i < party_count; i++)
        parties[i].was_rung = 1;
}

static void all_is_back(void)
{
    struct peer *peer = &peers[0];
    struct ivshmem_area *whole = &peer->member.area;
    for (unsigned i = 0; geometry.kind != IVSHMEM_BYTES && i < geometry.writers; i++) {
        uint64_t owner;
        ivshmem_writer_reap(&peer->member, &channel, i);
        owner = ivshmem_get(&channel, channel.layout.writer_owners + 8u * i);
        CHECK(ivshmem_flags(owner) == IVSHMEM_SLOT_FREE, i);
    }
    for (unsigned i = 0; i < geometry.readers; i++)
        CHECK(!ivshmem_is_owned(&channel,
                                ivshmem_get(&channel, channel.layout.reader_owners + 8u * i)),
              i);
    CHECK(count_free_places(whole) == whole->places, count_free_places(whole));
    must(ivshmem_remove(&peer->member, &channel, 0));
    CHECK(count_free_units(whole) == free_units, 0);
}

#endif
