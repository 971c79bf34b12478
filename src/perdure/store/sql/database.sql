-- What concerns the connection and the schema, not the workflows.

-- :name probe
-- What this connection is: asked once a process.
SELECT pg_catalog.current_setting('server_version_num')::int4 AS server_version,
       pg_catalog.pg_backend_pid() AS backend_pid,
       pg_catalog.current_setting('transaction_read_only') AS read_only;

-- :name notify
-- A coalesced hint, from a connection of its own after the commit. $1 channel text · $2 payloads text[]
SELECT pg_catalog.pg_notify($1::text, item.payload) FROM unnest($2::text[]) AS item (payload);

-- :name dead_rows
-- How many rows are dead, in the table that has most of them: a statistic, a moment old. $1 tables text[]
SELECT COALESCE(pg_catalog.max(pg_catalog.pg_stat_get_dead_tuples(pg_catalog.to_regclass(item.name))), 0) AS dead
FROM unnest($1::text[]) AS item (name);

-- :name installation
-- Which installation this is: two connections that show the same id write to the same tables. $1 shard int4
SELECT id FROM perdure.installation WHERE shard = $1::int4;

-- :name clock
-- The time, as the database sees it.
SELECT perdure.now() AS now;
