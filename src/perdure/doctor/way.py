"""The way to the database: the server, what the role may do, poolers, hints, and the two clocks."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from uuid import uuid4

from perdure.doctor.findings import Finding, note, ok, problem, warning
from perdure.doctor.look import Look, ago
from perdure.store.arrays import Texts
from perdure.store.listener import channel
from perdure.store.statements import quoted

_DURABLE = ("fsync", "full_page_writes")
_ROUND_TRIPS = 5
_SLOW_SECONDS = 0.02
_SKEW_SECONDS = 2.0
_ECHO_SECONDS = 2.0

_SERVER = """
SELECT current_user::text AS role, pg_catalog.current_setting('server_version') AS version,
       pg_catalog.current_setting('fsync') AS fsync,
       pg_catalog.current_setting('full_page_writes') AS full_page_writes,
       pg_catalog.current_setting('synchronous_commit') AS synchronous_commit,
       pg_catalog.current_setting('default_transaction_isolation') AS isolation,
       pg_catalog.pg_is_in_recovery() AS is_standby
"""

_TIME = "SELECT pg_catalog.clock_timestamp() AS now"

_RIGHTS = """
SELECT class.relname::text AS name, privilege.name AS privilege
FROM pg_catalog.pg_class AS class,
     unnest(CASE WHEN class.relkind IN ('r', 'p') AND NOT $2::bool THEN ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']
                 ELSE ARRAY['SELECT'] END) AS privilege (name)
WHERE class.relnamespace = pg_catalog.to_regnamespace($1::text) AND class.relkind IN ('r', 'p', 'v')
  AND NOT pg_catalog.has_table_privilege(class.oid, privilege.name)
