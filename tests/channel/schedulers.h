/* Which party is next: by chance, all with few preemptions, or as a schedule of the model says.
 *
 * A program includes this, has a table of scripts, and calls `run_scripts`:
 *
 *   PROGRAM [-v] [-without POINT | -relaxed] random SCRIPT COUNT [SEED]
 *   PROGRAM [-v] [-without POINT | -relaxed] bounded SCRIPT PREEMPTIONS [HELD]
 *   PROGRAM [-v] follow SCRIPT < SCHEDULES
 *
 * -relaxed: loads of words do not acquire. -v: each step is printed.
 *
 * random: each schedule has its own seed, from SEED on. bounded: all schedules in which at most so
 * many times a party has to stop where it could continue; with HELD also all in which one store, in
 * addition, stays in its buffer as long as it can. The exit status is 1 if a schedule failed; its
 * line says how to run it again.
 *
 * follow: each line is a schedule of the model, `party:what:word:index:index`, see `follow_choose`. Of a
 * store, `:others:waits` say how many other stores of the party may become visible instead, and whether
 * the party waits for that, at a fence or an exchange. If the C is less strict, the schedule is "loose".
 */
#ifndef SCHEDULERS_H
#define SCHEDULERS_H
#include "schedules.h"

struct script {
    const char *name;
    void (*prepare)(void); /* parties, peers, memory: what is there when the script begins */
    void (*check)(void);   /* at the end, when all parties have ended */
};

/* Called before each run: set back what the program counts. */
static void reset(void);

/* -- names of words ------------------------------------------------------------------------------- */

enum word_class {
    OTHER, JOINS, WRITER, READER, WRITER_SLEEPER, READER_SLEEPER, POLICY, TAIL, HEAD, STAMP, ENTRY,
    TIME, USER, CLAIM, REPLY, BACKLOG, BACKLOG_STAMP, BACKLOG_ENTRY, CELL, NUMBER, CALLER, ACCEPTOR,
    END_HEAD, END_TAIL, END_SLEEPER, BYTE, CLASSES
};
enum { SENT_AT_ONCE = 4 }; /* words of 8 bytes, where a stream follows the model */

static const char *const class_names[CLASSES] = {
    "other", "joins", "writer", "reader", "writer-sleeper", "reader-sleeper", "policy", "tail", "head",
    "stamp", "entry", "time", "user", "claim", "reply", "backlog", "backlog-stamp", "backlog-entry",
    "cell", "number", "caller", "acceptor", "end-head", "end-tail", "end-sleeper", "byte"};

struct label {
    enum word_class class;
    unsigned a, b; /* as the model numbers it; of a cell: the writer, and 8 * cell + word */
};

static const struct ivshmem_channel *the_channel; /* of the script */

static struct label in_entry(uint64_t at, enum word_class stamp, unsigned a, unsigned b)
{
    static const enum word_class words[] = {STAMP, ENTRY, TIME, USER};
    static const enum word_class backlog[] = {BACKLOG_STAMP, BACKLOG_ENTRY, TIME, USER};
    struct label label = {stamp == STAMP ? words[at % 32 / 8] : backlog[at % 32 / 8], a, b};
    return label;
}

/* Name a word of an end of a connection, or of its buffer. */
static struct label label_of_bytes(uint64_t at)
{
    const struct ivshmem_layout *layout = &the_channel->layout;
    struct label label = {OTHER, 0, 0};
    if (at >= layout->cells) {
        label.class = BYTE;
        label.a = (unsigned)((at - layout->cells) / layout->cell_bytes);
        label.b = (unsigned)((at - layout->cells) % layout->cell_bytes / 8);
    } else if (at >= layout->heads) {
        unsigned word = (unsigned)((at - layout->heads) % IVSHMEM_CONNECTION_BYTES / 8);
        label.a = (unsigned)((at - layout->heads) / IVSHMEM_CONNECTION_BYTES);
        label.b = word / 8 - 1;
        if (word < 2) {
            label.class = word == 0 ? CALLER : ACCEPTOR;
            label.b = 0;
        } else {
            label.class = word % 8 == 0 ? END_HEAD : word % 8 == 1 ? END_TAIL : END_SLEEPER;
        }
    } else if (at >= layout->reader_sleepers) {
        label.class = READER_SLEEPER;
        label.a = (unsigned)((at - layout->reader_sleepers) / 8);
    } else if (at >= layout->reader_owners) {
        label.class = READER;
        label.a = (unsigned)((at - layout->reader_owners) / 8);
    }
    return label;
}

