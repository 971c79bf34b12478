-- What the claimer and the timers do with the queue.

-- :name claim
-- pending -> running. The claimer, for one queue; exactly as many as $5 says, oldest first within a priority.
-- $1 shard int4 · $2 worker_id uuid · $3 queue text · $4 names text[] that this worker knows · $5 limit int4
-- $6 versions text[] that it takes (null: all) · $7 its own version text, for what has none yet
-- Locks what it takes (SKIP LOCKED); walks queue_entries_pending. Scalar sub-selects, because a join of the CTE to the
-- tables flips to a quadratic plan; ANY(ARRAY(...)), because in IN or FROM the LIMIT isn't held.
-- The input comes along for the first run only: any other loads its history in a second statement (a fresh snapshot).
-- No row: nothing is pending that this worker can run.
WITH claimed AS (
    UPDATE perdure.queue_entries
    SET worker_id = $2::uuid, epoch = epoch + 1, started_at = COALESCE(started_at, perdure.now()),
        version = COALESCE(version, $7::text)
    WHERE shard = $1::int4
      AND workflow_id = ANY (ARRAY(
          SELECT workflow_id
          FROM perdure.queue_entries
          WHERE shard = $1::int4 AND queue = $3::text AND worker_id IS NULL AND name = ANY ($4::text[])
            AND ($6::text[] IS NULL OR version IS NULL OR version = ANY ($6::text[]))
            AND NOT COALESCE((SELECT paused FROM perdure.queue_rows
                              WHERE shard = $1::int4 AND queue_rows.name = $3::text), false)
          ORDER BY priority DESC, enqueued_at, workflow_id
          LIMIT $5::int4
          FOR UPDATE SKIP LOCKED))
    RETURNING workflow_id, name, epoch, priority, enqueued_at, started_at, recoveries, stalls, wakes, deadline, parent_id
)
SELECT claimed.workflow_id, claimed.name, claimed.epoch, claimed.priority, claimed.enqueued_at, claimed.started_at,
       claimed.recoveries, claimed.stalls, claimed.wakes, claimed.deadline, claimed.parent_id,
       CASE WHEN claimed.epoch = 1 THEN
           (SELECT payload FROM perdure.checkpoints
            WHERE shard = $1::int4 AND workflow_id = claimed.workflow_id AND key = '$input')::text
       END AS input
FROM claimed;

-- :name claim_further
-- As claim, from where this worker has come to in each priority that it knows. For a while where many rows are dead, and a
-- claim from the front would walk over all of them. See engine/bloat.py.
-- $1 shard int4 · $2 worker_id uuid · $3 queue text · $4 names text[] · $5 limit int4 · $6 versions text[] · $7 version text:
-- as in claim · of the last ones that were claimed, highest priority first: $8 priorities int4[] · $9 enqueued_at
-- timestamptz[] · $10 ids uuid[]
-- LATERAL, one priority after the other: for all of them at once, the index has no place to begin but its front.
WITH claimed AS (
    UPDATE perdure.queue_entries
    SET worker_id = $2::uuid, epoch = epoch + 1, started_at = COALESCE(started_at, perdure.now()),
        version = COALESCE(version, $7::text)
    WHERE shard = $1::int4
      AND workflow_id = ANY (ARRAY(
          SELECT entry.workflow_id
          FROM unnest($8::int4[], $9::timestamptz[], $10::uuid[]) AS place (priority, enqueued_at, workflow_id),
               LATERAL (
                   SELECT workflow_id
                   FROM perdure.queue_entries
                   WHERE shard = $1::int4 AND queue = $3::text AND worker_id IS NULL AND name = ANY ($4::text[])
                     AND ($6::text[] IS NULL OR version IS NULL OR version = ANY ($6::text[]))
                     AND NOT COALESCE((SELECT paused FROM perdure.queue_rows
                                       WHERE shard = $1::int4 AND queue_rows.name = $3::text), false)
                     AND priority = place.priority
                     AND (enqueued_at, workflow_id) >= (place.enqueued_at, place.workflow_id)
                   ORDER BY enqueued_at, workflow_id
                   LIMIT $5::int4
                   FOR UPDATE SKIP LOCKED) AS entry
          LIMIT $5::int4))
    RETURNING workflow_id, name, epoch, priority, enqueued_at, started_at, recoveries, stalls, wakes, deadline, parent_id
)
SELECT claimed.workflow_id, claimed.name, claimed.epoch, claimed.priority, claimed.enqueued_at, claimed.started_at,
       claimed.recoveries, claimed.stalls, claimed.wakes, claimed.deadline, claimed.parent_id,
       CASE WHEN claimed.epoch = 1 THEN
           (SELECT payload FROM perdure.checkpoints
            WHERE shard = $1::int4 AND workflow_id = claimed.workflow_id AND key = '$input')::text
       END AS input
FROM claimed;

