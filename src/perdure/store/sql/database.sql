-- What concerns the connection and the schema, not the workflows.

-- :name probe
-- What this connection is: asked once a process.
SELECT pg_catalog.current_setting('server_version_num')::int4 AS server_version,
       pg_catalog.pg_backend_pid() AS backend_pid,
       pg_catalog.current_setting('transaction_read_only') AS read_only;

-- :name notify
-- A coalesced hint, from a connection of its own after the commit. $1 channel text · $2 payloads text[]
-- It is sent when it is committed, not when that is on disk: for a hint, nobody waits for the disk.
SELECT pg_catalog.pg_notify($1::text, item.payload)
FROM unnest($2::text[]) AS item (payload),
     pg_catalog.set_config('synchronous_commit', 'off', true) AS setting;

-- :name installation
-- Which installation this is: two connections that show the same id write to the same tables. $1 shard int4
SELECT id FROM perdure.installation WHERE shard = $1::int4;

-- :name clock
-- The time, as the database sees it.
SELECT perdure.now() AS now;
