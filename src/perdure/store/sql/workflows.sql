-- What clients do with workflows: start, find, read.

-- :name start
-- nothing -> pending | running. The starter, many at once; rows, inputs and entries commit together.
-- $1 shard int4 · $2 ids uuid[] · $3 names text[] · $4 queues text[] · $5 priorities int4[] · $6 partitions text[]
-- $7 attributes text[] · $8 inputs text[] · $9 versions text[] · $10 worker uuid: who runs them at once, or null
-- Inserts only; takes no lock that another statement waits for. A queue that is paused is not run at once.
-- Rows back: the entries that are running already, with the time of their start.
WITH opened AS (
    INSERT INTO perdure.workflow_rows (shard, id, name, queue, priority, partition, attributes, version, created_at)
    SELECT $1::int4, item.id, item.name, item.queue, item.priority, item.partition, item.attributes::json,
           item.version, perdure.now()
    FROM unnest($2::uuid[], $3::text[], $4::text[], $5::int4[], $6::text[], $7::text[], $9::text[])
        AS item (id, name, queue, priority, partition, attributes, version)
), given AS (
    INSERT INTO perdure.checkpoints (shard, workflow_id, key, kind, position, status, payload, created_at)
    SELECT $1::int4, item.id, '$input', 'input', 0, 'success', item.payload::json, perdure.now()
    FROM unnest($2::uuid[], $8::text[]) AS item (id, payload)
), entered AS (
    INSERT INTO perdure.queue_entries
        (shard, workflow_id, queue, name, priority, partition, version, enqueued_at, started_at, worker_id, epoch)
    SELECT $1::int4, item.id, item.queue, item.name, item.priority, item.partition, item.version, perdure.now(),
           CASE WHEN item.claimed THEN perdure.now() END,
           CASE WHEN item.claimed THEN $10::uuid END,
           CASE WHEN item.claimed THEN 1 ELSE 0 END
    FROM (SELECT each.*,
                 $10::uuid IS NOT NULL AND NOT COALESCE(
                     (SELECT paused FROM perdure.queue_rows
                      WHERE shard = $1::int4 AND queue_rows.name = each.queue), false) AS claimed
          FROM unnest($2::uuid[], $3::text[], $4::text[], $5::int4[], $6::text[], $9::text[])
              AS each (id, name, queue, priority, partition, version)) AS item
    RETURNING workflow_id, started_at, worker_id
)
SELECT workflow_id, started_at FROM entered WHERE worker_id IS NOT NULL;

