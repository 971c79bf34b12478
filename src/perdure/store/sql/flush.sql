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
    WHERE shard = $1::int4 AND workflow_id = ANY (ARRAY(SELECT unnest($3::uuid[])))
      AND worker_id IS NOT DISTINCT FROM $2::uuid
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
-- Locks all of them FOR UPDATE, in one go: what goes on FOR SHARE and then what ends would be two orders, in which a flush
-- and whoever tells several workflows may wait for each other. held = false: as in record; nothing was written or deleted.
WITH held AS MATERIALIZED (
    SELECT workflow_id, epoch
    FROM perdure.queue_entries
    WHERE shard = $1::int4 AND workflow_id = ANY (ARRAY(SELECT unnest($3::uuid[] || $17::uuid[])))
      AND worker_id IS NOT DISTINCT FROM $2::uuid
    ORDER BY workflow_id
    FOR UPDATE
), all_held AS MATERIALIZED (
    SELECT pg_catalog.count(*) = pg_catalog.cardinality($3::uuid[] || $17::uuid[])
           AND COALESCE(pg_catalog.sum(epoch), 0) = $4::int8 + $18::int8 AS yes
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
    WHERE shard = $1::int4 AND workflow_id = ANY (ARRAY(SELECT unnest($17::uuid[])))
      AND worker_id IS NOT DISTINCT FROM $2::uuid
      AND (SELECT yes FROM all_held)
)
SELECT yes AS held FROM all_held;

