"""How the work goes: workers, queues, names and versions that nobody serves, and workflows that don't move."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from perdure.doctor.findings import Finding, note, ok, problem, warning
from perdure.doctor.look import MINUTE, Look, ago, counted

_LATE_SECONDS = MINUTE
_OLD_SECONDS = 5 * MINUTE
_OFTEN = 3
_MOST_NAMED = 5
_NEWEST = 10_000

_WORKERS = """
SELECT pg_catalog.count(*) FILTER (WHERE status = 'live' AND expires_at > perdure.now()) AS live,
       pg_catalog.count(*) FILTER (WHERE status = 'live' AND expires_at <= perdure.now()) AS unburied,
       pg_catalog.count(*) FILTER (WHERE status = 'dead' AND ended_at > perdure.now() - interval '1 hour') AS died,
       EXTRACT(epoch FROM perdure.now() - pg_catalog.min(expires_at) FILTER (
           WHERE status = 'live' AND expires_at <= perdure.now()))::float8 AS unburied_for,
       (SELECT pg_catalog.count(*) FROM perdure.queue_entries AS entry
        WHERE entry.shard = 1 AND entry.worker_id IS NOT NULL
          AND NOT EXISTS (SELECT 1 FROM perdure.worker_rows AS owner
                          WHERE owner.shard = 1 AND owner.id = entry.worker_id AND owner.status = 'live'
                            AND owner.expires_at > perdure.now())) AS orphans
FROM perdure.worker_rows WHERE shard = 1
"""

_QUEUES = """
SELECT entry.queue, pg_catalog.count(*) AS pending,
       EXTRACT(epoch FROM perdure.now() - min(entry.enqueued_at))::float8 AS oldest,
       coalesce((SELECT own.paused FROM perdure.queue_rows AS own
                 WHERE own.shard = 1 AND own.name = entry.queue), false) AS paused,
       EXISTS (SELECT 1 FROM perdure.worker_rows AS worker
               WHERE worker.shard = 1 AND worker.status = 'live' AND worker.expires_at > perdure.now()
                 AND (worker.queues IS NULL OR worker.queues::jsonb @> pg_catalog.to_jsonb(entry.queue))) AS is_served
FROM perdure.queue_entries AS entry
WHERE entry.shard = 1 AND entry.worker_id IS NULL
GROUP BY entry.queue
ORDER BY 2 DESC
"""

_TABLES = (
    "checkpoints",
    "message_rows",
    "event_rows",
    "event_waits",
    "stream_rows",
    "stream_parts",
    "deadlines",
    "workflow_rows",
)
"""Where rows of a workflow may be that is nowhere."""

_NAMES = """
SELECT waiting.name, pg_catalog.sum(waiting.count)::int8 AS count
FROM (SELECT entry.name, pg_catalog.count(*) AS count FROM perdure.queue_entries AS entry
      WHERE entry.shard = 1 AND entry.worker_id IS NULL GROUP BY entry.name
      UNION ALL
      SELECT wait.name, pg_catalog.count(*) FROM perdure.waits AS wait
      WHERE wait.shard = 1 AND wait.waiting_for = 'worker' GROUP BY wait.name) AS waiting
WHERE NOT EXISTS (SELECT 1 FROM perdure.worker_rows AS worker
                  WHERE worker.shard = 1 AND worker.status = 'live' AND worker.expires_at > perdure.now()
                    AND worker.names::jsonb @> pg_catalog.to_jsonb(waiting.name))
GROUP BY waiting.name
ORDER BY 2 DESC
"""

_VERSIONS = """
SELECT coalesce(version, '') AS version, pending + running + waiting AS count
FROM perdure.versions WHERE workers = 0 AND version IS NOT NULL ORDER BY 2 DESC
"""

_OVERDUE = """
SELECT pg_catalog.count(*) AS count, EXTRACT(epoch FROM perdure.now() - min(wake_at))::float8 AS longest
FROM perdure.waits WHERE shard = 1 AND wake_at < perdure.now() - pg_catalog.make_interval(secs => $1::float8)
"""

_PARKED = """
SELECT wait.workflow_id, wait.name FROM perdure.waits AS wait
WHERE wait.shard = 1 AND wait.waiting_for = 'operator' ORDER BY wait.created_at
"""

_OFTEN_RECOVERED = """
SELECT entry.workflow_id, entry.name, entry.stalls FROM perdure.queue_entries AS entry
WHERE entry.shard = 1 AND entry.stalls >= $1::int4 ORDER BY entry.stalls DESC
"""

# Neither pending nor running, waiting, or ended: this must never be.
_LOST = """
SELECT row.id, row.name
FROM (SELECT id, name FROM perdure.workflow_rows WHERE shard = 1 ORDER BY id DESC LIMIT $1::int4) AS row
WHERE NOT EXISTS (SELECT 1 FROM perdure.queue_entries AS entry WHERE entry.shard = 1 AND entry.workflow_id = row.id)
  AND NOT EXISTS (SELECT 1 FROM perdure.waits AS wait WHERE wait.shard = 1 AND wait.workflow_id = row.id)
  AND NOT EXISTS (SELECT 1 FROM perdure.checkpoints AS result
                  WHERE result.shard = 1 AND result.workflow_id = row.id AND result.key = '$result')
"""

# Ended, and pending or waiting all the same: neither must this.
_UNDEAD = """
SELECT entry.workflow_id AS id, entry.name
FROM (SELECT workflow_id, name FROM perdure.queue_entries WHERE shard = 1
      UNION ALL SELECT workflow_id, name FROM perdure.waits WHERE shard = 1) AS entry
