-- What a worker writes of its runs. Every statement begins by locking the entries that it writes for, in id order; all
-- parts read from that, so all of it is written or nothing. See engine/writer.py.
-- IS NOT DISTINCT FROM hides queue_entries_running: the planner takes what a worker holds for a few rows, and would read
-- all of it to find some. So the primary key is left.

-- :name record
-- running -> running. The writer, once a flush: outcomes of runs that go on.
-- $1 shard int4 · $2 worker_id uuid · $3 ids uuid[] of the runs · $4 sum of their epochs int8 · $5 version text
-- $6 ids uuid[] · $7 epochs int8[] · $8 keys text[] · $9 kinds text[] · $10 positions int4[] · $11 statuses text[]
-- $12 payloads text[] · $13 hashes int8[] · $14 attempts int4[] · $15 durations float8[] in seconds
-- $16 delays float8[] in seconds until the next attempt (null: none)
-- Locks the entries FOR SHARE. Epochs only grow, so count and sum say that each is the expected one.
-- held = false: something is not held any more, and nothing was written.
WITH held AS MATERIALIZED (
    SELECT workflow_id, epoch
    FROM perdure.queue_entries
    WHERE shard = $1::int4 AND workflow_id = ANY ($3::uuid[]) AND worker_id IS NOT DISTINCT FROM $2::uuid
    ORDER BY workflow_id
    FOR SHARE
), all_held AS MATERIALIZED (
    SELECT pg_catalog.count(*) = pg_catalog.cardinality($3::uuid[])
           AND COALESCE(pg_catalog.sum(epoch), 0) = $4::int8 AS yes
    FROM held
), recorded AS (
    INSERT INTO perdure.checkpoints
        (shard, workflow_id, key, kind, position, status, payload, args_hash, attempts, version, started_at, wake_at,
         created_at, worker_id, epoch)
    SELECT $1::int4, item.id, item.key, item.kind, item.position, item.status, item.payload::json, item.args_hash,
           item.attempts, $5::text, perdure.now() - pg_catalog.make_interval(secs => item.duration),
           perdure.now() + pg_catalog.make_interval(secs => item.delay), perdure.now(), $2::uuid, item.epoch
    FROM unnest($6::uuid[], $7::int8[], $8::text[], $9::text[], $10::int4[], $11::text[], $12::text[], $13::int8[],
                $14::int4[], $15::float8[], $16::float8[])
        AS item (id, epoch, key, kind, position, status, payload, args_hash, attempts, duration, delay)
    WHERE (SELECT yes FROM all_held)
)
SELECT yes AS held FROM all_held;