-- :name pending_queues
-- The queues in which something is pending: one index probe a queue (a loose index scan).
-- $1 shard int4
WITH RECURSIVE found AS (
    (SELECT queue FROM perdure.queue_entries
     WHERE shard = $1::int4 AND worker_id IS NULL
     ORDER BY queue LIMIT 1)
    UNION ALL
    SELECT (SELECT entry.queue FROM perdure.queue_entries AS entry
            WHERE entry.shard = $1::int4 AND entry.worker_id IS NULL AND entry.queue > found.queue
            ORDER BY entry.queue LIMIT 1)
    FROM found
    WHERE found.queue IS NOT NULL
)
SELECT queue FROM found WHERE queue IS NOT NULL;

-- :name register_queue
-- A queue gets its row when a worker first meets it.
-- $1 shard int4 · $2 name text
INSERT INTO perdure.queue_rows (shard, name, created_at)
VALUES ($1::int4, $2::text, perdure.now())
ON CONFLICT (shard, name) DO NOTHING;

-- :name load
-- All checkpoints of these workflows, in order of delivery. After a claim, in a snapshot of its own: whatever the former
-- worker could still commit, it committed before the claim got the entry.
-- $1 shard int4 · $2 ids uuid[]
-- Without what was set aside by a resume.
SELECT workflow_id, key, kind, position, status, payload::text AS payload, args_hash, attempts,
       CASE WHEN pg_catalog.isfinite(wake_at) THEN pg_catalog.date_part('epoch', wake_at - perdure.now()) END AS remaining,
       version
FROM perdure.checkpoints
WHERE shard = $1::int4 AND workflow_id = ANY (ARRAY(SELECT unnest($2::uuid[]))) AND kind <> 'history'
ORDER BY workflow_id, position;

-- :name held
-- What this worker holds, as the database sees it.
-- $1 shard int4 · $2 worker_id uuid
SELECT workflow_id, epoch FROM perdure.queue_entries WHERE shard = $1::int4 AND worker_id = $2::uuid;

-- :name held_among
-- The same, of these workflows only: after a flush that wrote nothing. By the primary key, see flush.sql.
-- $1 shard int4 · $2 worker_id uuid · $3 ids uuid[]
SELECT workflow_id, epoch FROM perdure.queue_entries
WHERE shard = $1::int4 AND workflow_id = ANY (ARRAY(SELECT unnest($3::uuid[])))
  AND worker_id IS NOT DISTINCT FROM $2::uuid;

-- :name release
-- running -> pending, orderly: they keep their place. Shutdown (nothing went wrong: $5 is 0) and reconciliation;
-- an abandoned run counts as a recovery without progress ($5 is 1).
-- $1 shard int4 · $2 worker_id uuid · $3 ids uuid[] · $4 epochs int8[] · $5 stalls int4
-- No row back for an id: it was not held any more, or is by a later claim.
-- IS TRUE keeps the planner from making a join of the list: it is hashed, and looked at once.
UPDATE perdure.queue_entries
SET worker_id = NULL, recoveries = recoveries + $5::int4, stalls = stalls + $5::int4
WHERE shard = $1::int4 AND workflow_id = ANY (ARRAY(SELECT unnest($3::uuid[])))
  AND worker_id IS NOT DISTINCT FROM $2::uuid
  AND ((workflow_id, epoch) IN (SELECT item.id, item.epoch FROM unnest($3::uuid[], $4::int8[]) AS item (id, epoch)))
      IS TRUE
RETURNING workflow_id, queue;

-- :name wake_due
-- waiting -> pending, for timers and delayed starts that are due. Any worker; only who deletes the waits row inserts the entry.
-- In no order: it waits for no lock, they keep their place, and a sort would read all that are due for each batch.
-- $1 shard int4 · $2 limit int4 · $3 timestamptz: none that was due before (null: all); see engine/bloat.py
WITH due AS (
    DELETE FROM perdure.waits
    WHERE shard = $1::int4
      AND workflow_id = ANY (ARRAY(
          SELECT workflow_id FROM perdure.waits
          WHERE shard = $1::int4 AND wake_at <= perdure.now() AND wake_at >= COALESCE($3::timestamptz, '-infinity')
          LIMIT $2::int4
          FOR UPDATE SKIP LOCKED))
    RETURNING workflow_id, queue, name, priority, partition, enqueued_at, started_at, epoch, recoveries, stalls,
              wakes, deadline, version, parent_id
), woken AS (
    INSERT INTO perdure.queue_entries
        (shard, workflow_id, queue, name, priority, partition, enqueued_at, started_at, epoch, recoveries, stalls,
         wakes, deadline, version, parent_id)
    SELECT $1::int4, due.workflow_id, due.queue, due.name, due.priority, due.partition, due.enqueued_at,
           due.started_at, due.epoch, due.recoveries, due.stalls, due.wakes, due.deadline, due.version, due.parent_id
    FROM due
)
SELECT DISTINCT queue FROM due;

