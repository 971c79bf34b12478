"""Child workflows of one run: started with a checkpoint, waited for, and cancelled with their parent.

    asked for -> recorded, and started in the same flush -> it ends -> its turn -> how it ended is recorded

A child is a row of its own, and runs wherever a worker takes it. What the parent knows of it are two checkpoints: which
child was started (`checkout#c`), and how it ended (`checkout`), copied from the child's own result, so that a replay
needs nothing but the parent's history. A crash before the first is durable starts nothing; behind it, every replay
finds that child, and starts no other.

How the parent hears of the end:

- a child that ran in this process tells when its result is durable;
- any other leaves a note for its parent with its result (writer.py), and whoever finds the note counts up the parent's
  wakes (parents.py). A parent that runs looks at the results of those that it waits for; one that is out of memory
  becomes pending, and looks when it has replayed.

Who waits looks first, unless the child was started in this breath: a note that came before was for nobody.

A child may have ended before its parent knows that it was born: the flush got no answer, and another worker was quick.
A look that its note has caused doesn't find it among those that are waited for, as far as is known. So there is another
look when it is known, and the parent doesn't leave memory before.

When the parent is asked to end, the children that it has started, and that haven't ended, are asked to end, too,
unless they are detached; so are those for which nobody waits any more because the task that did was cancelled (a limit
of time, a task group). They are asked behind everything that is recorded, and the parent's own result waits until they
have been: should this process die in between, the next run comes by the same place, and asks again.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple, Protocol
from uuid import UUID

from perdure import failures
from perdure.authoring.context import CURRENT
from perdure.authoring.workflows import Invocation
from perdure.codec import Shape, shape
from perdure.engine import waiting
from perdure.errors import RunEnded, SerializationError, WorkflowNotFound
from perdure.failures import Catalogue
from perdure.hashing import arguments_hash
from perdure.model.keys import child_key
from perdure.model.records import Checkpoint, Recorded
from perdure.starts import prepare
from perdure.store.programs import NewWorkflow

_NAMES = ("name", "input")
ANY_SHAPE = shape(Any)


class Ended(NamedTuple):
    """How a child ended, as it was recorded."""

    status: str
    payload: str


class Host(waiting.Host, Protocol):
    """What a parent needs of its process."""

    catalogue: Catalogue
    version: str

    def look_for_children(self, id: UUID) -> None:
        """That run waits for children that may have ended already."""

    async def cancel_children(self, ids: Iterable[UUID]) -> None:
        """Ask these workflows to end; returns when they have been asked."""


class Parent(waiting.Waiter, Protocol):
    """What children need of the run that starts them."""

    id: UUID

    @property
    def host(self) -> Host: ...
    @property
    def children(self) -> Children: ...
    @property
    def is_asked_to_end(self) -> bool: ...
    @property
    def max_payload(self) -> int: ...
    def bear(self, checkpoint: Checkpoint, new: NewWorkflow) -> None: ...
    async def durable(self) -> None: ...
    def consider(self) -> None: ...
    def encoded(self, text: str) -> str: ...
    def decoded(self, text: str) -> str: ...


class Children:
    """What a run knows of its children."""

    def __init__(self, begun: dict[str, Recorded]) -> None:
        self.begun = begun
        """What former runs started, by the keys of the calls."""
        self.known: set[UUID] = set()
        """All that the code has started so far."""
        self._open: dict[UUID, None] = {}  # those that end with the parent
        self._waiting: dict[UUID, list[str]] = {}
        self._ended: dict[UUID, Ended] = {}
        self._asking: set[asyncio.Task[None]] = set()
        self._unborn: dict[UUID, int] = {}
        self.is_looked_for = False
        """Somebody is about to look for those that are waited for."""
        self._missed = False

    def look(self) -> list[UUID]:
        """Somebody looks for those that are waited for: as far as they are durable.

        Another one may have ended, too: its birth has got no answer yet. It is looked for when it has.
        """
        self._missed = any(id in self._unborn for id in self._waiting)
        return [id for id in self._waiting if id not in self._ended and id not in self._unborn]

    def looked(self, *, again: bool) -> None:
        """Somebody has; and will do it again, perhaps."""
        self.is_looked_for = again or self._missed

    def add(self, id: UUID, *, detached: bool) -> None:
        """The code has started one."""
        self.known.add(id)
        if not detached:
            self._open[id] = None

    def conceive(self, id: UUID, number: int) -> None:
        """It is started with the checkpoint of that number."""
        self._unborn[id] = number

    def written(self, number: int) -> bool:
        """Checkpoints up to that number are durable; returns whether somebody must look for the children of these."""
        count = len(self._unborn)
        while self._unborn and (first := next(iter(self._unborn))) and self._unborn[first] <= number:
            del self._unborn[first]
        return self._missed and len(self._unborn) < count

    def close(self, id: UUID) -> bool:
        """That one needn't be asked to end any more; returns whether it would have been."""
        if id in self._open:
            del self._open[id]
            return True
        return False

    def wait(self, id: UUID, key: str) -> bool:
        """The call of that key waits for a child; returns whether it has ended already, and another call knows."""
        self._waiting.setdefault(id, []).append(key)
        return id in self._ended

    def leave(self, id: UUID, key: str) -> Ended | None:
        """It waits no more; returns how the child ended, if it has."""
        keys = self._waiting[id]
        keys.remove(key)
        if keys:
            return self._ended.get(id)
        del self._waiting[id]
        return self._ended.pop(id, None)

    def ended(self, id: UUID, ended: Ended) -> list[str]:
        """A child has ended; returns the keys of the calls that wait for it."""
        self.close(id)
        if id not in self._waiting or id in self._ended:
            return []
        self._ended[id] = ended
        return self._waiting[id]

    def cancel(self, run: Parent, ids: Iterable[UUID] | None = None) -> None:
        """Ask those to end; None: all that end with their parent."""
        leaving = [id for id in (list(self._open) if ids is None else ids) if self.close(id)]
        if leaving:
            token = CURRENT.set(None)  # it is no task of the workflow's
            try:
                asking = run.host.loop.create_task(_cancel(run, leaving))
            finally:
                CURRENT.reset(token)
            self._asking.add(asking)
            asking.add_done_callback(self._asking.discard)
            asking.add_done_callback(lambda _: run.consider())

    @property
    def is_asking(self) -> bool:
        """Whether some are about to be asked to end: a run that left memory now would have forgotten it."""
        return bool(self._asking)

    def abandon(self) -> None:
        """The run is over: another one will come by the same place, and ask."""
        for asking in self._asking:
            asking.cancel()

    async def cancelled(self) -> None:
        """Wait until all that are to end have been asked."""
        while self._asking:
            await asyncio.wait(set(self._asking))


