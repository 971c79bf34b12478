"""Which step is which, and what comes first: the same on every replay, and after most edits of the code."""

from __future__ import annotations

import asyncio
import gc
import re
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import pytest

import perdure
from acceptance.support import SOON, Gate, hold, interrupted, replayed, served
from perdure import App, Handle, NotInWorkflow, ReplayMismatch, as_completed, now, run_step, step, telemetry, uuid4

Code = Callable[[], Coroutine[Any, Any, Any]]


@step
async def note(what: str) -> str:
    return what


async def keys(handle: Handle[Any]) -> list[str]:
    """The keys of what it recorded, in order; without the step that holds it up."""
    steps = sorted(await handle.steps(), key=lambda each: (each.position or 0, each.key))
    return [each.key for each in steps if each.name != "hold"]


class Edited:
    """A workflow that is interrupted at a gate, and goes on with other code."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.gate = Gate()
        self.code: Code

        @app.workflow
        async def edited() -> Any:
            return await self.code()

        self._workflow = edited

    @asynccontextmanager
    async def began_with(self, code: Code) -> AsyncIterator[Handle[Any]]:
        self.code = code
        async with interrupted(self.app, self._workflow(), self.gate) as handle:
            yield handle

    async def goes_on(self, handle: Handle[Any], code: Code) -> Any:
        self.code = code
        return await served(self.app, handle)


@pytest.fixture
def edited(app: App) -> Edited:
    return Edited(app)


# --- order -----------------------------------------------------------------------------------------------------------

NAMES = ["a", "b", "c", "d"]
ORDER = ["c", "a", "d", "b"]


class Runners:
    """Steps that end in an order that isn't that of their names: each lets the next go when it has been seen."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.seen: list[list[str]] = []
        self._turns = {name: asyncio.Event() for name in NAMES}

    def begin(self) -> list[str]:
        self._turns[ORDER[0]].set()
        came: list[str] = []
        self.seen.append(came)
        return came

    @step(name="run")
    async def __call__(self, name: str) -> str:
        self.ran.append(name)
        await self._turns[name].wait()
        return name

    async def into(self, came: list[str], name: str) -> None:
        self.saw(came, await self(name))

    def saw(self, came: list[str], name: str) -> None:
        came.append(name)
        if len(came) < len(ORDER):
            self._turns[ORDER[len(came)]].set()


async def _gather(run: Runners, came: list[str]) -> None:
    await asyncio.gather(*(run.into(came, name) for name in NAMES))


async def _gather_of_gathers(run: Runners, came: list[str]) -> None:
    await asyncio.gather(*(asyncio.gather(run.into(came, name)) for name in NAMES))


async def _group(run: Runners, came: list[str]) -> None:
    async with asyncio.TaskGroup() as group:
        for name in NAMES:
            group.create_task(run.into(came, name))


async def _wait(run: Runners, came: list[str]) -> None:
    pending = {asyncio.ensure_future(run(name)) for name in NAMES}
    while pending:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            run.saw(came, task.result())


async def _as_completed(run: Runners, came: list[str]) -> None:
    async for name in as_completed([run(name) for name in NAMES]):
        run.saw(came, name)


async def _as_completed_of_asyncio(run: Runners, came: list[str]) -> None:
    for each in asyncio.as_completed([run(name) for name in NAMES]):
        run.saw(came, await each)


async def _callbacks(run: Runners, came: list[str]) -> None:
    tasks = [asyncio.create_task(run(name)) for name in NAMES]
    for task in tasks:
        task.add_done_callback(lambda task: run.saw(came, task.result()))
    await asyncio.wait(tasks)


async def _shielded(run: Runners, came: list[str]) -> None:
    async def one(name: str) -> None:
        run.saw(came, await asyncio.shield(asyncio.create_task(run(name))))

    await asyncio.gather(*(one(name) for name in NAMES))


async def _wait_for_shields(run: Runners, came: list[str]) -> None:
    pending = {asyncio.shield(asyncio.create_task(run(name))) for name in NAMES}
    while pending:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for each in done:
            run.saw(came, each.result())


