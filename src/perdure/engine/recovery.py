"""Taking over from the dead: whose lease ran out is buried, and what it held becomes pending again.

Any worker does this, all of them at once if need be: burying is one guarded update, and the entries of the dead are
taken in batches with SKIP LOCKED. Three rules keep it right:

- A worker buries others only when its own lease has been unbroken for one lease, and no two beats of it in a row were
  missed meanwhile. After an outage of the database all leases have run out together, or (an outage shorter than the
  lease) those of some a moment before those of others, and nobody may be declared dead for that.
- A clock that is set back leaves leases that end far in the future. Such a worker is dead as well, once it has had the
  time to write a new one (a lease, its own or the other's, whichever is longer).
- What is recovered is found by the entries, not only by the list of the dead: an entry whose worker isn't alive. So a
  claim that was still on its way when its worker was buried, and what a first attempt skipped because it was locked, is
  found by the next look; where many rows are dead, such a look may be dear, and is taken less often (bloat.py).

Recovery locks the entries, so it waits for a flush of the old worker that is under way, or that flush finds nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from uuid import UUID

from perdure import telemetry
from perdure.engine.bloat import Bloat, Pace
from perdure.engine.leases import Lease
from perdure.engine.loop import Loop, Turns
from perdure.store.database import Database
from perdure.store.statements import SHARD

_BATCH = 500
_MANY = 10
_ENDED_SECONDS = 60.0
_FORGET_SECONDS = 86_400.0
_FORGET_EVERY = 600


class Recovery(Loop):
    """Looks for the dead, once a second or four times a lease, whichever is more often.

    Where ten workers live, each looks half as often, and for what is pending as well: one of them finds it as soon as
    before. Not for timers: all workers look when one is due, and so at the same time.
    """

    name = "recovery"

    def __init__(
        self,
        database: Database,
        lease: Lease,
        *,
        interval: float,
        bloat: Bloat,
        turns: Turns,
        on_recovered: Callable[[set[str]], None],
    ) -> None:
        # Those that began together must not look together.
        super().__init__(interval, turns=turns, jitter=0.3, is_shared=True)
        self._database = database
        self._lease = lease
        self._orphans = Pace(bloat)
        self._recovered: set[UUID] = set()
        self._on_recovered = on_recovered
        self._ticks = 0

    async def tick(self) -> float | None:
        if self._lease.is_valid:
            async with self.turns.turn():
                await self._look()
        return None

    async def _look(self) -> None:
        if self._orphans.is_due:
            with self._orphans.look():
                (fallen,) = await self._database.attempt("fallen", SHARD)
            if fallen.dying and await self._bury():
                (fallen,) = await self._database.attempt("fallen", SHARD)
            self.turns.pace = 2 if fallen.live >= _MANY else 1
            for id in fallen.orphans:
                await self._recover(id)
        else:
            await self._bury()
            await self._recover_those_that_ended()
        if self._ticks % _FORGET_EVERY == 0:
            await self._database.attempt("forget_workers", SHARD, _FORGET_SECONDS)
        self._ticks += 1

    async def _bury(self) -> bool:
        """Whether somebody was."""
        buried = await self._database.attempt("bury", SHARD, self._lease.worker_id)
        for dead in buried:
            telemetry.emit(telemetry.WorkerBuried(worker_id=dead.id, host=dead.host, pid=dead.pid))
        return bool(buried)

    async def _recover_those_that_ended(self) -> None:
        """What else stands under their ids, a claim that was still on its way, the next look at all entries finds."""
        ended = {row.id for row in await self._database.attempt("ended_workers", SHARD, _ENDED_SECONDS)}
        self._recovered &= ended
        for id in ended - self._recovered:
            await self._recover(id)
            self._recovered.add(id)

    async def _recover(self, dead: UUID) -> None:
        """Make everything that a dead worker held pending again."""
        while rows := await self._database.attempt("recover", SHARD, dead, _BATCH):
            workflows = tuple(row.workflow_id for row in rows)
            telemetry.emit(telemetry.WorkflowsRecovered(worker_id=dead, workflows=workflows))
            self._on_recovered({row.queue for row in rows})
            if len(rows) < _BATCH:
                return