async def _cancel(run: Parent, ids: list[UUID]) -> None:
    try:
        await run.durable()  # they must be there
    except RunEnded:
        return  # the next run comes by the same place
    await run.host.cancel_children(ids)


async def start(run: Parent, key: str, new: NewWorkflow, *, detached: bool = False) -> UUID:
    """Start a child under the key that was drawn for it; returns its id, which is durable with the next flush."""
    id, _ = await _start(run, key, new, detached)
    return id


async def _start(run: Parent, key: str, new: NewWorkflow, detached: bool) -> tuple[UUID, bool]:
    """Its id, and whether it was started just now."""
    args_hash = arguments_hash(_NAMES, (new.name, run.decoded(new.input)), {})
    recorded = run.children.begun.pop(key, None)
    if recorded is None and key in run.history:
        raise run.mismatch(run.history[key], f"child workflow {new.name!r}")
    if recorded is None and (run.history or run.delivery.has_recorded or run.is_asked_to_end):
        await run.delivery.live()
        if run.over:
            raise RunEnded
    if recorded is not None:
        if recorded.args_hash != args_hash:
            raise run.mismatch(recorded, f"child workflow {new.name!r} with these arguments")
        id = UUID(json.loads(recorded.payload or "null"))
    else:
        id = new.id
        checkpoint = Checkpoint(
            child_key(key), "start", run.delivery.position, "success", json.dumps(str(id)), args_hash
        )
        run.bear(checkpoint, replace(new, parent_id=run.id, detached=detached))
    run.children.add(id, detached=detached)
    return id, recorded is None


async def call(run: Parent, key: str, invocation: Invocation[Any]) -> Any:
    """A child that is awaited: its value is returned, its failure raised."""
    new = prepare(invocation, encoded=run.encoded, version=run.host.version, limit=run.max_payload)
    id, is_new = await _start(run, key, new, False)
    workflow = invocation.workflow
    ended = await outcome(run, key, id, is_new=is_new)
    return _value(run, key, new.name, ended, ANY_SHAPE if workflow is None else workflow.shape)


async def outcome(run: Parent, key: str, id: UUID, *, is_new: bool = False, cancels: bool = True) -> Ended:
    """How a child ended, under the key of the call that waits for it.

    Args:
        run: The parent.
        key: The key.
        id: The child.
        is_new: It was started in this breath, so it can't have ended.
        cancels: It is asked to end when the task that waits is cancelled.
    """
    recorded = run.history.pop(key, None)
    if recorded is not None:
        if recorded.kind != "child":
            raise run.mismatch(recorded, f"the result of child workflow {id}")
        await run.delivery.replay(recorded.position)
        if run.over:
            raise RunEnded
        run.children.close(id)
        return Ended(recorded.status, recorded.payload or "null")
    try:
        if run.history or run.delivery.has_recorded:
            await run.delivery.live()
            is_new = False  # it may have ended meanwhile
        ended = await _wait(run, key, id, is_new)
        position = await run.delivery.turn()
    except asyncio.CancelledError:
        if cancels and not run.over:
            run.children.cancel(run, [id])
        raise
    payload = ended.payload if ended.status == "success" else failures.from_child(ended.payload, id)
    run.record(Checkpoint(key, "child", position, ended.status, payload), is_patient=True)
    return ended


async def _wait(run: Parent, key: str, id: UUID, is_new: bool) -> Ended:
    has_ended = run.children.wait(id, key)
    ended: Ended | None = None
    if not (is_new or has_ended):
        run.host.look_for_children(run.id)
    try:
        if not has_ended:
            await waiting.wait(run, key, "child", None)
    finally:
        ended = run.children.leave(id, key)
    assert ended is not None
    return ended


def missing(id: UUID) -> Ended:
    """What becomes of a wait for a child that isn't there any more."""
    return Ended("error", failures.record(WorkflowNotFound(id)))


def _value(run: Parent, key: str, name: str, ended: Ended, shape: Shape) -> Any:
    """What the child returned; what it failed with is raised."""
    if ended.status != "success":
        raise failures.of_child(run.host.catalogue, ended.payload, key)
    try:
        return shape.load(run.decoded(ended.payload))
    except (SerializationError, ValueError) as error:
        recorded = Recorded(key, "child", run.delivery.position, ended.status, ended.payload, 0, 1, None)
        raise run.mismatch(recorded, f"a result of workflow {name!r} that its annotation fits: {error}") from error