-- :name settle
-- running -> waiting | success | error | cancelled; nothing -> pending | waiting. The writer, once a flush: as complete,
-- with runs that leave memory, put off a timer, start children, end as children, or write to streams.
-- $1 .. $23 as in complete · $24 ids uuid[] of the runs that suspend · $25 sum of their epochs int8
-- $26 wakes int8[] that each has seen · $27 what each waits for text[] · $28 delays float8[] in seconds (null: none)
-- $29 ids uuid[], $30 keys text[] of checkpoints that are set aside: the next run asks for them anew
-- $31 ids uuid[] · $32 epochs int8[] · $33 keys text[] · $34 positions int4[] · $35 delays float8[] in seconds of timers
-- that are set, or set again: their time only moves on, whichever of two flushes comes last
-- $36 of each that suspends, 1 if a message wakes it, and $37 1 if the end of a child does, int4[]
-- Children: $38 ids uuid[] · $39 names text[] · $40 queues text[] · $41 priorities int4[] · $42 partitions text[]
-- $43 attributes text[] · $44 inputs text[] · $45 versions text[] · $46 parents uuid[] · $47 1 if detached int4[]
-- $48 delays float8[] in seconds (null: none) · $49 starts_at timestamptz[] (null: none)
-- $50 timeouts float8[] in seconds from when they may start (null: none) · $51 the deadlines of their parents
-- timestamptz[] (null: none, or detached)
-- $52 parents uuid[] of runs that end: to be told
-- Entries of streams: $53 ids uuid[] · $54 names text[] · $55 numbers int8[] · $56 parts int4[] · $57 payloads text[]
-- and the parts that begin with them: $58 ids uuid[] · $59 epochs int8[] · $60 names text[] · $61 parts int4[]
-- $62 keys text[] · $63 attempts int4[] · $64 the numbers of their first entries int8[]
-- Locks all of them FOR UPDATE, in one go, as complete does. held = false: as in record.
-- awake: those that don't suspend, because somebody has something for them that they haven't seen. Whether they have is
-- read from the locked entries; the rest of the entry doesn't change while it is held, so it may come from the snapshot.
WITH held AS MATERIALIZED (
    SELECT workflow_id, epoch, wakes
    FROM perdure.queue_entries
    WHERE shard = $1::int4 AND workflow_id = ANY (ARRAY(SELECT unnest($3::uuid[] || $17::uuid[] || $24::uuid[])))
      AND worker_id IS NOT DISTINCT FROM $2::uuid
    ORDER BY workflow_id
    FOR UPDATE
), all_held AS MATERIALIZED (
    SELECT pg_catalog.count(*) = pg_catalog.cardinality($3::uuid[] || $17::uuid[] || $24::uuid[])
           AND COALESCE(pg_catalog.sum(epoch), 0) = $4::int8 + $18::int8 + $25::int8 AS yes
    FROM held
), suspending AS MATERIALIZED (
    SELECT workflow_id, epoch, wakes
    FROM held
    WHERE (workflow_id IN (SELECT unnest($24::uuid[]))) IS TRUE
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
    WHERE shard = $1::int4 AND workflow_id = ANY (ARRAY(SELECT unnest($29::uuid[])))
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
         recoveries, wakes, hears, awaits_child, deadline, version, parent_id, created_at)
    SELECT $1::int4, item.id, item.waiting_for, perdure.now() + pg_catalog.make_interval(secs => item.delay),
           entry.queue, entry.name, entry.priority, entry.partition, entry.enqueued_at, entry.started_at, entry.epoch,
           entry.recoveries, item.wakes, item.hears = 1, item.awaits_child = 1, entry.deadline, entry.version,
           entry.parent_id, perdure.now()
    FROM unnest($24::uuid[], $26::int8[], $27::text[], $28::float8[], $36::int4[], $37::int4[])
             AS item (id, wakes, waiting_for, delay, hears, awaits_child),
         LATERAL (
             SELECT queue, name, priority, partition, enqueued_at, started_at, epoch, recoveries, deadline, version,
                    parent_id
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
), born AS MATERIALIZED (
    SELECT item.*, item.wake_at + pg_catalog.make_interval(secs => item.timeout) AS ends_at
    FROM (SELECT each.*,
                 COALESCE(each.start_at,
                          perdure.now() + pg_catalog.make_interval(secs => COALESCE(each.delay, 0))) AS wake_at
          FROM unnest($38::uuid[], $39::text[], $40::text[], $41::int4[], $42::text[], $43::text[], $44::text[],
                      $45::text[], $46::uuid[], $47::int4[], $48::float8[], $49::timestamptz[], $50::float8[],
                      $51::timestamptz[])
              AS each (id, name, queue, priority, partition, attributes, input, version, parent_id, detached, delay,
                       start_at, timeout, deadline)) AS item
    WHERE (SELECT yes FROM all_held)
), opened AS (
    INSERT INTO perdure.workflow_rows
        (shard, id, name, queue, priority, partition, attributes, version, parent_id, detached, deadline, created_at)
    SELECT $1::int4, born.id, born.name, born.queue, born.priority, born.partition, born.attributes::json,
           born.version, born.parent_id, born.detached = 1, LEAST(born.ends_at, born.deadline), perdure.now()
    FROM born
), given AS (
    INSERT INTO perdure.checkpoints (shard, workflow_id, key, kind, position, status, payload, created_at)
    SELECT $1::int4, born.id, '$input', 'input', 0, 'success', born.input::json, perdure.now()
    FROM born
), timed_out AS (
    INSERT INTO perdure.deadlines (shard, workflow_id, due_at)
    SELECT $1::int4, born.id, born.ends_at
    FROM born
    WHERE born.ends_at IS NOT NULL
), delayed AS (
    INSERT INTO perdure.waits
        (shard, workflow_id, waiting_for, wake_at, queue, name, priority, partition, enqueued_at, deadline, version,
         parent_id, created_at)
    SELECT $1::int4, born.id, 'start', born.wake_at, born.queue, born.name, born.priority, born.partition,
           born.wake_at, LEAST(born.ends_at, born.deadline), born.version, born.parent_id, perdure.now()
    FROM born
    WHERE born.wake_at > perdure.now()
), entered AS (
    INSERT INTO perdure.queue_entries
        (shard, workflow_id, queue, name, priority, partition, enqueued_at, deadline, version, parent_id)
    SELECT $1::int4, born.id, born.queue, born.name, born.priority, born.partition, perdure.now(),
           LEAST(born.ends_at, born.deadline), born.version, born.parent_id
    FROM born
    WHERE born.wake_at <= perdure.now()
), told AS (
    INSERT INTO perdure.outbox (shard, id, target_id, worker_id, created_at)
    SELECT $1::int4, perdure.note_id(perdure.now()), item.parent_id, $2::uuid, perdure.now()
    FROM unnest($52::uuid[]) AS item (parent_id)
    WHERE (SELECT yes FROM all_held)
), streamed AS (
    INSERT INTO perdure.stream_rows (shard, workflow_id, name, number, part, payload, created_at)
    SELECT $1::int4, item.id, item.name, item.number, item.part, item.payload::json, perdure.now()
    FROM unnest($53::uuid[], $54::text[], $55::int8[], $56::int4[], $57::text[])
        AS item (id, name, number, part, payload)
    WHERE (SELECT yes FROM all_held)
    ON CONFLICT DO NOTHING
), begun AS (
    INSERT INTO perdure.stream_parts (shard, workflow_id, name, part, key, epoch, attempt, first)
    SELECT $1::int4, item.id, item.name, item.part, item.key, item.epoch, item.attempt, item.first
    FROM unnest($58::uuid[], $59::int8[], $60::text[], $61::int4[], $62::text[], $63::int4[], $64::int8[])
        AS item (id, epoch, name, part, key, attempt, first)
    WHERE (SELECT yes FROM all_held)
    ON CONFLICT DO NOTHING
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