-- :name complete
-- running -> success | error | cancelled. The writer, once a flush: as record, with runs that end.
-- $1 .. $16 as in record · $17 ids uuid[] of the runs that end · $18 sum of their epochs int8
-- $19 statuses text[] · $20 payloads text[] · $21 epochs int8[] · $22 recoveries int4[] · $23 started_at timestamptz[]
-- Locks what goes on FOR SHARE, what ends FOR UPDATE. held = false: as in record; nothing was written or deleted.
WITH going AS MATERIALIZED (
    SELECT workflow_id, epoch
    FROM perdure.queue_entries
    WHERE shard = $1::int4 AND workflow_id = ANY ($3::uuid[]) AND worker_id IS NOT DISTINCT FROM $2::uuid
    ORDER BY workflow_id
    FOR SHARE
), ending AS MATERIALIZED (
    SELECT workflow_id, epoch
    FROM perdure.queue_entries
    WHERE shard = $1::int4 AND workflow_id = ANY ($17::uuid[]) AND worker_id IS NOT DISTINCT FROM $2::uuid
    ORDER BY workflow_id
    FOR UPDATE
), all_held AS MATERIALIZED (
    SELECT (SELECT pg_catalog.count(*) = pg_catalog.cardinality($3::uuid[])
                   AND COALESCE(pg_catalog.sum(epoch), 0) = $4::int8
            FROM going)
       AND (SELECT pg_catalog.count(*) = pg_catalog.cardinality($17::uuid[])
                   AND COALESCE(pg_catalog.sum(epoch), 0) = $18::int8
            FROM ending) AS yes
), recorded AS (
    INSERT INTO perdure.checkpoints
        (shard, workflow_id, key, kind, position, status, payload, args_hash, attempts, version, started_at, wake_at,
         created_at, worker_id, epoch)
    SELECT $1::int4, item.id, item.key, item.kind, item.position, item.status, item.payload::json, item.args_hash,
           item.attempts, $5::text, perdure.now() - pg_catalog.make_interval(secs => item.duration),
           perdure.now() + pg_catalog.make_interval(secs => item.delay), perdure.now(), $2::uuid, item.epoch
    FROM unnest($6::uuid[], $7::int8[], $8::text[], $9::text[], $10::int4[], $11::text[], $12::text[], $13::int8[],
                $14::int4[], $15::float8[], $16::float8[])
        AS item (id, epoch, key, kind, position, status, payload, args_hash, attempts, duration, delay)
    WHERE (SELECT yes FROM all_held)
), results AS (
    INSERT INTO perdure.checkpoints
        (shard, workflow_id, key, kind, position, status, payload, recoveries, version, started_at, created_at,
         worker_id, epoch)
    SELECT $1::int4, item.id, '$result', 'result', 2147483647, item.status, item.payload::json, item.recoveries,
           $5::text, item.started_at, perdure.now(), $2::uuid, item.epoch
    FROM unnest($17::uuid[], $19::text[], $20::text[], $21::int8[], $22::int4[], $23::timestamptz[])
        AS item (id, status, payload, epoch, recoveries, started_at)
    WHERE (SELECT yes FROM all_held)
), released AS (
    DELETE FROM perdure.queue_entries
    WHERE shard = $1::int4 AND workflow_id = ANY ($17::uuid[]) AND worker_id IS NOT DISTINCT FROM $2::uuid
      AND (SELECT yes FROM all_held)
)
SELECT yes AS held FROM all_held;

