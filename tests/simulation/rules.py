"""The rules of the protocols, each of which can be switched off: then some seed must fail.

A simulation that finds nothing may be blind. So each rule here names what it is for, and how the engine looks without
it; `python -m simulation --rules` plays seeds without each of them until one fails.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from perdure import management
from perdure.engine.claimer import Claimer
from perdure.engine.delivery import Delivery
from perdure.engine.executor import Executor
from perdure.engine.leases import Lease
from perdure.engine.recovery import Recovery
from perdure.engine.requests import Requests
from perdure.engine.run import Run
from perdure.engine.transactions import Transactions
from perdure.engine.writer import Part, Writer
from perdure.errors import RunEnded
from perdure.model.ids import new_id
from perdure.starter import Starter
from perdure.store.statements import SHARD, Statement, statements
from perdure.worker import Worker

_GENEROUS_SECONDS = 4.0

Patch = Callable[[Any, str, Any], None]
"""Sets an attribute for as long as the rule is off."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule of the protocols.

    Attributes:
        name: What it says.
        section: Where.
        switch_off: Makes the engine do without it.
    """

    name: str
    section: str
    switch_off: Callable[[Patch], None]


RULES: list[Rule] = []


def rule(name: str, section: str) -> Callable[[Callable[[Patch], None]], Callable[[Patch], None]]:
    """Declares what it is to do without a rule."""

    def declare(switch_off: Callable[[Patch], None]) -> Callable[[Patch], None]:
        RULES.append(Rule(name, section, switch_off))
        return switch_off

    return declare


def _sql(patch: Patch, name: str, *changes: tuple[str, str]) -> None:
    """Change the text of a statement."""
    known = statements("perdure")
    text = known[name].text.decode()
    for old, new in changes:
        changed = re.sub(old, new, text, flags=re.DOTALL)
        if changed == text:
            raise LookupError(f"statement {name!r} has nothing like {old!r}")
        text = changed
    patch(known, "_by_name", {**known._by_name, name: Statement(name=name, text=text.encode())})


_FLUSH = ("record", "complete", "settle")


@rule("a flush writes nothing unless all its entries are held", "3")
def _unfenced(patch: Patch) -> None:
    used = {"record": "$4", "complete": "$4 $18", "settle": "$4 $18 $25"}
    for name in _FLUSH:
        yes = " AND ".join(f"{param}::int8 IS NOT NULL" for param in used[name].split())
        _sql(
            patch,
            name,
            (
                r"all_held AS MATERIALIZED \(.*?\n\), recorded",
                f"all_held AS MATERIALIZED (SELECT {yes} AS yes), recorded",
            ),
        )


@rule("a flush locks its entries", "3")
def _unlocked(patch: Patch) -> None:
    for name in _FLUSH:
        _sql(patch, name, (r"\n    FOR (SHARE|UPDATE)", ""))


@rule("an epoch never goes back", "2")
def _epoch_reset(patch: Patch) -> None:
    for name, source in (("wake_due", "due"), ("send", "woken"), ("wake_parents", "woken")):
        _sql(patch, name, (rf"{source}\.epoch, {source}\.recoveries", f"0, {source}.recoveries"))


@rule("a suspension is refused where something has come", "9")
def _deaf_suspension(patch: Patch) -> None:
    seen = r"\(\(workflow_id, wakes\) IN \(SELECT item\.id, item\.wakes FROM unnest\(\$24::uuid\[\], \$26"
    ever = "((workflow_id, true) IN (SELECT item.id, item.wakes IS NOT NULL FROM unnest($24::uuid[], $26"
    _sql(patch, "settle", (seen, ever))


@rule("who has something counts up the wakes of an entry", "9")
def _uncounted(patch: Patch) -> None:
    for name in ("send", "cancel", "wake_parents"):
        _sql(
            patch,
            name,
            (
                r"UPDATE perdure\.queue_entries\n    SET wakes = wakes \+ 1",
                "UPDATE perdure.queue_entries\n    SET wakes = wakes",
            ),
        )


@rule("a sender locks the entry before it looks for the wait", "9")
def _unlocked_sender(patch: Patch) -> None:
    _sql(patch, "send", (r"\n    FOR UPDATE", ""))


@rule("only who deletes the wait inserts the entry", "9")
def _undeleted_wait(patch: Patch) -> None:
    _sql(
        patch,
        "wake_due",
        (
            r"DELETE FROM perdure\.waits\n    WHERE(.*?)\n    RETURNING ([^)]*?)\n\), woken",
            r"SELECT \2\n    FROM perdure.waits\n    WHERE\1\n), woken",
        ),
    )


@rule("an effect begins when everything before it is durable", "5")
def _no_barrier(patch: Patch) -> None:
    async def durable(self: Run) -> None:
        if self.over:
            raise RunEnded

    patch(Run, "durable", durable)


@rule("a claim takes no more than there are free slots", "7")
def _greedy(patch: Patch) -> None:
    patch(Executor, "free", property(lambda self: 10))


@rule("who has rested waits for a free slot", "9")
def _slotless(patch: Patch) -> None:
    moves = Executor.run_moves

    def run_moves(self: Executor, run: Run) -> bool:
        if not moves(self, run):
            del self._returning[run]
            self._active.add(run)
        return True

    patch(Executor, "run_moves", run_moves)


@rule("a claim's history is loaded behind the claim", "7")
def _loaded_early(patch: Patch) -> None:
    claim, histories = Claimer._claim, Claimer._histories
    early: dict[Any, Any] = {}

    async def claims(self: Claimer, queue: str, limit: int) -> Any:
        entries = Statement(name="entries", text=b"SELECT workflow_id FROM perdure.queue_entries")
        async with self._database.connection() as connection:
            rows = await self._database.execute(connection, entries, ())
        ids = [row.workflow_id for row in rows]
        early[self] = await histories(self, ids) if ids else {}
        return await claim(self, queue, limit)

    async def loads(self: Claimer, ids: list[Any]) -> Any:
        known = early.get(self, {})
        return {id: known[id] for id in ids if id in known} | await histories(self, [i for i in ids if i not in known])

    patch(Claimer, "_claim", claims)
    patch(Claimer, "_histories", loads)


@rule("a flush in doubt asks what is stored", "4")
def _trusting(patch: Patch) -> None:
    async def was_committed(self: Writer, parts: Sequence[Part]) -> bool:
        return True

    patch(Writer, "_was_committed", was_committed)


@rule("a claim without an answer is reconciled", "7")
def _unreconciled(patch: Patch) -> None:
    patch(Claimer, "doubt", lambda self: None)
    patch(Claimer, "beat", lambda self, held: None)


@rule("a lost lease ends its runs", "8")
def _immortal(patch: Patch) -> None:
    patch(Worker, "_lease_lost", lambda self, worker_id, reason: None)


@rule("a lease counts from before the beat was sent", "8")
def _late_lease(patch: Patch) -> None:
    def set_valid(self: Lease, until: float) -> None:
        self.__dict__["until"] = until + _GENEROUS_SECONDS if until else until

    patch(Lease, "_valid_until", property(lambda self: self.__dict__["until"], set_valid))


@rule("nobody is buried after an outage for having been cut off too", "8")
def _hasty_burial(patch: Patch) -> None:
    unbroken = (
        r"\n        AND me\.held_since.*?<= perdure\.now\(\)\n        AND me\.heartbeat_at.*?>= perdure\.now\(\)\)"
    )
    _sql(patch, "bury", (unbroken + r"\nRETURNING", ")\nRETURNING"))


@rule("what is recovered is found by the entries", "8")
def _forgotten(patch: Patch) -> None:
    async def look(self: Recovery) -> None:
        for dead in await self._database.attempt("bury", SHARD, self._lease.worker_id):
            await self._recover(dead.id)

    patch(Recovery, "_look", look)


@rule("a heartbeat tells what hints have missed", "9")
def _hints_only(patch: Patch) -> None:
    patch(Requests, "beat", lambda self, wakes: None)


@rule("the end of a child leaves a note", "3")
def _no_notes(patch: Patch) -> None:
    _sql(
        patch,
        "settle",
        (
            r"FROM unnest\(\$52::uuid\[\]\) AS item \(parent_id\)\n    WHERE",
            "FROM unnest($52::uuid[]) AS item (parent_id)\n    WHERE false AND",
        ),
    )


@rule("a run suspends only when all its tasks wait", "9")
def _impatient(patch: Patch) -> None:
    patch(Delivery, "is_busy", property(lambda self: False))


@rule("a cancellation has a place among the outcomes", "10")
def _placeless_cancel(patch: Patch) -> None:
    cancel = Run._cancel_now

    def cancel_now(self: Run, turn: Any) -> None:
        record = Run.record
        try:
            Run.record = lambda self, checkpoint, **options: None  # type: ignore[method-assign]
            cancel(self, turn)
        finally:
            Run.record = record  # type: ignore[method-assign]

    patch(Run, "_cancel_now", cancel_now)


@rule("outcomes are delivered in the recorded order", "11")
def _disorder(patch: Patch) -> None:
    async def replay(self: Delivery, position: int) -> None:
        await asyncio.sleep(0)

    patch(Delivery, "replay", replay)


@rule("a message that is sent again has the same id", "4")
def _new_ids(patch: Patch) -> None:
    send = management.send

    def sends(session: Any, topic: str, payload: str, id: Any, sender: Any = None, *, asks: bool = False) -> Any:
        async def reach(ids: Any) -> Any:
            verb = send(session, topic, payload, new_id(), sender, asks=asks)
            return await verb.reach(ids)

        verb = send(session, topic, payload, id, sender, asks=asks)
        return management.Verb(reach, verb.done_already, verb.moving, verb.refusals)

    patch(management, "send", sends)


@rule("a transactional step locks its run's entry before it commits", "13")
def _unfenced_transaction(patch: Patch) -> None:
    run = Transactions._run

    async def runs(self: Transactions, connection: Any, name: str, *params: object) -> Any:
        return [None] if name == "fence" else await run(self, connection, name, *params)

    patch(Transactions, "_run", runs)


@rule("a commit in doubt asks what is stored", "13")
def _forgetful_commit(patch: Patch) -> None:
    async def recorded(self: Transactions, call: Any) -> tuple[bool, Any]:
        return False, None

    patch(Transactions, "_recorded", recorded)


@rule("a transaction that idles is ended", "13")
def _patient_server(patch: Patch) -> None:
    patch(Transactions, "_idle_limit", property(lambda self: "0", lambda self, limit: None))


@rule("a start in doubt looks for its own rows", "6")
def _forgetful_start(patch: Patch) -> None:
    async def are_there(self: Starter, news: Any) -> bool:
        return False

    patch(Starter, "_are_there", are_there)
