"""Random workflow programs: what they are made of, and an interpreter that runs one as a workflow.

What a program sees is written to a log, which is its result: so the order of delivery can be seen in the result. Every
call has its place in the program as its argument, so a call that gets another's key is a ReplayMismatch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from random import Random
from typing import Any, Literal
from uuid import UUID

from hypothesis import strategies as st

import perdure
from perdure import Retry, StepFailed, current, run_step, step

ONE_MORE = Retry(max_attempts=2, initial=timedelta(milliseconds=1))


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a step. `new`: it stands in the code only from the second life of a workflow on."""

    name: Literal["red", "green", "blue", "function"] = "red"
    ends: Literal["returns", "fails", "recovers"] = "returns"
    is_caught: bool = True
    undone: bool = False
    new: bool = False


@dataclass(frozen=True, slots=True)
class Value:
    kind: Literal["now", "random", "uuid4"]


@dataclass(frozen=True, slots=True)
class Sleep:
    milliseconds: int


@dataclass(frozen=True, slots=True)
class Library:
    """Somebody else's code that creates tasks, as many as it likes: another number in each life."""

    tasks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Timeout:
    milliseconds: int
    body: Node


@dataclass(frozen=True, slots=True)
class Sequence:
    nodes: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Spawn:
    """A task beside the sequence that it stands in, which waits for it at its end."""

    body: Node
    name: str | None


@dataclass(frozen=True, slots=True)
class Together:
    """Several at the same time."""

    how: Literal["gather", "tolerant gather", "gather of gathers", "group", "named group", "race", "as they come"]
    nodes: tuple[Node, ...]


Node = Call | Value | Sleep | Library | Timeout | Sequence | Spawn | Together