-- :name next_due
-- In how many seconds the next timer is due; null: there is none. What time it is; and whether there are notes for parents.
-- $1 shard int4 · $2 timestamptz: none that was due before (null: all) · $3 uuid: no notes with a lower id
SELECT CASE WHEN pg_catalog.isfinite(next.at) THEN pg_catalog.date_part('epoch', next.at - perdure.now())
            WHEN next.at < perdure.now() THEN 0 END AS seconds,
       perdure.now() AS now,
       (SELECT true FROM perdure.outbox
        WHERE (shard, id) >= ($1::int4, $3::uuid)
          AND (shard, id) <= ($1::int4, 'ffffffff-ffff-ffff-ffff-ffffffffffff'::uuid)
        ORDER BY shard, id
        LIMIT 1) IS TRUE AS notes
FROM (SELECT LEAST(
          (SELECT wake_at FROM perdure.waits
           WHERE shard = $1::int4 AND wake_at >= COALESCE($2::timestamptz, '-infinity')
           ORDER BY wake_at
           LIMIT 1),
          (SELECT due_at FROM perdure.deadlines
           WHERE shard = $1::int4 AND due_at >= COALESCE($2::timestamptz, '-infinity')
           ORDER BY due_at
           LIMIT 1)) AS at) AS next;

-- :name park_unknown
-- pending -> waiting, for the oldest $3 entries of a queue if no live worker knows their names: they would stand in
-- the way of every claim. Back when a worker registers that name. Reads queue_entries_pending from its front.
-- $1 shard int4 · $2 queue text · $3 limit int4
WITH front AS MATERIALIZED (
    SELECT workflow_id, name
    FROM perdure.queue_entries
    WHERE shard = $1::int4 AND queue = $2::text AND worker_id IS NULL
    ORDER BY priority DESC, enqueued_at, workflow_id
    LIMIT $3::int4
    FOR UPDATE SKIP LOCKED
), unknown AS (
    DELETE FROM perdure.queue_entries
    WHERE shard = $1::int4
      AND workflow_id = ANY (ARRAY(
          SELECT front.workflow_id
          FROM front
          WHERE (front.name IN (
              SELECT known.name
              FROM perdure.worker_rows AS worker,
                   LATERAL pg_catalog.json_array_elements_text(worker.names) AS known (name)
              WHERE worker.shard = $1::int4 AND worker.status = 'live' AND worker.expires_at > perdure.now()))
              IS NOT TRUE))
    RETURNING workflow_id, queue, name, priority, partition, enqueued_at, started_at, epoch, recoveries, stalls,
              wakes, deadline, version, parent_id
), parked AS (
    INSERT INTO perdure.waits
        (shard, workflow_id, waiting_for, queue, name, priority, partition, enqueued_at, started_at, epoch,
         recoveries, stalls, wakes, deadline, version, parent_id, created_at)
    SELECT $1::int4, unknown.workflow_id, 'worker', unknown.queue, unknown.name, unknown.priority,
           unknown.partition, unknown.enqueued_at, unknown.started_at, unknown.epoch, unknown.recoveries,
           unknown.stalls, unknown.wakes, unknown.deadline, unknown.version, unknown.parent_id, perdure.now()
    FROM unknown
)
SELECT name, pg_catalog.count(*) AS parked FROM unknown GROUP BY name;

-- :name unpark
-- waiting -> pending, for what waits for a worker that knows these names. A worker, after it has registered; and again
-- now and then, for what was parked by somebody who hadn't seen the registration yet.
-- $1 shard int4 · $2 names text[] · $3 limit int4
WITH known AS (
    DELETE FROM perdure.waits
    WHERE shard = $1::int4
      AND workflow_id = ANY (ARRAY(
          SELECT workflow_id FROM perdure.waits
          WHERE shard = $1::int4 AND waiting_for = 'worker' AND name = ANY ($2::text[])
          LIMIT $3::int4
          FOR UPDATE SKIP LOCKED))
    RETURNING workflow_id, queue, name, priority, partition, enqueued_at, started_at, epoch, recoveries, stalls,
              wakes, deadline, version, parent_id
), back AS (
    INSERT INTO perdure.queue_entries
        (shard, workflow_id, queue, name, priority, partition, enqueued_at, started_at, epoch, recoveries, stalls,
         wakes, deadline, version, parent_id)
    SELECT $1::int4, known.workflow_id, known.queue, known.name, known.priority, known.partition,
           known.enqueued_at, known.started_at, known.epoch, known.recoveries, known.stalls, known.wakes,
           known.deadline, known.version, known.parent_id
    FROM known
)
SELECT DISTINCT queue FROM known;

-- :name unknown_names
-- Names at the front of a queue that are not among those that this worker knows: for the report.
-- $1 shard int4 · $2 queue text · $3 names text[] · $4 limit int4
SELECT front.name, pg_catalog.count(*) AS pending
FROM (SELECT name FROM perdure.queue_entries
      WHERE shard = $1::int4 AND queue = $2::text AND worker_id IS NULL
      ORDER BY priority DESC, enqueued_at, workflow_id
      LIMIT $4::int4) AS front
WHERE front.name <> ALL ($3::text[])
GROUP BY front.name;