JOIN perdure.checkpoints AS result ON result.workflow_id = entry.workflow_id
WHERE result.shard = 1 AND result.key = '$result'
LIMIT 100
"""


async def workers(look: Look) -> Sequence[Finding]:
    """Who works, and who has died."""
    (found,) = await look.rows(_WORKERS)
    findings: list[Finding] = []
    if found.unburied and (found.unburied_for or 0) > _LATE_SECONDS and found.live:
        text = f"{counted(found.unburied, 'worker')} died {ago(found.unburied_for)} ago, and no live one took that over"
        findings.append(
            problem("workers", text, "see in the logs of the live workers why: they can't reach the database?")
        )
    if found.orphans and not found.live:
        text = f"{counted(found.orphans, 'workflow')} of dead workers wait, and no worker is alive to take them over"
        findings.append(problem("workers", text, "start one: perdure worker MODULE:APP"))
    if found.died:
        text = f"{counted(found.died, 'worker')} died within the last hour; their workflows were taken over"
        findings.append(warning("workers", text, "look for the cause: killed for memory? SIGKILL at a deploy?"))
    if found.live:
        return [ok("workers", f"{counted(found.live, 'worker')} alive"), *findings]
    return findings or [note("workers", "no worker is alive", "start one: perdure worker MODULE:APP")]


async def queues(look: Look) -> Sequence[Finding]:
    """Queues in which something waits that nobody takes."""
    findings: list[Finding] = []
    for row in await look.rows(_QUEUES):
        waits = f"{counted(row.pending, 'workflow')} pending in queue {row.queue!r}, the oldest for {ago(row.oldest)}"
        if row.paused:
            findings.append(note("queues", f"{waits}: the queue is paused"))
        elif not row.is_served:
            advice = f"start one that serves it: perdure worker MODULE:APP --queue {row.queue}"
            findings.append(problem("queues", f"{waits}: no live worker serves it", advice))
        elif row.oldest > _OLD_SECONDS:
            advice = "start more workers, or raise --concurrency; if they are idle, look at the names below"
            findings.append(warning("queues", waits, advice))
    return findings or [ok("queues", "nothing waits for long")]


async def names(look: Look) -> Sequence[Finding]:
    """Workflows that no live worker can run."""
    findings: list[Finding] = []
    for row in await look.rows(_NAMES):
        text = f"{counted(row.count, 'workflow')} of name {row.name!r} wait, and no live worker knows it"
        end_them = f"perdure workflow terminate --name {shlex.quote(row.name)} --status pending"
        advice = f"deploy the code that has it, or end them: {end_them}"
        findings.append(problem("names", text, advice))
    for row in await look.rows(_VERSIONS):
        unfinished = counted(row.count, "unfinished workflow")
        text = f"{unfinished} of version {row.version!r}, and no live worker takes that version"
        advice = "start a worker of that version, or one without --only-version"
        findings.append(warning("versions", text, advice))
    return findings or [ok("names", "live workers know all that waits")]


async def stuck(look: Look) -> Sequence[Finding]:
    """Workflows that don't move."""
    findings: list[Finding] = []
    (overdue,) = await look.rows(_OVERDUE, _LATE_SECONDS)
    if overdue.count:
        text = f"{counted(overdue.count, 'workflow')} should have woken by now, the first {ago(overdue.longest)} ago"
        findings.append(
            problem("stuck", text, "start a worker; if one is alive, see in its log what holds its timers up")
        )
    if parked := await look.rows(_PARKED):
        text = f"{counted(len(parked), 'workflow')} parked for an operator: {_named(parked)}"
        advice = "see what they failed with (perdure workflow show ID), mend it, then: perdure workflow resume ID"
        findings.append(warning("stuck", text, advice))
    if often := await look.rows(_OFTEN_RECOVERED, _OFTEN):
        text = f"{counted(len(often), 'workflow')} lost their workers {_OFTEN} times or more, in a row: {_named(often)}"
        advice = "does one of their steps kill the process (memory, a crash in C)? After ten times they end in error"
        findings.append(warning("stuck", text, advice))
    if lost := await look.rows(_LOST, _NEWEST):
        text = f"{counted(len(lost), 'workflow')} of the newest {_NEWEST:,} are nowhere: {_named(lost)}"
        advice = "was the database restored, or edited by hand? Export what you need, then delete what is left of them"
        findings.append(problem("stuck", text, advice, *(_deletion(look, table, lost) for table in _TABLES)))
    if undead := await look.rows(_UNDEAD):
        text = (
            f"{counted(len(undead), 'workflow')} have ended, and are pending or waiting all the same: {_named(undead)}"
        )
        advice = "was the database edited by hand? Terminate them: perdure workflow terminate ID"
        findings.append(problem("stuck", text, advice))
    return findings or [ok("stuck", "every workflow moves, waits for its time, or has ended")]


def _deletion(look: Look, table: str, rows: Sequence[Any]) -> str:
    column = "id" if table == "workflow_rows" else "workflow_id"
    ids = ", ".join(f"'{row.id}'" for row in rows)
    return f"DELETE FROM {look.quoted}.{table} WHERE shard = 1 AND {column} IN ({ids})"


def _named(rows: Sequence[tuple[object, ...]]) -> str:
    shown = ", ".join(f"{row[1]} {row[0]}" for row in rows[:_MOST_NAMED])
    return shown if len(rows) <= _MOST_NAMED else f"{shown} and {len(rows) - _MOST_NAMED:,} more"