static struct label label_of(uint64_t at)
{
    const struct ivshmem_layout *layout = &the_channel->layout;
    const struct ivshmem_geometry *g = &the_channel->record.geometry;
    const struct ivshmem_area *area = &the_channel->area;
    uint64_t each = ivshmem_rounded((uint64_t)IVSHMEM_ENTRY_BYTES * g->slots, IVSHMEM_CACHE_LINE);
    struct label label = {OTHER, 0, 0};
    if (at < the_channel->at) {
        if (at >= area->places_at && at < area->units_at) {
            label.class = (at - area->places_at) % IVSHMEM_PLACE_BYTES == 0 ? NUMBER : OTHER;
            label.a = (unsigned)((at - area->places_at) / IVSHMEM_PLACE_BYTES);
        }
        return label;
    }
    at -= the_channel->at;
    if (g->kind == IVSHMEM_BYTES)
        return label_of_bytes(at);
    if (at >= layout->cells) {
        uint64_t of_writer = layout->cells_each * layout->cell_bytes;
        label.class = CELL;
        label.a = (unsigned)((at - layout->cells) / of_writer);
        label.b = (unsigned)((at - layout->cells) % of_writer / layout->cell_bytes * 8 +
                             (at - layout->cells) % layout->cell_bytes / 8);
        if (g->kind == IVSHMEM_CALLS && (at - layout->cells) % of_writer >= of_writer / 2)
            label.class = REPLY;
    } else if (at >= layout->backlogs) {
        uint64_t number = (at - layout->backlogs) / layout->backlog_bytes;
        uint64_t in = (at - layout->backlogs) % layout->backlog_bytes;
        label.class = BACKLOG;
        label.a = (unsigned)(number / g->readers);
        label.b = (unsigned)(number % g->readers);
        if (in >= IVSHMEM_CACHE_LINE)
            return in_entry(in, BACKLOG_STAMP, label.a, (unsigned)(in / 32 - 2));
    } else if (at >= layout->replies) {
        label.class = REPLY;
        label.a = (unsigned)((at - layout->replies) /
                             ivshmem_rounded(8u * (uint64_t)g->slots, IVSHMEM_CACHE_LINE));
        label.b = 8;
    } else if (at >= layout->claims) {
        uint64_t of_writer = ivshmem_rounded(8u * (uint64_t)g->slots, IVSHMEM_CACHE_LINE);
        label.class = CLAIM;
        label.a = (unsigned)((at - layout->claims) / of_writer);
        label.b = (unsigned)((at - layout->claims) % of_writer / 8);
    } else if (at >= layout->entries) {
        uint64_t in = (at - layout->entries) % each;
        return in_entry(in, STAMP, (unsigned)((at - layout->entries) / each), (unsigned)(in / 32));
    } else if (at >= layout->heads) {
        label.class = HEAD;
        label.a = (unsigned)((at - layout->heads) / IVSHMEM_CACHE_LINE);
    } else if (at >= layout->rows) {
        uint64_t in = (at - layout->rows) % layout->row_bytes;
        label.class = in == 0 ? POLICY : TAIL;
        label.a = (unsigned)((at - layout->rows) / layout->row_bytes);
        label.b = in == 0 ? 0 : (unsigned)(in / 8 - 1);
    } else if (at >= IVSHMEM_CACHE_LINE) {
        static const enum word_class of[] = {WRITER, READER, WRITER_SLEEPER, READER_SLEEPER};
        label.class = of[(at - IVSHMEM_CACHE_LINE) / IVSHMEM_CACHE_LINE];
        label.a = (unsigned)(at % IVSHMEM_CACHE_LINE / 8);
    } else {
        label.class = at == IVSHMEM_JOINS ? JOINS : OTHER;
    }
    return label;
}

static const char *name_of(uint64_t at)
{
    static char name[64];
    struct label label = label_of(at);
    snprintf(name, sizeof name, "%s %u %u", class_names[label.class], label.a, label.b);
    return name;
}

/* -- by chance ------------------------------------------------------------------------------------ */

static uint64_t state_of_chance;