ORDER BY 1, 2
"""

_USAGE = """
SELECT pg_catalog.has_schema_privilege(own.oid, 'USAGE') AS may_use
FROM pg_catalog.pg_namespace AS own WHERE own.nspname = $1::text
"""

# What workers write: one who isn't to may be a client that only starts workflows and waits.
_NOT_FOR_CLIENTS = ("worker_rows", "running_steps", "maintenance", "migrations", "installation", "retention_rows")


async def server(look: Look) -> Sequence[Finding]:
    """Which server it is, and whether what it says is durable is that."""
    (found,) = await look.rows(_SERVER)
    info = look.connection.info
    where = f"PostgreSQL {found.version}, {found.role}@{info.host}:{info.port}/{info.dbname}"
    findings = [ok("server", where + (", a standby" if found.is_standby else ""))]
    findings += [
        problem(
            "server",
            f"{setting} is {value}: after a crash of the machine the database may be lost",
            f"set {setting} = on in postgresql.conf",
        )
        for setting in _DURABLE
        if (value := getattr(found, setting)) != "on"
    ]
    if found.synchronous_commit == "off":
        findings.append(
            problem(
                "server",
                "synchronous_commit is off: a start that was acknowledged may be lost in a crash",
                "set synchronous_commit = on for the role, the database or the server",
            )
        )
    if found.isolation != "read committed":
        sql = f"ALTER ROLE {quoted(found.role)} SET default_transaction_isolation = 'read committed'"
        text = f"default_transaction_isolation is {found.isolation}: claims of workers abort each other"
        findings.append(warning("server", text, "change it for the role of the workers", sql))
    return findings


async def speed(look: Look) -> Sequence[Finding]:
    """How long a round trip takes, and whether the clocks agree."""
    times: list[float] = []
    offset = 0.0
    loop = asyncio.get_running_loop()
    for _ in range(_ROUND_TRIPS):
        began, here = loop.time(), datetime.now(UTC)
        (row,) = await look.rows(_TIME)
        times.append(loop.time() - began)
        if times[-1] == min(times):  # the quickest says it best
            offset = (row.now - here).total_seconds() - times[-1] / 2
    findings: list[Finding] = []
    best = min(times)
    text = f"a round trip takes {best * 1000:.1f} ms"
    if best > _SLOW_SECONDS:
        advice = "run the workers near the database: a workflow waits for one round trip at each step"
        findings.append(warning("latency", text, advice))
    else:
        findings.append(ok("latency", text))
    if abs(offset) > _SKEW_SECONDS:
        which = "ahead of" if offset > 0 else "behind"
        advice = (
            "set the clock of this machine by NTP: no guarantee depends on it, but ids sort by it, and what it shows "
            "as past may be to come"
        )
        text = f"the server's clock is {ago(abs(offset))} {which} this machine's"
        findings.append(warning("clock", text, advice))
    else:
        findings.append(ok("clock", f"the clocks of server and machine agree within {max(abs(offset), 0.001):.3f} s"))
    return findings


async def usage(look: Look) -> Sequence[Finding]:
    """Whether the role may look into the schema, if there is one."""
    found = await look.rows(_USAGE, look.schema)
    if not found or found[0].may_use:
        return []
    (server,) = await look.rows(_SERVER)
    grant = f"GRANT USAGE ON SCHEMA {look.quoted} TO {quoted(server.role)}"
    return [problem("rights", f"role {server.role!r} may not use schema {look.schema!r}", "grant it", grant)]


async def rights(look: Look) -> Sequence[Finding]:
    """Whether the role may do what workers do."""
    (server,) = await look.rows(_SERVER)
    role = server.role
    missing: dict[str, list[str]] = {}
    for row in await look.rows(_RIGHTS, look.quoted, server.is_standby):
        missing.setdefault(row.name, []).append(row.privilege)
    if not missing:
        return [ok("rights", f"role {role!r} may do all that a worker does")]
    grants = tuple(
        f"GRANT {', '.join(privileges)} ON {look.quoted}.{name} TO {quoted(role)}"
        for name, privileges in missing.items()
    )
    if not any("SELECT" in privileges for privileges in missing.values()) and all(
        missing.get(name) for name in _NOT_FOR_CLIENTS
    ):
        text = f"role {role!r} may read, and not write as a worker does"
        return [note("rights", text, "this is right for who only looks; a worker needs what is granted below")]
    names = ", ".join(sorted(missing))
    text = f"role {role!r} lacks rights that a worker needs, on {names}"
    return [problem("rights", text, "grant them, or let the workers connect as the owner of the schema", *grants)]


async def pooler(look: Look) -> Sequence[Finding]:
    """Whether there is a transaction pooler in between."""
    capabilities = look.database.capabilities
    assert capabilities is not None
    if not capabilities.pooler:
        return [ok("pooler", "the connection is direct")]
    advice = "nothing needs to be done; a direct connection saves both, and LISTEN works on it"
    text = "there is a pooler in between: statements aren't prepared, and hints may not arrive"
    return [note("pooler", text, advice)]


async def hints(look: Look) -> Sequence[Finding]:
    """Whether a NOTIFY of one connection is heard on another."""
    (server,) = await look.rows(_SERVER)
    if server.is_standby:
        return [note("hints", "a standby has no NOTIFY: it wasn't tried")]
    name, word = channel(look.schema), f"echo {uuid4()}"
    heard = asyncio.Event()
    listening = await look.database.open()
    try:
        await listening.execute(f"LISTEN {quoted(name)}".encode(), prepare=False)

        async def listen() -> None:
            async for notification in listening.notifies():
                if notification.payload == word:
                    heard.set()

        task = asyncio.ensure_future(listen())
        try:
            await look.database.attempt("notify", name, Texts([word]))
            async with asyncio.timeout(_ECHO_SECONDS):
                await heard.wait()
        except TimeoutError:
            advice = (
                "let the workers connect directly, not through a transaction pooler; until then they look for work ten "
                "times a second, which is slower by up to 0.1 s"
            )
            return [warning("hints", "a NOTIFY isn't heard here, so workers learn of new work by looking", advice)]
        finally:
            task.cancel()
            await asyncio.wait({task})
    finally:
        await listening.close()
    return [ok("hints", "a NOTIFY is heard: workers learn of new work at once")]