@pytest.mark.parametrize(
    "way",
    [
        _gather,
        _gather_of_gathers,
        _group,
        _wait,
        _as_completed,
        _as_completed_of_asyncio,
        _callbacks,
        _shielded,
        _wait_for_shields,
    ],
    ids=lambda way: way.__name__.strip("_"),
)
async def test_outcomes_are_served_in_the_order_in_which_they_came(app: App, way: Any) -> None:
    gate, run = Gate(), Runners()

    @app.workflow
    async def flow() -> list[str]:
        came = run.begin()
        await way(run, came)
        await hold(gate)
        return came

    assert await replayed(app, flow(), gate) == ORDER
    assert run.seen == [ORDER, ORDER]
    assert sorted(run.ran) == NAMES, "nothing ran twice"


@pytest.mark.parametrize(("wrap", "times"), [(asyncio.gather, 12), (asyncio.shield, 3)])
async def test_what_passes_through_many_futures_arrives_before_the_next_outcome(
    app: App, wrap: Callable[[Any], Any], times: int
) -> None:
    """However deep the first is wrapped, the second may come late, or at once, as on a replay."""
    gate, late = Gate(), asyncio.Event()
    seen: list[list[str]] = []

    @step
    async def wait_for(name: str) -> str:
        if name == "late":
            await late.wait()
        return name

    @app.workflow
    async def flow() -> None:
        came: list[str] = []
        seen.append(came)

        async def lately() -> None:
            came.append(await wait_for("late"))

        task = asyncio.create_task(lately())
        wrapped: asyncio.Future[Any] = asyncio.ensure_future(wait_for("early"))
        for _ in range(times):
            wrapped = wrap(wrapped)
        await wrapped
        came.append("early")
        late.set()
        await task
        await hold(gate)

    await replayed(app, flow(), gate)
    assert seen == [["early", "late"]] * 2


async def test_a_race_that_is_won_by_a_timer_is_won_by_it_again(app: App) -> None:
    gate, slow = Gate(), asyncio.Event()
    seen: list[list[str]] = []

    @step
    async def slowly() -> None:
        await slow.wait()

    @app.workflow
    async def flow() -> None:
        came: list[str] = []
        seen.append(came)

        async def work() -> None:
            await slowly()
            came.append("work")

        async def sleep() -> None:
            await perdure.sleep(timedelta(milliseconds=1))
            came.append("sleep")
            slow.set()

        await asyncio.gather(work(), sleep())
        await hold(gate)

    await replayed(app, flow(), gate)
    assert seen == [["sleep", "work"]] * 2


async def test_a_limit_of_time_begins_where_it_began_before_other_tasks_go_on(app: App) -> None:
    gate = Gate()
    seen: list[list[str]] = []

    @app.workflow
    async def flow() -> None:
        came: list[str] = []
        seen.append(came)

        async def beside() -> None:
            await note("beside")
            came.append("beside")

        task = asyncio.create_task(beside())
        async with perdure.timeout(timedelta(hours=1)):
            came.append("within")
            await task
        await hold(gate)

    await replayed(app, flow(), gate)
    assert seen == [["within", "beside"]] * 2


# --- identity --------------------------------------------------------------------------------------------------------


async def test_a_key_is_the_path_of_tasks_and_the_occurrence_of_a_name(app: App) -> None:
    @app.workflow
    async def flow() -> None:
        async def part(name: str) -> None:
            await note(name)
            await note(name)

        await note("first")
        await asyncio.create_task(part("a"), name="first")
        await asyncio.create_task(part("b"), name="first")
        await asyncio.create_task(part("c"), name="50%/#$")
        await asyncio.create_task(note("d"), name="of a step")

    async with app.worker():
        handle = await app.start(flow())
        await handle.result()
    named = [f"{path}note{n}" for path in ("first/", "first#2/", "50%25%2F%23%24/") for n in ("", "#2")]
    assert await keys(handle) == ["note", *named, "note#2"], "a call has its key before it is a task"


async def test_tasks_without_a_name_are_known_by_their_coroutine(app: App) -> None:
    async def part(name: str) -> None:
        await note(name)

    async def other(name: str) -> None:
        await note(name)

    @app.workflow
    async def flow() -> None:
        for make in (part, other, part):
            await asyncio.create_task(make("x"))

    async with app.worker():
        handle = await app.start(flow())
        await handle.result()
    paths = [part.__qualname__, other.__qualname__, f"{part.__qualname__}#2"]
    assert await keys(handle) == [f"{path}/note" for path in paths]