static unsigned chance(unsigned below)
{
    state_of_chance ^= state_of_chance << 13;
    state_of_chance ^= state_of_chance >> 7;
    state_of_chance ^= state_of_chance << 17;
    return (unsigned)((state_of_chance >> 24) % below);
}

/* Of a schedule: how often another party is next (once in so many steps), how often a store becomes
 * visible, which party hardly ever runs, and how often a load sees what is older. */
static struct habits {
    unsigned turns, shows, slow, older;
} habits;

static void begin_random(uint64_t seed)
{
    state_of_chance = (seed + 1) * UINT64_C(0x9e3779b97f4a7c15);
    for (int i = 0; i < 4; i++)
        chance(2);
    habits.turns = 2u << chance(6);
    habits.shows = 2u << chance(6);
    habits.slow = chance(2 * party_count);
    habits.older = 1u << chance(4);
}

/* Show a store that may become visible, of one party or (NULL) of any. Whether there was one. */
static int show_one(struct party *party)
{
    unsigned found = 0, who = 0, which = 0;
    for (unsigned i = 0; i < party_count; i++)
        for (unsigned j = 0; (party == NULL || party == &parties[i]) && j < parties[i].count; j++)
            if (may_show(&parties[i], j) && chance(++found) == 0) {
                who = i;
                which = j;
            }
    if (found != 0)
        show(&parties[who], which);
    return found != 0;
}

static struct party *random_choose(void)
{
    while (1) {
        struct party *found = NULL;
        unsigned count = 0;
        if (chance(habits.shows) == 0)
            show_one(NULL);
        if (running != NULL && chance(habits.turns) != 0) {
            if (is_able(running))
                return running;
            if (show_one(running)) /* it may wait for that */
                continue;
        }
        for (unsigned i = 0; i < party_count; i++)
            if (is_able(&parties[i]) && (i != habits.slow || chance(16) == 0) &&
                chance(++count) == 0)
                found = &parties[i];
        if (found == NULL && habits.slow < party_count && is_able(&parties[habits.slow]))
            found = &parties[habits.slow];
        if (found != NULL)
            return found;
        if (!show_one(NULL))
            return NULL;
    }
}

/* -- all with few preemptions ---------------------------------------------------------------------- */

static struct preemption {
    unsigned long step;
    unsigned to;
} preemptions[4];
static unsigned preemption_count, preempted;
static long held; /* which store, of all, stays in its buffer as long as it can; -1: none */
static long shown;
static struct store *the_held;
static unsigned long decisions;
enum { DECISIONS = 4096 };
static unsigned char others[DECISIONS]; /* at each decision: the other parties that could be next */

static struct party *next_after(struct party *party)
{
    unsigned index = party == NULL ? 0 : (unsigned)(party - parties);
    return &parties[(index + 1) % party_count];
}

/* A store of a party that may become visible, except the one that is held; its number, or -1. */
static int showable(const struct party *party)
{
    for (unsigned i = 0; i < party->count; i++)
        if (may_show(party, i) && !(held >= 0 && party->stores[i].at == the_held->at &&
                                    party->stores[i].word == the_held->word))
            return (int)i;
    return -1;
}

static struct party *bounded_choose(void)
{
    struct party *party = running == NULL ? &parties[0] : running;
    if (party->verb == PAUSES) /* it asks for that: no preemption */
        party = next_after(party);
    while (1) {
        unsigned tried = 0;
        if (preempted < preemption_count && preemptions[preempted].step == decisions)
            party = &parties[preemptions[preempted++].to];
        while (tried < party_count && showable(party) < 0 && !is_able(party)) {
            party = next_after(party);
            tried++;
        }
        if (tried == party_count) { /* what was held as long as it could */
            if (held < 0 || the_held->at == 0) {
                if (!show_one(NULL))
                    return NULL;
            } else {
                the_held->at = the_held->word = 0;
            }
            continue;
        }
        if (decisions < DECISIONS) {
            others[decisions] = 0;
            for (unsigned i = 0; i < party_count; i++)
                if (party != &parties[i] && (is_able(&parties[i]) || showable(&parties[i]) >= 0))
                    others[decisions] |= (unsigned char)(1u << i);
        }
        decisions++;
        if (showable(party) < 0)
            return party;
        if (held == shown++) {
            *the_held = party->stores[showable(party)];
            continue;
        }
        show(party, (unsigned)showable(party));
    }
}

