"""How the server keeps house: what holds VACUUM back, and what it has left lying about."""

from __future__ import annotations

from collections.abc import Sequence

from perdure.doctor.findings import Finding, note, ok, problem, warning
from perdure.doctor.look import MINUTE, Look, ago, counted

_LONG_SECONDS = 5 * MINUTE
_MANY_TRANSACTIONS = 100_000
_MANY_DEAD = 50_000
_MANY_TIMES = 5
_LARGE_BYTES = 64 * 1024 * 1024
_LARGE_PER_ROW = 16 * 1024
_NEAR_WRAPAROUND = 1_200_000_000
_HOT = ("queue_entries", "waits", "worker_rows", "outbox", "running_steps", "deadlines")

_TRANSACTIONS = """
SELECT activity.pid, activity.usename::text AS role, activity.application_name AS application, activity.state,
       EXTRACT(epoch FROM pg_catalog.clock_timestamp() - activity.xact_start)::float8 AS seconds
FROM pg_catalog.pg_stat_activity AS activity
WHERE activity.datname = pg_catalog.current_database() AND activity.pid <> pg_catalog.pg_backend_pid()
  AND activity.backend_type <> 'autovacuum worker'
  AND (activity.backend_xmin IS NOT NULL OR activity.backend_xid IS NOT NULL)
  AND activity.xact_start < pg_catalog.clock_timestamp() - pg_catalog.make_interval(secs => $1::float8)
ORDER BY activity.xact_start
"""

_PREPARED = """
SELECT gid, EXTRACT(epoch FROM pg_catalog.clock_timestamp() - prepared)::float8 AS seconds
FROM pg_catalog.pg_prepared_xacts
WHERE database = pg_catalog.current_database()
  AND prepared < pg_catalog.clock_timestamp() - pg_catalog.make_interval(secs => $1::float8)
ORDER BY prepared
"""

_SLOTS = """
SELECT slot_name::text AS name, active, pg_catalog.age(coalesce(xmin, catalog_xmin))::int8 AS age
FROM pg_catalog.pg_replication_slots
WHERE pg_catalog.age(coalesce(xmin, catalog_xmin)) > $1::int4
ORDER BY 3 DESC
"""

_SEES = """
SELECT pg_catalog.pg_has_role(current_user, 'pg_read_all_stats', 'USAGE')
       OR (SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user) AS sees_all
"""

_TABLES = """
SELECT stat.relname::text AS name, stat.n_live_tup AS live, stat.n_dead_tup AS dead,
       pg_catalog.pg_table_size(stat.relid) AS bytes, pg_catalog.pg_indexes_size(stat.relid) AS index_bytes,
       EXTRACT(epoch FROM pg_catalog.clock_timestamp()
               - greatest(stat.last_autovacuum, stat.last_vacuum))::float8 AS vacuumed_ago,
       class.reloptions::text[] AS options
FROM pg_catalog.pg_stat_all_tables AS stat
JOIN pg_catalog.pg_class AS class ON class.oid = stat.relid
WHERE class.relnamespace = pg_catalog.to_regnamespace($1::text)
ORDER BY stat.relname
"""

_SETTINGS = """
SELECT pg_catalog.current_setting('autovacuum') AS autovacuum,
       pg_catalog.current_setting('track_counts') AS track_counts,
       (SELECT pg_catalog.age(datfrozenxid) FROM pg_catalog.pg_database
        WHERE datname = pg_catalog.current_database())::int8 AS age
"""