async def test_tasks_of_a_library_shift_nobody(app: App) -> None:
    gate = Gate()
    counts = iter([0, 3])

    async def part(name: str) -> str:
        return await note(name)

    async def background() -> None:
        await asyncio.sleep(0)

    @app.workflow
    async def flow() -> list[str]:
        count = next(counts)
        tasks = [asyncio.create_task(background()) for _ in range(count)]
        first = asyncio.create_task(part("a"))
        tasks += [asyncio.create_task(background()) for _ in range(count)]
        found = [await first, await asyncio.create_task(part("b"))]
        await hold(gate)
        return [*found, await part("c")]

    async with interrupted(app, flow(), gate) as handle:
        before = await keys(handle)
    assert await served(app, handle) == ["a", "b", "c"]
    path = part.__qualname__
    assert before == [f"{path}/note", f"{path}#2/note"]
    assert await keys(handle) == [*before, "note"]


async def test_a_named_task_that_nobody_remembers_still_counts_under_its_name(app: App) -> None:
    async def part(what: str | None) -> None:
        if what is not None:
            await note(what)

    @app.workflow
    async def flow() -> None:
        await asyncio.create_task(part(None), name="forgotten")
        gc.collect()
        await asyncio.create_task(part("x"))

    async with app.worker():
        handle = await app.start(flow())
        await handle.result()
    assert await keys(handle) == [f"{part.__qualname__}/note"]


async def test_tasks_that_end_leave_nothing_behind(app: App) -> None:
    """A workflow may live long: what it has gathered isn't kept until its end."""
    left: list[int] = []

    @app.workflow
    async def flow() -> None:
        scope = perdure.current()
        for _ in range(20):
            await asyncio.gather(*(note("x") for _ in range(5)))
        left.append(len(scope._children))  # type: ignore[attr-defined]

    async with app.worker():
        await app.run(flow())
    assert left == [0]


async def test_a_primitive_in_a_task_that_is_not_of_the_workflow_is_refused(app: App) -> None:
    asked: asyncio.Queue[Callable[[], object] | None] = asyncio.Queue()
    answers: asyncio.Queue[str] = asyncio.Queue()

    async def stranger() -> None:
        while (ask := await asked.get()) is not None:
            try:
                ask()
            except NotInWorkflow as error:
                answers.put_nowait(str(error))

    task = asyncio.create_task(stranger())

    @app.workflow
    async def flow() -> list[str]:
        for ask in (now, uuid4, perdure.random, lambda: perdure.timeout(SOON)):
            asked.put_nowait(ask)
        return [await answers.get() for _ in range(4)]

    async with app.worker():
        found = await app.run(flow())
    asked.put_nowait(None)
    await task
    assert [re.findall(r"\w+\(\)", text)[0] for text in found] == ["now()", "uuid4()", "random()", "timeout()"]
    assert all("call it inside a workflow" in text or "elsewhere" in text for text in found)


async def test_code_that_outlives_its_workflow_is_not_told_how_a_step_ended(app: App) -> None:
    go = asyncio.Event()
    told: list[BaseException] = []

    @step
    async def fails() -> None:
        await go.wait()
        raise ValueError

    async def beside() -> None:
        try:
            await fails()
        except Exception as error:
            told.append(error)

    @app.workflow
    async def flow() -> None:
        task = asyncio.create_task(beside())
        await note("x")
        go.set()
        assert not task.done()

    async with app.worker():
        await app.run(flow())
    assert told == [], "it would act on what nobody has recorded"


async def test_what_a_step_creates_is_none_of_the_workflow(app: App) -> None:
    async def part() -> str:
        return await note("in the step")

    async def body() -> str:
        return await asyncio.create_task(part(), name="of the step")

    @app.workflow
    async def flow() -> str:
        return await run_step("body", body) + await note(", and after it")

    async with app.worker():
        handle = await app.start(flow())
        assert await handle.result() == "in the step, and after it"
    assert await keys(handle) == ["body", "note"]


# --- edits of the code that a running workflow survives --------------------------------------------------------------