/* -- as the model says ------------------------------------------------------------------------------ */

enum what { SHOWS, IS_LOAD, IS_OLDER, IS_EXCHANGE, IS_RING, IS_WAKE, DIES, IS_SILENT, IS_GONE, IS_BACK };

static struct token {
    unsigned party;
    enum what what;
    struct label label; /* of a ring: a is the party */
    unsigned others, waits; /* of a store: how many others may become visible; at a fence */
} tokens[4096];
static unsigned token_count, token_at;
static const char *strayed; /* why the schedule could not be followed */
static unsigned omitted[CLASSES], extra[CLASSES];
static int is_loose; /* the C may do what the model may not: a barrier or a fence is missing */
static int is_forbidden; /* a barrier, or a fence, of the C orders what the model leaves free */

/* Words that each party has loaded out of the model's order, since its last fence. */
static struct label early[PARTIES][16];
static unsigned early_count[PARTIES];

static int same_label(struct label a, struct label b)
{
    return a.class == b.class && a.a == b.a && a.b == b.b;
}

/* Of a connection the model has one direction, and no listeners' slots. Its byte is all that is sent at
 * once. It looks at a sleeper once, and at its own never. */
static int is_extra_of_bytes(struct label label, const char *function)
{
    switch (label.class) {
    case CALLER: case ACCEPTOR:
        return strcmp(function, "ivshmem_listener_close") == 0;
    case END_HEAD:
        return label.b != 0;
    case END_TAIL:
        return label.b != 1;
    case END_SLEEPER:
        return strcmp(function, "ivshmem_stream_wake_for") == 0 ||
               strcmp(function, "ivshmem_stream_begin") == 0;
    case BYTE:
        return label.b % SENT_AT_ONCE != 0;
    case READER_SLEEPER:
        return strcmp(function, "ivshmem_wake_one") == 0;
    default:
        return 1;
    }
}

static int has_claim[IVSHMEM_MOST_WRITERS][8];
static int is_silent[PARTIES];
static int has_place[PARTIES]; /* the model asks whether this party is gone */
static int has_all_looks; /* the model has the looks of readers that block, and of their writers */
static int has_word[CLASSES]; /* the schedule has steps with such words */
static int has_two_parts; /* the model's payload is of two words, as the C's is */

/* Whether a step of the C, or a store, has no counterpart in the model: it is done on the way. */
static int is_extra(struct label label, const char *function)
{
    const int is_of_bytes = the_channel->record.geometry.kind == IVSHMEM_BYTES;
    const int discards = (the_channel->record.geometry.overflow & IVSHMEM_DISCARD) != 0;
    if (label.class == NUMBER)
        return !(label.a < PARTIES && has_place[label.a] && strcmp(function, "ivshmem_is_gone") == 0);
    if (is_of_bytes)
        return is_extra_of_bytes(label, function);
    /* A reader that discards reads its backlog, which a writer looks for only once. */
    if (discards && (label.class == HEAD || label.class == ENTRY ||
                     (label.class == TAIL && strcmp(function, "ivshmem_writer_look") == 0)))
        return 1;
    if (label.class == READER && strcmp(function, "ivshmem_claimer_owner") == 0)
        return 1; /* a claim of the model names its reader, or server */
    if (the_channel->record.geometry.kind == IVSHMEM_VALUE) {
        if (label.class == WRITER) /* no reader frees the slot: its next owner does, as in the model */
            return 0;
        if (label.class == WRITER_SLEEPER) /* it waits for nobody */
            return 1;
        if (label.class == READER_SLEEPER)
            return !has_word[READER_SLEEPER];
    }
    if ((label.class == JOINS || label.class == WRITER || label.class == READER ||
         label.class == POLICY) && !has_word[label.class])
        return 1; /* what nobody changes is no step of the model */
    if (has_all_looks) {
        if (label.class == STAMP || label.class == READER_SLEEPER || label.class == WRITER_SLEEPER)
            return 0;
        if (label.class == WRITER)
            return strcmp(function, "ivshmem_wake_one") == 0;
    }
    if (label.class == READER_SLEEPER && ivshmem_has_claims(the_channel))
        return 0; /* the model looks first whether any sleeps, too */
    switch (label.class) {
    case TIME: case USER: case OTHER:
        return 1;
    case CELL:
        return label.b % 8 != 0 && !has_two_parts;
    case REPLY: /* the payload is the model's */
        return label.b == 8 || label.b % 8 != 0;
    case STAMP: case BACKLOG_STAMP:
        if (ivshmem_has_claims(the_channel) || discards) /* there a claim, or the head, says the same */
            return 1;
        if (the_channel->record.geometry.kind == IVSHMEM_MESSAGES) /* the model looks behind the payload */
            return strcmp(function, "ivshmem_entry_read") == 0;
        /* With which epoch to read the entry: the model does not ask. */
        return strcmp(function, "ivshmem_writer_adopt_one") == 0 ||
               strcmp(function, "ivshmem_value_look") == 0;
    case CLAIM: /* of a slot that is never used a look is no step of the model */
        if (label.b < 8 && !has_claim[label.a][label.b])
            return 1;
        return strcmp(function, "ivshmem_claim_ends") == 0;
    case WRITER_SLEEPER:
        /* A reply looks at it there alone; others have looked before they come there. */
        if (the_channel->record.geometry.kind == IVSHMEM_CALLS &&
            strcmp(function, "ivshmem_wake_one") == 0)
            return 0;
        /* fall through */
    default:
        return strcmp(function, "ivshmem_writer_reap") == 0 ||
               strcmp(function, "ivshmem_reader_open") == 0 ||
               strcmp(function, "ivshmem_reader_settle") == 0 ||
               strcmp(function, "ivshmem_wake_one") == 0;
    }
}