-- :name start_keyed
-- nothing -> pending | waiting. The starter's second lane: starts under a key, delayed ones, and those with a deadline.
-- $1 shard int4 · $2 ids uuid[] · $3 names text[] · $4 queues text[] · $5 priorities int4[] · $6 partitions text[]
-- $7 attributes text[] · $8 inputs text[] · $9 versions text[] · $10 keys text[] (null: none)
-- $11 delays float8[] in seconds (null: none) · $12 starts_at timestamptz[] (null: none)
-- $13 lock_timeout text: how long to wait for somebody's open transaction that holds one of the keys (null: as it is set)
-- $14 timeouts float8[] in seconds from when they may start (null: none)
-- $15 parents uuid[] (null: none) · $16 1 if detached int4[]
-- Sorted by (name, key), so that two of them can't wait for each other. An id that doesn't come back: its key is taken.
-- IS TRUE keeps the planner from making joins of the lists of ids: they are hashed.
WITH patience AS MATERIALIZED (
    SELECT CASE WHEN $13::text IS NULL THEN '' ELSE pg_catalog.set_config('lock_timeout', $13::text, true) END AS set
), opened AS (
    INSERT INTO perdure.workflow_rows
        (shard, id, name, key, queue, priority, partition, attributes, version, deadline, parent_id, detached,
         created_at)
    SELECT $1::int4, item.id, item.name, item.key, item.queue, item.priority, item.partition,
           item.attributes::json, item.version,
           COALESCE(item.start_at, perdure.now() + pg_catalog.make_interval(secs => COALESCE(item.delay, 0)))
               + pg_catalog.make_interval(secs => item.timeout),
           item.parent_id, item.detached = 1, perdure.now()
    FROM unnest($2::uuid[], $3::text[], $4::text[], $5::int4[], $6::text[], $7::text[], $9::text[], $10::text[],
                $11::float8[], $12::timestamptz[], $14::float8[], $15::uuid[], $16::int4[])
        AS item (id, name, queue, priority, partition, attributes, version, key, delay, start_at, timeout, parent_id,
                 detached)
    WHERE (SELECT set FROM patience) IS NOT NULL
    ORDER BY item.name, item.key
    ON CONFLICT DO NOTHING
    RETURNING id, deadline
), timed_out AS (
    INSERT INTO perdure.deadlines (shard, workflow_id, due_at)
    SELECT $1::int4, opened.id, opened.deadline FROM opened WHERE opened.deadline IS NOT NULL
), given AS (
    INSERT INTO perdure.checkpoints (shard, workflow_id, key, kind, position, status, payload, created_at)
    SELECT $1::int4, item.id, '$input', 'input', 0, 'success', item.payload::json, perdure.now()
    FROM unnest($2::uuid[], $8::text[]) AS item (id, payload)
    WHERE (item.id IN (SELECT id FROM opened)) IS TRUE
), timed AS MATERIALIZED (
    SELECT each.id, each.name, each.queue, each.priority, each.partition, each.version, each.parent_id,
           COALESCE(each.start_at, perdure.now() + pg_catalog.make_interval(secs => each.delay)) AS wake_at,
           COALESCE(each.start_at, perdure.now() + pg_catalog.make_interval(secs => COALESCE(each.delay, 0)))
               + pg_catalog.make_interval(secs => each.timeout) AS deadline
    FROM unnest($2::uuid[], $3::text[], $4::text[], $5::int4[], $6::text[], $9::text[], $11::float8[],
                $12::timestamptz[], $14::float8[], $15::uuid[])
        AS each (id, name, queue, priority, partition, version, delay, start_at, timeout, parent_id)
    WHERE (each.id IN (SELECT id FROM opened)) IS TRUE
), delayed AS (
    INSERT INTO perdure.waits
        (shard, workflow_id, waiting_for, wake_at, queue, name, priority, partition, enqueued_at, deadline, version,
         parent_id, created_at)
    SELECT $1::int4, timed.id, 'start', timed.wake_at, timed.queue, timed.name, timed.priority, timed.partition,
           timed.wake_at, timed.deadline, timed.version, timed.parent_id, perdure.now()
    FROM timed
    WHERE timed.wake_at > perdure.now()
), entered AS (
    INSERT INTO perdure.queue_entries
        (shard, workflow_id, queue, name, priority, partition, enqueued_at, deadline, version, parent_id)
    SELECT $1::int4, timed.id, timed.queue, timed.name, timed.priority, timed.partition, perdure.now(),
           timed.deadline, timed.version, timed.parent_id
    FROM timed
    WHERE timed.wake_at IS NULL OR timed.wake_at <= perdure.now()
)
SELECT id FROM opened;

-- :name holders
-- Who holds these keys: after start_keyed, for the ids that it didn't return. One index probe a key.
-- $1 shard int4 · $2 names text[] · $3 keys text[]
SELECT item.name, item.key,
       (SELECT row.id FROM perdure.workflow_rows AS row
        WHERE row.shard = $1::int4 AND row.name = item.name AND row.key = item.key) AS id
FROM unnest($2::text[], $3::text[]) AS item (name, key);

-- :name release_key
-- The key of a workflow that has ended passes on: its row keeps everything else. No row: it runs, or the key moved.
-- $1 shard int4 · $2 name text · $3 key text
UPDATE perdure.workflow_rows AS row
SET key = NULL
WHERE row.shard = $1::int4 AND row.name = $2::text AND row.key = $3::text
  AND EXISTS (SELECT 1 FROM perdure.checkpoints AS result
              WHERE result.shard = $1::int4 AND result.workflow_id = row.id AND result.key = '$result')
RETURNING row.id;