async def test_a_step_that_is_new_in_the_middle_runs_and_moves_no_other(edited: Edited) -> None:
    ran: list[str] = []

    @step
    async def work(what: str) -> str:
        ran.append(what)
        return what

    @step
    async def novel() -> str:
        ran.append("novel")
        return "novel"

    async def before() -> list[str]:
        found = [await work("a"), await work("b")]
        await hold(edited.gate)
        return [*found, await work("c")]

    async def after() -> list[str]:
        found = [await work("a"), await novel(), await work("b")]
        await hold(edited.gate)
        return [*found, await work("c")]

    async with edited.began_with(before) as handle:
        pass
    assert await edited.goes_on(handle, after) == ["a", "novel", "b", "c"]
    assert ran == ["a", "b", "novel", "c"]
    assert await keys(handle) == ["work", "work#2", "novel", "work#3"]


async def test_a_step_that_is_new_in_a_task_waits_until_the_others_are_served(edited: Edited) -> None:
    seen: list[str] = []

    @step
    async def work(what: str) -> str:
        return what

    @step
    async def novel() -> str:
        return "novel"

    async def part(name: str, *, is_new: bool) -> None:
        if is_new and name == "a":
            seen.append(await novel())
        seen.append(await work(f"{name}1"))
        seen.append(await work(f"{name}2"))

    def code(*, is_new: bool) -> Code:
        async def run() -> None:
            seen.clear()
            async with asyncio.TaskGroup() as group:
                for name in "ab":
                    group.create_task(part(name, is_new=is_new), name=name)
            await hold(edited.gate)

        return run

    async with edited.began_with(code(is_new=False)) as handle:
        assert sorted(seen) == ["a1", "a2", "b1", "b2"]
    await edited.goes_on(handle, code(is_new=True))
    assert seen == ["b1", "b2", "novel", "a1", "a2"]


async def test_a_task_that_is_new_in_the_code_shifts_nobody(edited: Edited) -> None:
    ran: list[str] = []

    @step
    async def work(what: str) -> str:
        ran.append(what)
        return what

    async def part(what: str) -> str:
        return await work(what)

    async def audit() -> str:
        return await work("audit")

    async def before() -> list[str]:
        found = list(await asyncio.gather(part("a"), part("b")))
        await hold(edited.gate)
        return found

    async def after() -> list[str]:
        named = asyncio.create_task(part("named"), name="another")
        found = list(await asyncio.gather(audit(), part("a"), part("b")))
        await hold(edited.gate)
        return [*found, await named]

    async with edited.began_with(before) as handle:
        pass
    assert await edited.goes_on(handle, after) == ["audit", "a", "b", "named"]
    assert sorted(ran) == ["a", "audit", "b", "named"]


async def test_a_step_that_is_gone_is_told(edited: Edited, events: Any) -> None:
    async def before() -> str:
        await note("gone")
        await asyncio.create_task(note("kept"), name="x")
        now()
        await hold(edited.gate)
        return "before"

    async def after() -> str:
        await note("gone")
        await hold(edited.gate)
        return "after"

    async with edited.began_with(before) as handle:
        pass
    assert await edited.goes_on(handle, after) == "after"
    (told,) = events.of(telemetry.StepsUnasked)
    assert (told.workflow_id, told.name, sorted(told.keys)) == (handle.id, "edited", ["note#2", "now()"])


async def test_a_step_with_another_name_is_a_new_step_and_the_old_one_is_told(edited: Edited, events: Any) -> None:
    async def before() -> str:
        found = await note("x")
        await hold(edited.gate)
        return found

    async def after() -> str:
        found: str = await run_step("remark", lambda: "y")
        await hold(edited.gate)
        return found

    async with edited.began_with(before) as handle:
        pass
    assert await edited.goes_on(handle, after) == "y"
    (told,) = events.of(telemetry.StepsUnasked)
    assert told.keys == ("note",)


async def test_where_names_alone_count_arguments_may_differ(edited: Edited) -> None:
    @step(match="name")
    async def lenient(what: str) -> str:
        return what

    def code(what: str) -> Code:
        async def run() -> str:
            found = await lenient(what)
            await hold(edited.gate)
            return found

        return run

    async with edited.began_with(code("before")) as handle:
        pass
    assert await edited.goes_on(handle, code("after")) == "before"