/* Whether the schedule has a step of a party with this word soon, behind the present one. */
static int comes_soon(unsigned party, enum what what, struct label label)
{
    unsigned horizon = 0;
    for (unsigned i = token_at + 1; i < token_count && horizon < 12; i++) {
        if (tokens[i].party != party || tokens[i].what == SHOWS)
            continue;
        if ((tokens[i].what == what || (what == IS_LOAD && tokens[i].what == IS_OLDER)) &&
            same_label(tokens[i].label, label))
            return 1;
        horizon++;
    }
    return 0;
}

static int store_of(const struct party *party, struct label label)
{
    for (unsigned i = 0; i < party->count; i++)
        if (party->stores[i].at != 0 && same_label(label_of(party->stores[i].at), label) &&
            !is_extra(label, party->stores[i].function))
            return (int)i;
    return -1;
}

/* Whether more stores of a party may become visible than the model says, or the party need not wait for
 * them. What the model does not have orders nothing. */
static int is_less_strict(const struct party *party, const struct token *token)
{
    unsigned may = 0;
    int waits = party->verb == FENCES || party->verb == EXCHANGES;
    for (unsigned i = 0; i < party->count; i++) {
        const struct store *store = &party->stores[i];
        int is_ordered = 0, has_stores = 0;
        for (unsigned j = 0; j < i; j++) {
            const struct store *before = &party->stores[j];
            is_ordered |= before->at == 0 ? has_stores : before->at == store->at;
            has_stores |= before->at != 0 && !is_extra(label_of(before->at), before->function);
        }
        may += store->at != 0 && !is_extra(label_of(store->at), store->function) && !is_ordered;
    }
    return may > token->others + 1 || (token->waits && !waits);
}

static void omit(const struct token *token, const char *why)
{
    if (trace)
        printf("  omitted: %s %s %u %u (%s)\n", parties[token->party].name,
               class_names[token->label.class], token->label.a, token->label.b, why);
    omitted[token->label.class]++;
    token_at++;
}

/* Let the oldest store that may become visible do so, because the C cannot continue otherwise. */
static void hurry(struct party *party)
{
    unsigned first = 0;
    while (!may_show(party, first))
        first++;
    if (!is_extra(label_of(party->stores[first].at), party->stores[first].function))
        is_forbidden = 1;
    if (trace)
        printf("  hurried%s:\n", is_forbidden ? ", which the model does not" : "");
    show(party, first);
}

/* Whether the step of a token was done before its turn. */
static int was_early(const struct token *token)
{
    struct label *labels = early[token->party];
    for (unsigned i = 0; token->what == IS_LOAD && i < early_count[token->party]; i++)
        if (same_label(labels[i], token->label)) {
            labels[i] = labels[--early_count[token->party]];
            return 1;
        }
    return 0;
}

