"""The explorer of the channels' model finds what write combining and arm64 can show.

Known small programs (litmus tests) say what each memory may show: each allowed outcome must be
found, and no other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from model.explorer import GONE, Case, End, explore, looks
from model.operations import (
    CompareExchange,
    Fault,
    FullFence,
    Load,
    LoadBarrier,
    Operation,
    Process,
    Ring,
    Store,
    StoreBarrier,
    Wait,
)


def program(*operations: Operation) -> Callable[[], Process]:
    """Return a process that does these, and returns what its loads have seen."""

    def run() -> Process:
        seen: tuple[Any, ...] = ()
        for number in range(len(operations)):
            answer = yield operations[number]
            if isinstance(operations[number], (Load, CompareExchange)):
                seen += (answer,)
        return seen

    return run


def outcomes(memory: Mapping[str, int], *programs: Callable[[], Process]) -> set[Any]:
    """Return what the programs' loads can have seen at their ends."""
    found: set[Any] = set()

    def check(end: End) -> None:
        found.add(tuple([end.results[f"p{number}"] for number in range(len(programs))]))

    processes = {f"p{number}": program for number, program in enumerate(programs)}
    assert explore(Case(processes, memory, check)).fault is None
    return found


X, Y = {"x": 0}, {"x": 0, "y": 0}


def test_a_store_waits_in_the_buffer_while_a_later_load_is_done() -> None:
    one: list[Operation] = [Store("x", 1), Load("y")]
    two: list[Operation] = [Store("y", 1), Load("x")]
    assert ((0,), (0,)) in outcomes(Y, program(*one), program(*two))
    one.insert(1, FullFence())
    assert ((0,), (0,)) in outcomes(Y, program(*one), program(*two))
    two.insert(1, FullFence())
    assert outcomes(Y, program(*one), program(*two)) == {((0,), (1,)), ((1,), (0,)), ((1,), (1,))}


@pytest.mark.parametrize("ordered", [(), ("stores",), ("loads",), ("stores", "loads")])
def test_a_message_arrives_before_its_flag_only_with_both_barriers(ordered: tuple[str]) -> None:
    stores: list[Operation] = [Store("x", 1), Store("y", 1)]
    loads: list[Operation] = [Load("y"), Load("x")]
    if "stores" in ordered:
        stores.insert(1, StoreBarrier())
    if "loads" in ordered:
        loads.insert(1, LoadBarrier())
    seen = {second for _, second in outcomes(Y, program(*stores), program(*loads))}
    assert seen == {(0, 0), (0, 1), (1, 1)} | ({(1, 0)} if len(ordered) < 2 else set())


def test_one_address_is_never_seen_going_back() -> None:
    stores = program(Store("x", 1), Store("x", 2))
    seen = {second for _, second in outcomes(X, stores, program(Load("x"), Load("x")))}
    assert seen == {(a, b) for a in range(3) for b in range(a, 3)}


def test_a_process_sees_its_own_stores_at_once() -> None:
    assert outcomes(X, program(Store("x", 1), Load("x")), program(Store("x", 2))) == {
        ((1,), ()),
        ((2,), ()),
    }


def test_an_exchange_is_one_step() -> None:
    exchange = program(CompareExchange("x", 0, 1))
    assert outcomes(X, exchange, exchange) == {((0,), (1,)), ((1,), (0,))}


def test_a_store_that_may_overtake_a_load_is_a_fault() -> None:
    load_then_store = program(Load("x"), Store("y", 1))
    found = explore(Case({"p": load_then_store, "q": program(Store("x", 1))}, Y, lambda _: None))
    assert found.fault == "p: the store to y may overtake loads before it"


def test_a_ring_is_not_lost_and_a_lost_ring_is_found() -> None:
    def case(*sleeper: Operation) -> Case:
        programs = {"p": program(*sleeper), "q": program(Ring("p"))}
        return Case(programs, X, lambda _: None)

    assert explore(case(Wait())).fault is None
    found = explore(case(Wait(), Wait()))
    assert found.fault == "asleep for ever: p"
    assert found.schedule == ["q rings p", "p wakes"]


def test_waiting_for_what_never_comes_is_found_also_if_it_does_not_sleep() -> None:
    def spin() -> Process:
        while (yield Load("x")) == 0:
            yield LoadBarrier()

    programs = {"p": spin, "q": program(Store("x", 1), Store("x", 0))}
    assert explore(Case(programs, X, lambda _: None)).fault == "no end can be reached from here"
    programs = {"p": spin, "q": program(Store("x", 1))}
    assert explore(Case(programs, X, lambda _: None)).fault is None


def test_the_dead_leave_any_part_of_their_buffer_that_its_order_allows() -> None:
    ends = set()

    def check(end: End) -> None:
        if "p" not in end.results:
            ends.add((end.memory["x"], end.memory["y"], end.memory["z"]))

    stores = program(Store("x", 1), Store("y", 1), StoreBarrier(), Store("z", 1))
    memory = {"x": 0, "y": 0, "z": 0}
    assert explore(Case({"p": stores}, memory, check, mortal=frozenset("p"))).fault is None
    assert ends == {(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0), (1, 1, 1)}


def test_a_death_is_seen_and_that_wakes_who_waits() -> None:
    def waits() -> Process:
        while (yield Load(looks("p"))) != GONE:
            yield LoadBarrier()
            yield Wait()
        return "gone"

    def check(end: End) -> str | None:
        return "p looks gone, but has ended" if "p" in end.results else None

    programs = {"p": program(Wait()), "q": waits}
    found = explore(Case(programs, {}, check, mortal=frozenset("p")), order="breadth")
    assert found.fault == "asleep for ever: p, q"  # if it does not die: that must not be needed
    programs = {"p": program(Ring("q"), Load("x"), Load("x")), "q": waits}
    found = explore(Case(programs, X, check, mortal=frozenset("p")))
    assert found.fault == "asleep for ever: q"  # if it does not die
    programs["q"] = program(Wait())
    programs["p"] = program(Load("x"), Ring("q"))
    assert explore(Case(programs, X, lambda _: None, mortal=frozenset("p"))).fault is None


def test_the_first_schedule_is_the_shortest_in_breadth() -> None:
    def reader() -> Process:
        for _ in range(4):
            if (yield Load("x")) == 3:
                raise Fault("three")
            yield LoadBarrier()

    programs = {"p": reader, "q": program(*[Store("x", number) for number in range(1, 4)])}
    found = explore(Case(programs, X, lambda _: None), order="breadth")
    assert found.fault == "p: three"
    assert found.schedule == [
        "q: x = 1 becomes visible",
        "q: x = 2 becomes visible",
        "q: x = 3 becomes visible",
        "p loads x: 3",
    ]


def test_states_are_one_only_if_the_rest_of_the_program_is() -> None:
    """Each loop's turn is a state, and so is how many will come; a dead variable makes none."""

    def count() -> Process:
        turns = yield Load("turns")
        yield LoadBarrier()
        for _ in range(turns):
            seen = yield Load("x")
            yield LoadBarrier()
            yield Store("x", seen + 1)

    ends = set()

    def check(end: End) -> None:
        ends.add(end.memory["x"])

    def choose() -> Process:
        yield Store("turns", 1)

    found = explore(Case({"p": count, "q": count}, {**X, "turns": 3}, check))
    assert ends == {2, 3, 4, 5, 6}
    programs = {"p": count, "q": choose}
    assert explore(Case(programs, {**X, "turns": 3}, check)).fault is None
    assert ends == {1, 2, 3, 4, 5, 6}
    assert found.locals["p"] == found.locals["q"] < 40