async def test_positional_or_named_arguments_are_the_same(edited: Edited) -> None:
    async def before() -> str:
        found = await note("x")
        await hold(edited.gate)
        return found

    async def after() -> str:
        found = await note(what="x")
        await hold(edited.gate)
        return found

    async with edited.began_with(before) as handle:
        pass
    assert await edited.goes_on(handle, after) == "x"


# --- and those that it doesn't ---------------------------------------------------------------------------------------


async def _first(gate: Gate, call: Callable[[], Any]) -> Any:
    await note("zeroth")
    found = call()
    if asyncio.iscoroutine(found):
        found = await found
    await hold(gate)
    return found if isinstance(found, str) else ""


def _step_called(name: str) -> Callable[[], Any]:
    return lambda: run_step(name, lambda: "")


MISMATCHES = [
    pytest.param(
        lambda: note("x"),
        lambda: note("y"),
        ("note#2", "step 'note'", "step 'note' with other arguments"),
        id="arguments",
    ),
    pytest.param(now, _step_called("now()"), ("now()", "a value", "step 'now()'"), id="a step, not a value"),
    pytest.param(
        _step_called("uuid4()"), uuid4, ("uuid4()", "step 'uuid4()'", "a value (uuid4())"), id="a value, not a step"
    ),
    pytest.param(
        _step_called("sleep()"),
        lambda: perdure.sleep(timedelta(0)),
        ("sleep()", "step 'sleep()'", "sleep()"),
        id="a wait, not a step",
    ),
    pytest.param(
        lambda: perdure.sleep(timedelta(0)),
        _step_called("sleep()"),
        ("sleep()", "a sleep", "step 'sleep()'"),
        id="a step, not a wait",
    ),
]


@pytest.mark.parametrize(("before", "after", "said"), MISMATCHES)
async def test_a_replay_that_asks_for_something_else_says_what_and_where(
    database_url: str, schema: str, before: Any, after: Any, said: tuple[str, str, str]
) -> None:
    gate = Gate()

    @asynccontextmanager
    async def version(version: str, call: Any) -> AsyncIterator[tuple[App, Any]]:
        async with App("versions", database_url=database_url, schema=schema, version=version) as app:

            @app.workflow
            async def flow() -> Any:
                return await _first(gate, call)

            yield app, flow

    async with version("1.0", before) as (app, flow), interrupted(app, flow(), gate) as handle:
        pass
    async with version("2.0", after) as (app, _):
        with pytest.raises(ReplayMismatch) as caught:
            await served(app, app.handle(handle.id))
    error = caught.value
    assert (error.key, error.recorded, error.asked) == said
    assert (error.position, error.recorded_version, error.version) == (2, "1.0", "2.0")
    text = str(error)
    for part in (f"replay of {said[0]!r} (outcome 2)", f"recorded was {said[1]}, by version 1.0", "(version 2.0)"):
        assert part in text
    for advice in ("patched()", "match='name'", "resume"):
        assert advice in text


async def test_code_cannot_catch_a_mismatch(edited: Edited) -> None:
    async def before() -> None:
        await note("x")
        await hold(edited.gate)

    async def after() -> str:
        try:
            await note("y")
        except Exception:
            await note("this must not happen")
        return "caught"

    async with edited.began_with(before) as handle:
        pass
    with pytest.raises(ReplayMismatch):
        await edited.goes_on(handle, after)
    assert "note#2" not in await keys(handle)


async def test_a_mismatch_in_a_task_ends_the_workflow(edited: Edited) -> None:
    def code(what: str) -> Code:
        async def run() -> list[Any]:
            found = await asyncio.gather(note("a"), note(what), return_exceptions=True)
            await hold(edited.gate)
            return [str(each) for each in found]

        return run

    async with edited.began_with(code("b")) as handle:
        pass
    with pytest.raises(ReplayMismatch) as caught:
        await edited.goes_on(handle, code("c"))
    assert caught.value.key == "note#2"


async def test_what_failed_from_a_mismatch_goes_on_when_the_code_is_mended(edited: Edited) -> None:
    def code(what: str) -> Code:
        async def run() -> str:
            found = await note(what)
            await hold(edited.gate)
            return found

        return run

    async with edited.began_with(code("x")) as handle:
        pass
    with pytest.raises(ReplayMismatch):
        await edited.goes_on(handle, code("y"))
    await handle.resume()
    assert await edited.goes_on(handle, code("x")) == "x"