/* A party dies; or all others take it for silent, for gone, or for alive again, and are rung. */
static void befalls(struct party *party, enum what what)
{
    const struct ivshmem_place place = party->peer->member.place;
    struct party *self = running;
    if (trace)
        printf("%s %s\n", party->name,
               what == DIES ? "dies" : what == IS_SILENT ? "is silent" : what == IS_GONE ? "is gone" : "is back");
    if (what == DIES) {
        party->is_dead = 1;
        party->count = 0;
        return;
    }
    running = NULL;
    if (what == IS_GONE)
        ivshmem_place_free(&party->peer->member.area, place.index, party->peer->member.number);
    running = self;
    is_silent[place.index] = what == IS_SILENT;
    for (unsigned i = 0; i < party_count; i++)
        parties[i].was_rung = 1;
}

/* A party sees whether another one is silent when, in the model, it asks how that one looks. */
static void sees_silence(const struct party *party, unsigned index)
{
    struct ivshmem_member *member = &party->peer->member;
    const struct ivshmem_place place = parties[index].peer->member.place;
    member->pulses[index].beat = ivshmem_word(0, 0, place.epoch);
    member->pulses[index].since = is_silent[index] ? -LEASE - 1 : 0;
}

static struct party *follow_choose(void)
{
    /* What the model has not follows at once on what it has. */
    if (running != NULL && running->verb == LOADS && !running->is_dead &&
        is_extra(label_of(running->at), running->function))
        return running;
    while (token_at < token_count && strayed == NULL && !is_forbidden) {
        struct token *token = &tokens[token_at];
        struct party *party = &parties[token->party];
        enum what what;
        struct label label = {OTHER, 0, 0};
        int is_past = 0;
        if (token->what >= DIES) {
            befalls(party, token->what);
            token_at++;
            continue;
        }
        if (token->what == SHOWS) {
            int index = store_of(party, token->label);
            if (index >= 0) {
                if (is_less_strict(party, token)) {
                    is_loose = 1;
                    if (trace)
                        printf("  loose, before step %u:\n", token_at);
                }
                while (!may_show(party, (unsigned)index)) {
                    hurry(party);
                    index = store_of(party, token->label);
                }
                show(party, (unsigned)index);
                token_at++;
                continue;
            }
        }
        if (party->is_dead || party->verb == IS_OVER) {
            omit(token, "it has ended");
            continue;
        }
        if (was_early(token)) {
            omit(token, "it was done before");
            continue;
        }
        if (!is_able(party)) {
            if (token->what == IS_LOAD && party->verb != WAITS &&
                (token->label.class == READER || token->label.class == WRITER ||
                 token->label.class == POLICY || token->label.class == JOINS))
                omit(token, "it has seen that before its fence");
            else if (party->count != 0) {
                hurry(party);
            } else if (token->what == SHOWS || token->what == IS_LOAD || token->what == IS_OLDER) {
                omit(token, "it sleeps");
            } else {
                strayed = "it sleeps";
            }
            continue;
        }
        if (party->verb != LOADS && party->verb != EXCHANGES && party->verb != RINGS &&
            party->verb != WAITS) {
            early_count[token->party] = 0;
            return party;
        }
        what = party->verb == LOADS       ? IS_LOAD
               : party->verb == EXCHANGES ? IS_EXCHANGE
               : party->verb == RINGS     ? IS_RING
                                          : IS_WAKE;
        if (what == IS_LOAD || what == IS_EXCHANGE)
            label = label_of(party->at);
        else
            label.a = what == IS_RING ? (unsigned)party->at : 0;
        if ((what == token->what || (what == IS_LOAD && token->what == IS_OLDER)) &&
            same_label(label, token->label) &&
            !((what == IS_LOAD || what == IS_EXCHANGE) && is_extra(label, party->function))) {
            if (token->what == IS_OLDER && label.class != CELL)
                is_forbidden = 1; /* a load of the C acquires */
            if (label.class == NUMBER)
                sees_silence(party, label.a);
            token_at++;
            return party;
        }
        if ((what == IS_LOAD || what == IS_EXCHANGE) && is_extra(label, party->function)) {
            return party;
        }
        /* The C looks at a reader's owner and way to overflow first, the model at its tail. */
        if ((label.class != READER && label.class != POLICY && label.class != JOINS) ||
            strcmp(party->function, "ivshmem_writer_look") != 0)
            is_past = comes_soon(token->party, what, label);
        if (is_past) {
            if (token->what == IS_EXCHANGE || token->what == IS_RING || token->what == IS_WAKE)
                strayed = "the C does not do it";
            omit(token, "it is past that");
            continue;
        }
        if (what == IS_EXCHANGE || what == IS_RING || what == IS_WAKE)
            strayed = "the model does not do it";
        if (label.class != NUMBER || label.a != token->party) /* whether it is gone itself: no matter */
            extra[label.class]++;
        if (trace)
            printf("  in addition, before step %u:\n", token_at);
        if (what == IS_LOAD && early_count[token->party] < 16)
            early[token->party][early_count[token->party]++] = label;
        return party;
    }
    return bounded_choose();
}