def programs(*, races: bool, edits: bool = False) -> st.SearchStrategy[Sequence]:
    """Any program; without races, the steps that are called don't depend on which of them ends first."""
    ends = st.sampled_from(["returns", "returns", "returns", "fails", "recovers"])
    call = st.builds(
        Call,
        name=st.sampled_from(["red", "red", "green", "blue", "function"]),
        ends=ends,
        is_caught=st.sampled_from([True, True, False]) if races else st.just(True),
        undone=st.booleans() if races else st.just(False),
        new=st.sampled_from([False, False, True]) if edits else st.just(False),
    )
    value = st.builds(Value, st.sampled_from(["now", "random", "uuid4"]))
    sleep = st.builds(Sleep, st.integers(0, 6))
    library = st.builds(Library, st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)))
    leaf = call | call | call | value | sleep | library
    ways = ["gather", "tolerant gather", "gather of gathers", "group", "named group", "as they come"]
    if races:
        ways += ["race", "race"]

    def larger(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        nodes = st.lists(inner, min_size=1, max_size=4).map(tuple)
        together = st.builds(Together, st.sampled_from(ways), nodes)
        made = together | together | st.builds(Sequence, nodes)
        made = made | st.builds(Spawn, inner, st.sampled_from([None, None, "beside", "a/b#2"]))
        return made | st.builds(Timeout, st.integers(1, 8), inner) if races else made

    node = st.recursive(leaf, larger, max_leaves=12)
    return st.builds(Sequence, st.lists(node, min_size=2, max_size=5).map(tuple))


class Failure(Exception):
    """What a step fails with; it says where."""


FAILURES = (Failure, StepFailed)


@dataclass(frozen=True, slots=True)
class End:
    """What ends a life of a workflow early: after so many ticks, its worker loses it, with what it had to write.

    `in_order`: it hands it over instead, behind what it has recorded.
    """

    after: int
    in_order: bool = False


@dataclass(slots=True)
class Story:
    """A program, and what became of it, in all lives of its workflow."""

    program: Sequence
    ends: tuple[End, ...] = ()
    seed: int = 0
    lives: list[Life] = field(default_factory=list)


class Life:
    """One run of a program."""

    def __init__(self, story: Story, epoch: int, cut_short: Callable[[bool], None]) -> None:
        self.story = story
        self.number = len(story.lives)
        self.epoch = epoch
        self.log: list[str] = []
        self.bodies: list[str] = []
        """The keys of the steps whose bodies began."""
        self.effects: list[tuple[str, tuple[str, ...]]] = []
        """Where a step's body began, and the log when that step was called."""
        self._called: dict[str, tuple[str, ...]] = {}
        self._chance = Random(f"{story.seed} {self.number}")
        self._ticks = 0
        self._end = story.ends[self.number] if self.number < len(story.ends) else None
        self._cut_short = cut_short
        self._libraries: list[asyncio.Task[None]] = []

    def tick(self) -> None:
        self._ticks += 1
        if self._end is not None and self._ticks == self._end.after:
            self._cut_short(self._end.in_order)

    def say(self, what: str) -> None:
        self.log.append(what)
        self.tick()

    # --- the bodies of steps ---------------------------------------------------------------------------------------

    async def body(self, where: str, ends: str) -> str:
        self.bodies.append(current().idempotency_key.partition("/")[2])
        self.effects.append((where, self._called.get(where, ())))
        self.tick()
        pause = self._chance.choice([0.0, 0.0, 0.0005, 0.001, 0.002, 0.004])
        if pause:
            await asyncio.sleep(pause)
        self.tick()
        if ends == "fails" or (ends == "recovers" and current().attempt == 1):
            raise Failure(where)
        return where

    # --- the code of the workflow ----------------------------------------------------------------------------------

    async def run(self) -> list[str]:
        try:
            await self.sequence(self.story.program, "")
        except Exception as error:
            self.say(f"ended with {_described(error)}")
        return self.log

    def node(self, node: Node, where: str) -> Coroutine[Any, Any, None]:
        verbs: dict[type, Callable[[Any, str], Coroutine[Any, Any, None]]] = {
            Call: self.call,
            Value: self.value,
            Sleep: self.sleep,
            Library: self.library,
            Timeout: self.timeout,
            Sequence: self.sequence,
            Spawn: self.alone,
            Together: self.together,
        }
        return verbs[type(node)](node, where)

    async def call(self, node: Call, where: str) -> None:
        if node.new and self.number == 0:
            return
        try:
            self.say(f"{where} gave {await self._step(node, where)}")
        except FAILURES as error:
            self.say(f"{where} failed: {error}")
            if not node.is_caught:
                raise
        except asyncio.CancelledError:
            if node.undone:
                await self._step(Call("blue"), f"{where} undone")
            raise

    def _step(self, node: Call, where: str) -> Coroutine[Any, Any, str]:
        self._called[where] = tuple(self.log)
        if node.new:
            return novel(where, node.ends)
        if node.name == "function":
            return run_step("function", self.body, where, node.ends, retry=ONE_MORE)
        return STEPS[node.name](where, node.ends)

    async def value(self, node: Value, where: str) -> None:
        make: dict[str, Callable[[], object]] = {
            "now": perdure.now,
            "random": lambda: perdure.random().random(),
            "uuid4": perdure.uuid4,
        }
        self.say(f"{where} made {make[node.kind]()}")

    async def sleep(self, node: Sleep, where: str) -> None:
        await perdure.sleep(timedelta(milliseconds=node.milliseconds))
        self.say(f"{where} slept")

    async def library(self, node: Library, where: str) -> None:
        async def background() -> None:
            await asyncio.sleep(0)

        count = node.tasks[self.number % len(node.tasks)]
        self._libraries += [asyncio.create_task(background()) for _ in range(count)]

    async def timeout(self, node: Timeout, where: str) -> None:
        try:
            async with perdure.timeout(timedelta(milliseconds=node.milliseconds)):
                self.say(f"{where} is in time")
                await self.node(node.body, f"{where}.0")
        except TimeoutError:
            self.say(f"{where} expired")

    async def sequence(self, node: Sequence, where: str) -> None:
        beside: list[asyncio.Task[None]] = []
        try:
            for place, each in _places(where, node.nodes):
                if isinstance(each, Spawn):
                    beside.append(asyncio.create_task(self.node(each.body, place), name=each.name))
                else:
                    await self.node(each, place)
            for task in beside:
                await task
        finally:
            for task in beside:
                task.cancel()

    async def alone(self, node: Spawn, where: str) -> None:
        await asyncio.create_task(self.node(node.body, where), name=node.name)

    async def together(self, node: Together, where: str) -> None:
        children = list(_places(where, node.nodes))
        match node.how:
            case "gather" | "tolerant gather":
                outcomes = await asyncio.gather(
                    *(self.node(each, place) for place, each in children), return_exceptions=node.how != "gather"
                )
                self.say(f"{where} gathered {[_described(outcome) for outcome in outcomes]}")
            case "gather of gathers":
                await asyncio.gather(*(asyncio.gather(self.node(each, place)) for place, each in children))
                self.say(f"{where} gathered all")
            case "group" | "named group":
                await self._group(children, where, is_named=node.how == "named group")
            case "race":
                await self._race(children, where)
            case "as they come":
                await self._as_they_come(children, where)

    async def _group(self, children: list[tuple[str, Node]], where: str, *, is_named: bool) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for number, (place, each) in enumerate(children):
                    group.create_task(self.node(each, place), name=f"member {number // 2}" if is_named else None)
        except* FAILURES as errors:
            self.say(f"{where} lost {_described(errors)}")
        self.say(f"{where} joined")

    async def _race(self, children: list[tuple[str, Node]], where: str) -> None:
        tasks = [asyncio.create_task(self.node(each, place)) for place, each in children]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:  # not in the order of a set
                task.cancel()
        self.say(f"{where} won by {[number for number, task in enumerate(tasks) if task in done]}")
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        self.say(f"{where} raced {[_described(outcome) for outcome in outcomes]}")

    async def _as_they_come(self, children: list[tuple[str, Node]], where: str) -> None:
        async def placed(place: str, node: Node) -> str:
            await self.node(node, place)
            return place

        tasks = [asyncio.create_task(placed(place, each)) for place, each in children]
        for task in tasks:
            task.add_done_callback(_hear)  # nobody asks for the rest where this is cancelled
        results = perdure.as_completed(tasks)
        while True:
            try:
                self.say(f"{where} got {await anext(results)}")
            except FAILURES as error:
                self.say(f"{where} got a failure: {error}")
            except StopAsyncIteration:
                return


def _hear(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()


LIVES: dict[UUID, Life] = {}
"""The life that each workflow is in."""


async def _body(where: str, ends: str) -> str:
    return await LIVES[current().id].body(where, ends)


@step(name="red", retry=ONE_MORE, raises=(Failure,))
async def red(where: str, ends: str) -> str:
    return await _body(where, ends)


green = red.with_options(name="green")
blue = red.with_options(name="blue")
novel = red.with_options(name="novel")
STEPS = {"red": red, "green": green, "blue": blue}


def _places(where: str, nodes: tuple[Node, ...]) -> Iterator[tuple[str, Node]]:
    return ((f"{where}.{number}", node) for number, node in enumerate(nodes))


def _described(outcome: object) -> str:
    if isinstance(outcome, BaseExceptionGroup):
        return f"a group of {[_described(error) for error in outcome.exceptions]}"
    return f"{type(outcome).__name__}: {outcome}"