-- :name started
-- Which of these ids are there: how a start without an answer recognises its own.
-- $1 shard int4 · $2 ids uuid[]
SELECT id FROM perdure.workflow_rows WHERE shard = $1::int4 AND id = ANY (ARRAY(SELECT unnest($2::uuid[])));

-- :name results
-- The results of these workflows, of those that have ended.
-- $1 shard int4 · $2 ids uuid[]
-- One at a time, as in describe: that is the primary key's, whatever the planner makes of a list.
SELECT result.workflow_id, result.status, result.payload::text AS payload
FROM unnest($2::uuid[]) AS item (id),
     LATERAL (
         SELECT workflow_id, status, payload
         FROM perdure.checkpoints
         WHERE shard = $1::int4 AND workflow_id = item.id AND key = '$result'
         OFFSET 0) AS result;

-- :name describe
-- The rows of the public view, for these workflows.
-- $1 ids uuid[]
-- One at a time, and OFFSET 0 keeps it so: as a join each branch of the view may be read from end to end.
SELECT found.*
FROM unnest($1::uuid[]) AS item (id),
     LATERAL (
         SELECT id, name, key, status, queue, priority, partition, input::text AS input, output::text AS output,
                error::text AS error, worker_id, epoch, recoveries, parent_id, version, attributes::text AS attributes,
                created_at, started_at, updated_at, wake_at, waiting_for, deadline, completed_at, forked_from
         FROM perdure.workflows
         WHERE id = item.id
         OFFSET 0) AS found;

-- :name steps
-- The rows of the public view, for one workflow, in order of delivery.
-- $1 workflow_id uuid
SELECT workflow_id, key, name, kind, position, status, output::text AS output, error::text AS error,
       attempts, started_at, completed_at, created_at, worker_id, epoch, version, wake_at
FROM perdure.workflow_steps
WHERE workflow_id = $1::uuid
ORDER BY position NULLS LAST, key;

-- :name page_all
-- A page of ids, newest first: walks the primary key backwards, in chunks, and stops when the page is full.
-- $1 shard int4 · $2 before uuid · $3 name text · $4 queue text · $5 key prefix text · $6 since timestamptz
-- $7 until timestamptz · $8 attributes text, a json object · $9 status text: success, or null for any · $10 limit int4
-- In chunks, because what the filters let through can only be guessed: the planner would read and sort the whole table.
-- Small ones, because without statistics it takes 100 000 rows for 150, and would sort them for the first 100.
-- A chunk begins below the last id of the one before; the first is the id that the page begins below.
WITH RECURSIVE walk AS (
    SELECT ARRAY[COALESCE($2::uuid, 'ffffffff-ffff-ffff-ffff-ffffffffffff'::uuid)] AS ids
    UNION ALL
    SELECT ARRAY(SELECT row.id
                 FROM perdure.workflow_rows AS row
                 WHERE row.shard = $1::int4 AND row.id < walk.ids[pg_catalog.cardinality(walk.ids)]
                 ORDER BY row.id DESC
                 LIMIT 50)
    FROM walk
    WHERE pg_catalog.cardinality(walk.ids) > 0
)
SELECT found.id
FROM walk,
     LATERAL (
         SELECT row.id
         FROM perdure.workflow_rows AS row
         WHERE row.shard = $1::int4 AND row.id = ANY (walk.ids) AND ($2::uuid IS NULL OR row.id < $2::uuid)
           AND ($3::text IS NULL OR row.name = $3::text)
           AND ($4::text IS NULL OR row.queue = $4::text)
           AND ($5::text IS NULL OR pg_catalog.starts_with(row.key, $5::text))
           AND ($6::timestamptz IS NULL OR row.created_at >= $6::timestamptz)
           AND ($7::timestamptz IS NULL OR row.created_at < $7::timestamptz)
           AND ($8::text IS NULL OR row.attributes::jsonb @> $8::jsonb)
           AND ($9::text IS NULL OR $9::text = (
               SELECT result.status FROM perdure.checkpoints AS result
               WHERE result.shard = $1::int4 AND result.workflow_id = row.id AND result.key = '$result'))
         ORDER BY row.id DESC
         OFFSET 0) AS found