-- :name suspend
-- running -> waiting | success | error | cancelled. The writer, once a flush: as complete, with runs that leave memory,
-- or put off a timer.
-- $1 .. $23 as in complete · $24 ids uuid[] of the runs that suspend · $25 sum of their epochs int8
-- $26 wakes int8[] that each has seen · $27 what each waits for text[] · $28 delays float8[] in seconds (null: none)
-- $29 ids uuid[], $30 keys text[] of checkpoints that are set aside: the next run asks for them anew
-- $31 ids uuid[] · $32 epochs int8[] · $33 keys text[] · $34 positions int4[] · $35 delays float8[] in seconds of timers
-- that are set, or set again: their time only moves on, whichever of two flushes comes last
-- $36 of each that suspends, 1 if a message wakes it, int4[]
-- Locks what goes on FOR SHARE, what ends or suspends FOR UPDATE. held = false: as in record.
-- awake: those that don't suspend, because somebody has something for them that they haven't seen. Whether they have is
-- read from the locked entries; the rest of the entry doesn't change while it is held, so it may come from the snapshot.
WITH going AS MATERIALIZED (
    SELECT workflow_id, epoch
    FROM perdure.queue_entries
    WHERE shard = $1::int4 AND workflow_id = ANY ($3::uuid[]) AND worker_id IS NOT DISTINCT FROM $2::uuid
    ORDER BY workflow_id
    FOR SHARE
), ending AS MATERIALIZED (
    SELECT workflow_id, epoch
    FROM perdure.queue_entries
    WHERE shard = $1::int4 AND workflow_id = ANY ($17::uuid[]) AND worker_id IS NOT DISTINCT FROM $2::uuid
    ORDER BY workflow_id
    FOR UPDATE
), suspending AS MATERIALIZED (
    SELECT workflow_id, epoch, wakes
    FROM perdure.queue_entries
    WHERE shard = $1::int4 AND workflow_id = ANY ($24::uuid[]) AND worker_id IS NOT DISTINCT FROM $2::uuid
    ORDER BY workflow_id
    FOR UPDATE
), all_held AS MATERIALIZED (
    SELECT (SELECT pg_catalog.count(*) = pg_catalog.cardinality($3::uuid[])
                   AND COALESCE(pg_catalog.sum(epoch), 0) = $4::int8
            FROM going)
       AND (SELECT pg_catalog.count(*) = pg_catalog.cardinality($17::uuid[])
                   AND COALESCE(pg_catalog.sum(epoch), 0) = $18::int8
            FROM ending)
       AND (SELECT pg_catalog.count(*) = pg_catalog.cardinality($24::uuid[])
                   AND COALESCE(pg_catalog.sum(epoch), 0) = $25::int8
            FROM suspending) AS yes
), recorded AS (
    INSERT INTO perdure.checkpoints
        (shard, workflow_id, key, kind, position, status, payload, args_hash, attempts, version, started_at, wake_at,
         created_at, worker_id, epoch)
    SELECT $1::int4, item.id, item.key, item.kind, item.position, item.status, item.payload::json, item.args_hash,
           item.attempts, $5::text, perdure.now() - pg_catalog.make_interval(secs => item.duration),
           perdure.now() + pg_catalog.make_interval(secs => item.delay), perdure.now(), $2::uuid, item.epoch
    FROM unnest($6::uuid[], $7::int8[], $8::text[], $9::text[], $10::int4[], $11::text[], $12::text[], $13::int8[],
                $14::int4[], $15::float8[], $16::float8[])
        AS item (id, epoch, key, kind, position, status, payload, args_hash, attempts, duration, delay)
    WHERE (SELECT yes FROM all_held)
), results AS (
    INSERT INTO perdure.checkpoints
        (shard, workflow_id, key, kind, position, status, payload, recoveries, version, started_at, created_at,
         worker_id, epoch)
    SELECT $1::int4, item.id, '$result', 'result', 2147483647, item.status, item.payload::json, item.recoveries,
           $5::text, item.started_at, perdure.now(), $2::uuid, item.epoch
    FROM unnest($17::uuid[], $19::text[], $20::text[], $21::int8[], $22::int4[], $23::timestamptz[])
        AS item (id, status, payload, epoch, recoveries, started_at)
    WHERE (SELECT yes FROM all_held)
), put_off AS (
    INSERT INTO perdure.checkpoints
        (shard, workflow_id, key, kind, position, status, version, wake_at, created_at, worker_id, epoch)
    SELECT $1::int4, item.id, item.key, 'timer', item.position, 'success', $5::text,
           perdure.now() + pg_catalog.make_interval(secs => item.delay), perdure.now(), $2::uuid, item.epoch
    FROM unnest($31::uuid[], $32::int8[], $33::text[], $34::int4[], $35::float8[])
        AS item (id, epoch, key, position, delay)
    WHERE (SELECT yes FROM all_held)
    ORDER BY item.id, item.key
    ON CONFLICT (shard, workflow_id, key) DO UPDATE
    SET wake_at = GREATEST(checkpoints.wake_at, excluded.wake_at), created_at = excluded.created_at,
        version = excluded.version, worker_id = excluded.worker_id, epoch = excluded.epoch
), aside AS (
    UPDATE perdure.checkpoints
    SET key = '$history/' || epoch || '/' || key, kind = 'history'
    WHERE shard = $1::int4 AND workflow_id = ANY ($29::uuid[])
      AND ((workflow_id, key) IN (SELECT item.id, item.key FROM unnest($29::uuid[], $30::text[]) AS item (id, key)))
          IS TRUE
      AND (SELECT yes FROM all_held)
), asleep AS MATERIALIZED (
    SELECT workflow_id
    FROM suspending
    WHERE (SELECT yes FROM all_held)
      AND ((workflow_id, wakes) IN (SELECT item.id, item.wakes FROM unnest($24::uuid[], $26::int8[]) AS item (id, wakes)))
          IS TRUE
), waiting AS (
    INSERT INTO perdure.waits
        (shard, workflow_id, waiting_for, wake_at, queue, name, priority, partition, enqueued_at, started_at, epoch,
         recoveries, wakes, hears, deadline, version, created_at)
    SELECT $1::int4, item.id, item.waiting_for, perdure.now() + pg_catalog.make_interval(secs => item.delay),
           entry.queue, entry.name, entry.priority, entry.partition, entry.enqueued_at, entry.started_at, entry.epoch,
           entry.recoveries, item.wakes, item.hears = 1, entry.deadline, entry.version, perdure.now()
    FROM unnest($24::uuid[], $26::int8[], $27::text[], $28::float8[], $36::int4[])
             AS item (id, wakes, waiting_for, delay, hears),
         LATERAL (
             SELECT queue, name, priority, partition, enqueued_at, started_at, epoch, recoveries, deadline, version
             FROM perdure.queue_entries
             WHERE shard = $1::int4 AND workflow_id = item.id
             OFFSET 0) AS entry
    WHERE (item.id IN (SELECT workflow_id FROM asleep)) IS TRUE
), released AS (
    DELETE FROM perdure.queue_entries
    WHERE shard = $1::int4
      AND workflow_id = ANY ($17::uuid[] || ARRAY(SELECT workflow_id FROM asleep))
      AND worker_id IS NOT DISTINCT FROM $2::uuid
      AND (SELECT yes FROM all_held)
)
SELECT yes AS held,
       ARRAY(SELECT workflow_id FROM suspending
             WHERE (workflow_id IN (SELECT workflow_id FROM asleep)) IS NOT TRUE) AS awake
