"""What the demo has shown: counted in the database, and judged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from perdure.demo.stage import SCHEMA, Connection

ROWS = f"SELECT count(*) AS rows, count(DISTINCT ordinal) AS ordinals FROM {SCHEMA}.results"
STATUSES = f"SELECT status, count(*) AS workflows FROM {SCHEMA}.workflows GROUP BY status"
ATTEMPTS = f"SELECT attempt, count(*) AS rows FROM {SCHEMA}.results GROUP BY attempt ORDER BY attempt"
_STEPS = f"SELECT count(*) FROM {SCHEMA}.workflow_steps"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of it.

    Attributes:
        files: How many files there were to ingest: as many workflows.
        rows: How many rows of results there are.
        ordinals: How many different files they stand for.
        successes: How many workflows ended in `success`.
        checkpoints: How many steps were recorded.
        began: How many different steps began.
        again: How many bodies of steps began once more.
        elsewhere: How many of these belong to workflows that the killed worker didn't have.
        in_flight: How many workflows the killed worker had; None: none was to be killed.
        taken_over: How many of these another worker has gone on with.
    """

    files: int
    rows: int
    ordinals: int
    successes: int
    checkpoints: int
    began: int
    again: int
    elsewhere: int
    in_flight: int | None
    taken_over: int

    def problems(self) -> list[str]:
        """What contradicts the claim that nothing is lost, and nothing done twice; empty: it is proven."""
        found: list[str] = []
        if self.rows != self.files or self.ordinals != self.files:
            found.append(f"{self.rows} rows of results stand for {self.ordinals} of {self.files} files")
        if self.successes != self.files:
            found.append(f"{self.successes} of {self.files} workflows ended in success")
        if self.checkpoints != self.began:
            found.append(f"{self.checkpoints} steps are recorded, but {self.began} began")
        if self.in_flight == 0:
            found.append("nothing was in flight when it was time to kill a worker; use more --files")
        if self.in_flight and not self.taken_over:
            found.append("nobody has taken over what the killed worker had in flight")
        return found


def gather(
    connection: Connection,
    *,
    files: int,
    bodies: Iterable[str],
    in_flight: Collection[UUID] | None,
    taken_over: int,
) -> Outcome:
    """Count what there is.

    Args:
        connection: The database.
        files: How many files were to be ingested.
        bodies: One line for each body of a step that began, the same line if it began again.
        in_flight: The workflows that the killed worker had; None: none was to be killed.
        taken_over: As in `Outcome`.
    """
    ((rows, ordinals),) = connection.execute(ROWS).fetchall()
    statuses: dict[Any, Any] = dict(connection.execute(STATUSES).fetchall())
    ((checkpoints,),) = connection.execute(_STEPS).fetchall()
    began = Counter(bodies)
    killed = {str(id) for id in in_flight or ()}
    return Outcome(
        files=files,
        rows=rows,
        ordinals=ordinals,
        successes=statuses.get("success", 0),
        checkpoints=checkpoints,
        began=len(began),
        again=began.total() - len(began),
        elsewhere=sum(times - 1 for line, times in began.items() if line.partition(" ")[0] not in killed),
        in_flight=None if in_flight is None else len(in_flight),
        taken_over=taken_over,
    )