LIMIT $10::int4;

-- :name page_children
-- The same for the children of a workflow: walks workflow_rows_parent backwards.
-- $1 .. $8, $10 as in page_all · $9 status text (null: any) · $11 parent uuid
WITH RECURSIVE walk AS (
    SELECT ARRAY[COALESCE($2::uuid, 'ffffffff-ffff-ffff-ffff-ffffffffffff'::uuid)] AS ids
    UNION ALL
    SELECT ARRAY(SELECT row.id
                 FROM perdure.workflow_rows AS row
                 WHERE row.shard = $1::int4 AND row.parent_id = $11::uuid
                   AND row.id < walk.ids[pg_catalog.cardinality(walk.ids)]
                 ORDER BY row.id DESC
                 LIMIT 50)
    FROM walk
    WHERE pg_catalog.cardinality(walk.ids) > 0
)
SELECT found.id
FROM walk,
     LATERAL (
         SELECT row.id
         FROM perdure.workflow_rows AS row
         WHERE row.shard = $1::int4 AND row.id = ANY (walk.ids) AND ($2::uuid IS NULL OR row.id < $2::uuid)
           AND ($3::text IS NULL OR row.name = $3::text)
           AND ($4::text IS NULL OR row.queue = $4::text)
           AND ($5::text IS NULL OR pg_catalog.starts_with(row.key, $5::text))
           AND ($6::timestamptz IS NULL OR row.created_at >= $6::timestamptz)
           AND ($7::timestamptz IS NULL OR row.created_at < $7::timestamptz)
           AND ($8::text IS NULL OR row.attributes::jsonb @> $8::jsonb)
           AND ($9::text IS NULL OR $9::text = COALESCE(
               (SELECT CASE WHEN entry.worker_id IS NULL THEN 'pending' ELSE 'running' END
                FROM perdure.queue_entries AS entry
                WHERE entry.shard = $1::int4 AND entry.workflow_id = row.id),
               (SELECT 'waiting' FROM perdure.waits AS wait
                WHERE wait.shard = $1::int4 AND wait.workflow_id = row.id),
               (SELECT result.status FROM perdure.checkpoints AS result
                WHERE result.shard = $1::int4 AND result.workflow_id = row.id AND result.key = '$result')))
         ORDER BY row.id DESC
         OFFSET 0) AS found
LIMIT $10::int4;

-- :name page_failed
-- The same for those that ended in error: walks checkpoints_failed_results backwards.
-- $1 .. $8, $10 as in page_all · $9 status text: error
WITH RECURSIVE walk AS (
    SELECT ARRAY[COALESCE($2::uuid, 'ffffffff-ffff-ffff-ffff-ffffffffffff'::uuid)] AS ids
    UNION ALL
    SELECT ARRAY(SELECT result.workflow_id
                 FROM perdure.checkpoints AS result
                 WHERE result.shard = $1::int4 AND result.key = '$result' AND result.status = 'error'
                   AND result.workflow_id < walk.ids[pg_catalog.cardinality(walk.ids)]
                 ORDER BY result.workflow_id DESC
                 LIMIT 50)
    FROM walk
    WHERE pg_catalog.cardinality(walk.ids) > 0 AND $9::text = 'error'
)
SELECT found.id
FROM walk,
     LATERAL (
         SELECT row.id
         FROM perdure.workflow_rows AS row
         WHERE row.shard = $1::int4 AND row.id = ANY (walk.ids) AND ($2::uuid IS NULL OR row.id < $2::uuid)
           AND ($3::text IS NULL OR row.name = $3::text)
           AND ($4::text IS NULL OR row.queue = $4::text)
           AND ($5::text IS NULL OR pg_catalog.starts_with(row.key, $5::text))
           AND ($6::timestamptz IS NULL OR row.created_at >= $6::timestamptz)
           AND ($7::timestamptz IS NULL OR row.created_at < $7::timestamptz)
           AND ($8::text IS NULL OR row.attributes::jsonb @> $8::jsonb)
         ORDER BY row.id DESC
         OFFSET 0) AS found