/* -- runs ------------------------------------------------------------------------------------------- */

static enum way { RANDOM, BOUNDED, FOLLOW } way;

static struct party *choose(void)
{
    return way == RANDOM ? random_choose() : way == BOUNDED ? bounded_choose() : follow_choose();
}

static unsigned choose_age(unsigned count)
{
    if (way == FOLLOW)
        return token_at > 0 && tokens[token_at - 1].what == IS_OLDER ? 1 : 0;
    return way == BOUNDED ? 0 : chance(habits.older) != 0 ? 0 : chance(count + 1);
}

static unsigned char *first_memory;
static struct peer peers[PARTIES], first_peers[PARTIES];
static uint64_t used_from, used_to;

/* Run the script from its beginning. */
static int again(const struct script *script)
{
    static struct store nothing;
    reset();
    memcpy(region + used_from, first_memory + used_from, used_to - used_from);
    memcpy(peers, first_peers, sizeof(struct peer) * party_count);
    preempted = 0;
    decisions = 0;
    shown = 0;
    nothing.at = nothing.word = 0;
    the_held = &nothing;
    return run_parties(script->check);
}

static void report(const struct script *script, const char *how)
{
    printf("%s %s: %s (%ld)\n", how, script->name, failure, failure_value);
    exit(1);
}

static long run_random(const struct script *script, long count, long seed)
{
    for (long i = 0; i < count; i++) {
        char how[64];
        begin_random((uint64_t)(seed + i));
        if (again(script))
            continue;
        snprintf(how, sizeof how, "random, seed %ld,", seed + i);
        report(script, how);
    }
    return count;
}

static long run_bounded(const struct script *script, unsigned most)
{
    unsigned long ended_at;
    unsigned char *able;
    long count = 1;
    if (!again(script)) {
        char how[128];
        int n = snprintf(how, sizeof how, "bounded, held %ld", held);
        for (unsigned i = 0; i < preemption_count; i++)
            n += snprintf(how + n, sizeof how - (size_t)n, ", at %lu to %s", preemptions[i].step,
                          parties[preemptions[i].to].name);
        report(script, how);
    }
    if (preemption_count == most)
        return count;
    ended_at = decisions < DECISIONS ? decisions : DECISIONS;
    able = malloc(ended_at + 1);
    memcpy(able, others, ended_at);
    for (unsigned long i = preemption_count ? preemptions[preemption_count - 1].step + 1 : 0;
         i < ended_at; i++)
        for (unsigned to = 0; to < party_count; to++)
            if (able[i] >> to & 1) {
                preemptions[preemption_count].step = i;
                preemptions[preemption_count++].to = to;
                count += run_bounded(script, most);
                preemption_count--;
            }
    free(able);
    return count;
}