async def pinned(look: Look) -> Sequence[Finding]:
    """Who keeps VACUUM from removing anything: open transactions, prepared ones, replication slots."""
    findings: list[Finding] = []
    for row in await look.rows(_TRANSACTIONS, _LONG_SECONDS):
        who = f"pid {row.pid} ({row.role}, {row.application or 'no application name'}, {row.state})"
        text = f"a transaction has been open for {ago(row.seconds)}: {who}; no dead row newer than it can be removed"
        findings.append(
            warning(
                "xmin", text, "commit it, or end it by the statement below", f"SELECT pg_terminate_backend({row.pid})"
            )
        )
    for row in await look.rows(_PREPARED, _LONG_SECONDS):
        literal = row.gid.replace("'", "''")
        findings.append(
            warning(
                "xmin",
                f"a prepared transaction has been waiting for {ago(row.seconds)}: {row.gid}",
                "commit it (COMMIT PREPARED), or roll it back by the statement below",
                f"ROLLBACK PREPARED '{literal}'",
            )
        )
    for row in await look.rows(_SLOTS, _MANY_TRANSACTIONS):
        state = "in use" if row.active else "used by nobody"
        text = f"replication slot {row.name!r}, {state}, holds back {row.age:,} transactions"
        advice = "see to its standby (hot_standby_feedback), or drop the slot by the statement below"
        literal = row.name.replace("'", "''")
        findings.append(warning("xmin", text, advice, f"SELECT pg_drop_replication_slot('{literal}')"))
    (sees,) = await look.rows(_SEES)
    if not sees.sees_all:
        advice = "grant pg_read_all_stats to see them"
        findings.append(note("xmin", "transactions of other roles can't be seen by this one", advice))
    return findings or [ok("xmin", "no transaction holds VACUUM back")]


async def bloat(look: Look) -> Sequence[Finding]:
    """Dead rows that lie about, and tables that are larger than what is in them."""
    findings: list[Finding] = []
    for row in await look.rows(_TABLES, look.quoted):
        table = f'{look.quoted}."{row.name}"'
        if row.dead > _MANY_DEAD and row.dead > _MANY_TIMES * row.live:
            text = f"table {row.name} has {counted(row.dead, 'dead row')} beside {row.live:,} live ones"
            advice = "find what holds VACUUM back (xmin, autovacuum), then run it"
            findings.append(warning("bloat", text, advice, f"VACUUM (ANALYZE) {table}"))
        size = row.bytes + row.index_bytes
        if row.name in _HOT and size > _LARGE_BYTES and size > _LARGE_PER_ROW * (row.live + row.dead + 1):
            text = f"table {row.name} takes {size / 1024 / 1024:,.0f} MiB for {counted(row.live, 'row')}"
            advice = "claims slow down a little; when the workers can pause for a moment, run the statement below"
            findings.append(warning("bloat", text, advice, f"VACUUM (FULL, ANALYZE) {table}"))
    return findings or [ok("bloat", "no table carries much that is dead")]


async def autovacuum(look: Look) -> Sequence[Finding]:
    """Whether dead rows are cleared away at all."""
    findings: list[Finding] = []
    (settings,) = await look.rows(_SETTINGS)
    for name, value in (("autovacuum", settings.autovacuum), ("track_counts", settings.track_counts)):
        if value != "on":
            advice = f"set {name} = on: the queue's table must be vacuumed every few thousand workflows"
            findings.append(problem("autovacuum", f"{name} is {value} on this server", advice))
    for row in await look.rows(_TABLES, look.quoted):
        if "autovacuum_enabled=false" in (row.options or ()):
            sql = f'ALTER TABLE {look.quoted}."{row.name}" RESET (autovacuum_enabled)'
            findings.append(problem("autovacuum", f"autovacuum is off for table {row.name}", "turn it on", sql))
        elif row.name in _HOT and row.dead > _MANY_DEAD and (row.vacuumed_ago is None or row.vacuumed_ago > 3600):
            when = "never" if row.vacuumed_ago is None else f"{ago(row.vacuumed_ago)} ago"
            text = f"table {row.name} was vacuumed {when}, and has {counted(row.dead, 'dead row')}"
            advice = "raise autovacuum_max_workers or autovacuum_naptime's pace, or find what locks the table"
            findings.append(warning("autovacuum", text, advice, f'VACUUM {look.quoted}."{row.name}"'))
    if settings.age > _NEAR_WRAPAROUND:
        text = f"the oldest row is {settings.age:,} transactions old; at 2,000,000,000 the server stops taking writes"
        findings.append(
            problem("autovacuum", text, "let VACUUM freeze: look for what holds it back (xmin)", "VACUUM FREEZE")
        )
    return findings or [ok("autovacuum", "it is on, and keeps up")]