LIMIT $10::int4;

-- :name page_active
-- The same for those that are pending, running or waiting.
-- $1 .. $8, $10 as in page_all · $9 status text: pending, running or waiting
-- Pending and waiting: walks the primary keys of queue_entries and waits backwards. Running: all there is, by worker.
-- The keys are compared as rows: a planner that knows nothing of a table takes `shard = 1` for one row in two hundred,
-- and would rather sort those that are left than walk.
WITH RECURSIVE holder AS (
    (SELECT worker_id FROM perdure.queue_entries
     WHERE shard = $1::int4 AND worker_id IS NOT NULL AND $9::text = 'running'
     ORDER BY worker_id LIMIT 1)
    UNION ALL
    SELECT (SELECT entry.worker_id FROM perdure.queue_entries AS entry
            WHERE entry.shard = $1::int4 AND entry.worker_id IS NOT NULL AND entry.worker_id > holder.worker_id
            ORDER BY entry.worker_id LIMIT 1)
    FROM holder
    WHERE holder.worker_id IS NOT NULL
), running AS MATERIALIZED (
    SELECT held.workflow_id
    FROM holder,
         LATERAL (
             SELECT entry.workflow_id
             FROM perdure.queue_entries AS entry
             WHERE entry.shard = $1::int4 AND entry.worker_id = holder.worker_id
             OFFSET 0) AS held
), walk AS (
    SELECT ARRAY[COALESCE($2::uuid, 'ffffffff-ffff-ffff-ffff-ffffffffffff'::uuid)] AS ids
    UNION ALL
    SELECT CASE $9::text
           WHEN 'pending' THEN
               ARRAY(SELECT entry.workflow_id
                     FROM perdure.queue_entries AS entry
                     WHERE (entry.shard, entry.workflow_id) >= ($1::int4, '00000000-0000-0000-0000-000000000000'::uuid)
                       AND (entry.shard, entry.workflow_id)
                           < ($1::int4, walk.ids[pg_catalog.cardinality(walk.ids)])
                     ORDER BY entry.shard DESC, entry.workflow_id DESC
                     LIMIT 50)
           WHEN 'waiting' THEN
               ARRAY(SELECT wait.workflow_id
                     FROM perdure.waits AS wait
                     WHERE (wait.shard, wait.workflow_id) >= ($1::int4, '00000000-0000-0000-0000-000000000000'::uuid)
                       AND (wait.shard, wait.workflow_id)
                           < ($1::int4, walk.ids[pg_catalog.cardinality(walk.ids)])
                     ORDER BY wait.shard DESC, wait.workflow_id DESC
                     LIMIT 50)
           ELSE
               ARRAY(SELECT running.workflow_id
                     FROM running
                     WHERE running.workflow_id < walk.ids[pg_catalog.cardinality(walk.ids)]
                     ORDER BY running.workflow_id DESC
                     LIMIT 50)
           END
    FROM walk
    WHERE pg_catalog.cardinality(walk.ids) > 0
)
SELECT found.id
FROM walk,
     LATERAL (
         SELECT row.id
         FROM perdure.workflow_rows AS row
         WHERE row.shard = $1::int4 AND row.id = ANY (walk.ids) AND ($2::uuid IS NULL OR row.id < $2::uuid)
           AND ($9::text <> 'pending' OR (
               SELECT entry.worker_id IS NULL FROM perdure.queue_entries AS entry
               WHERE entry.shard = $1::int4 AND entry.workflow_id = row.id))
           AND ($3::text IS NULL OR row.name = $3::text)
           AND ($4::text IS NULL OR row.queue = $4::text)
           AND ($5::text IS NULL OR pg_catalog.starts_with(row.key, $5::text))
           AND ($6::timestamptz IS NULL OR row.created_at >= $6::timestamptz)
           AND ($7::timestamptz IS NULL OR row.created_at < $7::timestamptz)
           AND ($8::text IS NULL OR row.attributes::jsonb @> $8::jsonb)
         ORDER BY row.id DESC
         OFFSET 0) AS found
LIMIT $10::int4;