static int read_token(const char *text)
{
    static const char *const verbs[] = {"shows", "loads", "older", "exchanges", "rings", "wakes",
                                        "dies",  "silent", "gone", "back"};
    struct token *token = &tokens[token_count];
    char what[16], class[32];
    unsigned i;
    if (token_count == 4096 ||
        sscanf(text, "%u:%15[^:]:%31[^:]:%u:%u:%u:%u", &token->party, what, class, &token->label.a,
               &token->label.b, &token->others, &token->waits) < 5)
        return 0;
    for (i = 0; i < sizeof verbs / sizeof *verbs && strcmp(verbs[i], what) != 0;)
        i++;
    token->what = (enum what)i;
    for (i = 0; i < CLASSES && strcmp(class_names[i], class) != 0;)
        i++;
    token->label.class = (enum word_class)i;
    token_count++;
    has_word[i % CLASSES] = 1;
    if (token->label.class == CLAIM && token->label.b < 8)
        has_claim[token->label.a % IVSHMEM_MOST_WRITERS][token->label.b] = 1;
    if (token->label.class == NUMBER)
        has_place[token->label.a] = 1;
    has_two_parts |= token->label.class == CELL && token->label.b % 8 == 1;
    return i < CLASSES && token->party < party_count;
}

static void follow_all(const struct script *script)
{
    static char line[1 << 17];
    long count = 0, followed = 0, forbidden = 0, loose = 0;
    while (fgets(line, sizeof line, stdin) != NULL) {
        token_count = token_at = 0;
        has_two_parts = 0;
        memset(has_place, 0, sizeof has_place);
        memset(has_word, 0, sizeof has_word);
        memset(is_silent, 0, sizeof is_silent);
        memset(has_claim, 0, sizeof has_claim);
        memset(early_count, 0, sizeof early_count);
        for (char *text = strtok(line, " \n"); text != NULL; text = strtok(NULL, " \n"))
            if (!read_token(text)) {
                fprintf(stderr, "not a step: %s\n", text);
                exit(2);
            }
        strayed = NULL;
        is_forbidden = is_loose = 0;
        count++;
        if (!again(script)) {
            char how[64];
            snprintf(how, sizeof how, "schedule %ld, at its step %u,", count, token_at);
            report(script, how);
        }
        if (trace && strayed)
            printf("strayed at %u of %u: %s\n", token_at, token_count, strayed);
        if (trace && is_forbidden)
            printf("forbidden at %u of %u\n", token_at, token_count);
        forbidden += is_forbidden;
        loose += is_loose;
        followed += strayed == NULL && !is_forbidden;
    }
    printf("%s: %ld schedules, %ld followed, %ld forbidden, %ld loose;", script->name, count, followed,
           forbidden, loose);
    for (unsigned i = 0; i < CLASSES; i++)
        if (omitted[i] || extra[i])
            printf(" %s -%u +%u", class_names[i], omitted[i], extra[i]);
    printf("\n");
}

static void prepare(const struct script *script)
{
    region = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    first_memory = malloc(SIZE);
    script->prepare();
    memcpy(first_memory, region, SIZE);
    memcpy(first_peers, peers, sizeof peers);
    used_from = the_channel->area.places_at;
    used_to = the_channel->at + the_channel->layout.size;
}

static inline int run_scripts(int argc, char **argv, const struct script *scripts, size_t count)
{
    while (argc > 1 && argv[1][0] == '-') {
        int used = strcmp(argv[1], "-without") == 0 && argc > 2 ? 2 : 1;
        if (used == 2)
            removed_point = atoi(argv[2]);
        else if (strcmp(argv[1], "-relaxed") == 0)
            loads_are_relaxed = 1;
        else
            trace = 1;
        argc -= used;
        argv += used;
    }
    for (size_t i = 0; argc > 2 && i < count; i++) {
        long most = argc > 3 ? atol(argv[3]) : 0;
        if (strcmp(scripts[i].name, argv[2]) != 0)
            continue;
        prepare(&scripts[i]);
        held = -1;
        if (strcmp(argv[1], "random") == 0) {
            way = RANDOM;
            printf("%s: %ld schedules\n", scripts[i].name,
                   run_random(&scripts[i], most, argc > 4 ? atol(argv[4]) : 0));
        } else if (strcmp(argv[1], "bounded") == 0) {
            long total, stores;
            way = BOUNDED;
            total = run_bounded(&scripts[i], (unsigned)most);
            stores = shown;
            for (held = 0; argc > 4 && held < stores; held++)
                total += run_bounded(&scripts[i], (unsigned)most);
            printf("%s: %ld schedules\n", scripts[i].name, total);
        } else {
            way = FOLLOW;
            follow_all(&scripts[i]);
        }
        return 0;
    }
    fprintf(stderr, "usage: %s [-v] [-without POINT | -relaxed] random|bounded|follow SCRIPT ..\n", argv[0]);
    return 2;
}

#endif