FROM all_held;

-- :name recorded
-- Whether a flush that got no answer was committed: a flush is one transaction, so any one row of it tells.
-- $1 shard int4 · $2 worker_id uuid · $3 ids uuid[] · $4 keys text[] · $5 epochs int8[]
SELECT EXISTS (
    SELECT 1
    FROM unnest($3::uuid[], $4::text[], $5::int8[]) AS item (id, key, epoch)
    WHERE item.epoch = (SELECT epoch FROM perdure.checkpoints
                        WHERE shard = $1::int4 AND workflow_id = item.id AND checkpoints.key = item.key
                          AND worker_id = $2::uuid)
) AS committed;

-- :name fence
-- The first of the two last statements of a transactional step: no row, and the step must roll back.
-- $1 shard int4 · $2 worker_id uuid · $3 workflow_id uuid · $4 epoch int8
SELECT workflow_id
FROM perdure.queue_entries
WHERE shard = $1::int4 AND workflow_id = $3::uuid AND worker_id IS NOT DISTINCT FROM $2::uuid AND epoch = $4::int8
FOR SHARE;

-- :name record_in_transaction
-- The other one: the checkpoint commits with the step's own writes.
-- $1 shard int4 · $2 worker_id uuid · $3 workflow_id uuid · $4 epoch int8 · $5 version text · $6 key text
-- $7 position int4 · $8 payload text · $9 hash int8 · $10 attempts int4 · $11 duration float8 in seconds
INSERT INTO perdure.checkpoints
    (shard, workflow_id, key, kind, position, status, payload, args_hash, attempts, version, started_at, created_at,
     worker_id, epoch)
VALUES ($1::int4, $3::uuid, $6::text, 'step', $7::int4, 'success', $8::json, $9::int8, $10::int4, $5::text,
        perdure.now() - pg_catalog.make_interval(secs => $11::float8), perdure.now(), $2::uuid, $4::int8);

-- :name recorded_step
-- What stands under a key: after a transactional step whose commit got no answer. A transaction of its own, so a fresh
-- snapshot.
-- $1 shard int4 · $2 workflow_id uuid · $3 key text
SELECT worker_id, epoch, payload::text AS payload
FROM perdure.checkpoints
WHERE shard = $1::int4 AND workflow_id = $2::uuid AND key = $3::text;
