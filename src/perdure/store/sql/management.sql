-- What operators, callers and timers do to workflows that are under way or have ended. See engine/requests.py.
-- Each looks for the entry first, and for the waits row where there is no entry. Neither: it has ended, there is none, or
-- it moved from one to the other in this moment; nothing was written, and the caller reads what it is, or begins again.

-- :name cancel
-- waiting -> pending: it is asked to end, and wakes for it; what is running or pending is asked, too.
-- pending | waiting -> cancelled | error: what never ran ends at once.
-- $1 shard int4 · $2 ids uuid[] · $3 key text of the request: $cancel, or $deadline · $4 what it says, json text
-- $5 key text of one more request, where there is one already (null: leave it)
-- $6 status text and $7 payload text of the result of what never ran
-- Locks the entries in id order, then the waits rows. An id that doesn't come back: see above.
WITH entry AS MATERIALIZED (
    SELECT workflow_id, epoch, started_at, recoveries, queue, parent_id
    FROM perdure.queue_entries
    WHERE shard = $1::int4 AND workflow_id = ANY (ARRAY(SELECT unnest($2::uuid[])))
    ORDER BY workflow_id
    FOR UPDATE
), woken AS (
    DELETE FROM perdure.waits
    WHERE shard = $1::int4 AND workflow_id = ANY (ARRAY(SELECT unnest($2::uuid[])))
      AND (workflow_id IN (SELECT entry.workflow_id FROM entry)) IS NOT TRUE
    RETURNING workflow_id, queue, name, priority, partition, enqueued_at, started_at, epoch, recoveries, stalls,
              wakes, deadline, version, parent_id
), known AS MATERIALIZED (
    SELECT workflow_id, epoch, started_at, recoveries, queue, parent_id FROM entry
    UNION ALL
    SELECT workflow_id, epoch, started_at, recoveries, queue, parent_id FROM woken
), asked AS (
    INSERT INTO perdure.checkpoints (shard, workflow_id, key, kind, position, status, payload, created_at, epoch)
    SELECT $1::int4, known.workflow_id, $3::text, 'request', 0, 'success', $4::json, perdure.now(), known.epoch
    FROM known
    WHERE known.epoch > 0
    ON CONFLICT DO NOTHING
    RETURNING workflow_id
), asked_again AS (
    INSERT INTO perdure.checkpoints (shard, workflow_id, key, kind, position, status, payload, created_at, epoch)
    SELECT $1::int4, known.workflow_id, $5::text, 'request', 0, 'success', $4::json, perdure.now(), known.epoch
    FROM known
    WHERE known.epoch > 0 AND $5::text IS NOT NULL
      AND (known.workflow_id IN (SELECT asked.workflow_id FROM asked)) IS NOT TRUE
    ON CONFLICT DO NOTHING
), bumped AS (
    UPDATE perdure.queue_entries
    SET wakes = wakes + 1
    WHERE shard = $1::int4 AND workflow_id = ANY (ARRAY(SELECT entry.workflow_id FROM entry WHERE entry.epoch > 0))
), back AS (
    INSERT INTO perdure.queue_entries
        (shard, workflow_id, queue, name, priority, partition, enqueued_at, started_at, epoch, recoveries, stalls,
         wakes, deadline, version, parent_id)
    SELECT $1::int4, woken.workflow_id, woken.queue, woken.name, woken.priority, woken.partition, woken.enqueued_at,
           woken.started_at, woken.epoch, woken.recoveries, woken.stalls, woken.wakes, woken.deadline, woken.version,
           woken.parent_id
    FROM woken
    WHERE woken.epoch > 0
), dropped AS (
    DELETE FROM perdure.queue_entries
    WHERE shard = $1::int4 AND workflow_id = ANY (ARRAY(SELECT entry.workflow_id FROM entry WHERE entry.epoch = 0))
), ended AS (
    INSERT INTO perdure.checkpoints
        (shard, workflow_id, key, kind, position, status, payload, recoveries, started_at, created_at, epoch)
    SELECT $1::int4, known.workflow_id, '$result', 'result', 2147483647, $6::text, $7::json, known.recoveries,
           known.started_at, perdure.now(), known.epoch
    FROM known
    WHERE known.epoch = 0
), told AS (
    INSERT INTO perdure.outbox (shard, id, target_id, created_at)
    SELECT $1::int4, perdure.note_id(perdure.now()), known.parent_id, perdure.now()
    FROM known
    WHERE known.epoch = 0 AND known.parent_id IS NOT NULL
)
SELECT workflow_id, queue, epoch = 0 AS ended FROM known;

-- :name terminate
-- pending | running | waiting -> cancelled, at once: no code of it runs any more, and its worker can record nothing.
-- $1 shard int4 · $2 ids uuid[] · $3 payload text of the result
-- Where somebody has made an entry for what has a result, the result stays, and the entry goes.
WITH entry AS MATERIALIZED (
    SELECT workflow_id, epoch, started_at, recoveries, queue, parent_id
    FROM perdure.queue_entries
    WHERE shard = $1::int4 AND workflow_id = ANY (ARRAY(SELECT unnest($2::uuid[])))
    ORDER BY workflow_id
    FOR UPDATE
), wait AS (
    DELETE FROM perdure.waits
    WHERE shard = $1::int4 AND workflow_id = ANY (ARRAY(SELECT unnest($2::uuid[])))
      AND (workflow_id IN (SELECT entry.workflow_id FROM entry)) IS NOT TRUE
    RETURNING workflow_id, epoch, started_at, recoveries, queue, parent_id
), known AS MATERIALIZED (
    SELECT workflow_id, epoch, started_at, recoveries, queue, parent_id FROM entry
    UNION ALL
    SELECT workflow_id, epoch, started_at, recoveries, queue, parent_id FROM wait
), dropped AS (
    DELETE FROM perdure.queue_entries
    WHERE shard = $1::int4 AND workflow_id = ANY (ARRAY(SELECT entry.workflow_id FROM entry))
), ended AS (
    INSERT INTO perdure.checkpoints
        (shard, workflow_id, key, kind, position, status, payload, recoveries, started_at, created_at, epoch)
    SELECT $1::int4, known.workflow_id, '$result', 'result', 2147483647, 'cancelled', $3::json, known.recoveries,
           known.started_at, perdure.now(), known.epoch
    FROM known
    ON CONFLICT (shard, workflow_id, key) DO NOTHING
), told AS (
    INSERT INTO perdure.outbox (shard, id, target_id, created_at)
    SELECT $1::int4, perdure.note_id(perdure.now()), known.parent_id, perdure.now()
    FROM known
    WHERE known.parent_id IS NOT NULL
)
SELECT workflow_id, queue, true AS ended FROM known;

-- :name descendants
-- Unfinished children of these workflows, and theirs, that aren't detached. $1 shard int4 · $2 ids uuid[]
-- Walks workflow_rows_parent, one probe a workflow.
WITH RECURSIVE walk AS (
    SELECT item.id, false AS below FROM unnest($2::uuid[]) AS item (id)
    UNION
    SELECT child.id, true
    FROM walk,
         LATERAL (
             SELECT row.id
             FROM perdure.workflow_rows AS row
             WHERE row.shard = $1::int4 AND row.parent_id = walk.id AND NOT row.detached
             OFFSET 0) AS child
)
SELECT walk.id
FROM walk
WHERE walk.below
  AND (SELECT true FROM perdure.checkpoints AS result
       WHERE result.shard = $1::int4 AND result.workflow_id = walk.id AND result.key = '$result') IS NOT TRUE;

-- :name ancestors
-- The parent of a workflow, its parent, and so on. $1 shard int4 · $2 id uuid
WITH RECURSIVE walk AS (
    SELECT $2::uuid AS id
    UNION
    SELECT (SELECT row.parent_id FROM perdure.workflow_rows AS row WHERE row.shard = $1::int4 AND row.id = walk.id)
    FROM walk
    WHERE walk.id IS NOT NULL
)
SELECT id FROM walk WHERE id IS NOT NULL AND id <> $2::uuid;

-- :name child_results
-- How these workflows ended. status null: they haven't. No row: there is no such workflow.
-- $1 shard int4 · $2 ids uuid[]
SELECT item.id, result.status, result.payload
FROM unnest($2::uuid[]) AS item (id)
     LEFT JOIN LATERAL (
         SELECT status, payload::text AS payload
         FROM perdure.checkpoints
         WHERE shard = $1::int4 AND workflow_id = item.id AND key = '$result'
         OFFSET 0) AS result ON true
WHERE (SELECT true FROM perdure.workflow_rows AS row WHERE row.shard = $1::int4 AND row.id = item.id);

-- :name failed_children
-- The children because of which workflows failed, and those that were cancelled with them: as far as they are over.
-- $1 shard int4 · $2 ids uuid[] · $3 why children are cancelled with their parents, text
WITH over AS MATERIALIZED (
    SELECT result.workflow_id, result.payload
    FROM unnest($2::uuid[]) AS item (id),
         LATERAL (
             SELECT workflow_id, payload
             FROM perdure.checkpoints
             WHERE shard = $1::int4 AND workflow_id = item.id AND key = '$result' AND status IN ('error', 'cancelled')
             OFFSET 0) AS result
), child AS MATERIALIZED (
    SELECT begun.id
    FROM over,
         LATERAL pg_catalog.json_array_elements_text(
             CASE pg_catalog.json_typeof(over.payload -> 'steps') WHEN 'array' THEN over.payload -> 'steps'
             ELSE '[]'::json END) AS step (key),
         LATERAL (
             SELECT (payload ->> 'workflow_id')::uuid AS id
             FROM perdure.checkpoints
             WHERE shard = $1::int4 AND workflow_id = over.workflow_id AND checkpoints.key = step.key
               AND kind = 'child'
             OFFSET 0) AS begun
    UNION
    SELECT row.id
    FROM over,
         LATERAL (
             SELECT row.id
             FROM perdure.workflow_rows AS row
             WHERE row.shard = $1::int4 AND row.parent_id = over.workflow_id
             OFFSET 0) AS row
    WHERE (SELECT payload -> 'args' ->> 0 FROM perdure.checkpoints
           WHERE shard = $1::int4 AND workflow_id = row.id AND key = '$result' AND status = 'cancelled') = $3::text
)
SELECT child.id
FROM child
WHERE (SELECT true FROM perdure.checkpoints
       WHERE shard = $1::int4 AND workflow_id = child.id AND key = '$result' AND status IN ('error', 'cancelled'));

-- :name wake_parents
-- running -> running, waiting -> pending: parents of which a child has ended look for it. Any worker, for whatever is in
-- the outbox. $1 shard int4 · $2 limit int4 · $3 uuid: none with a lower id
-- Locks what it takes (SKIP LOCKED), then the parents' entries in id order, then their waits rows. What is found in
-- neither is taken when it has ended, or waits for nobody (it will look when it runs); else it moves in this moment, and
-- the next look finds it. left: how many those are. now: what time it is. running: who is to be told at once; others
-- run where the child did, and have heard. In an order, so that the index is read no further than the limit; its keys
-- are compared as rows, for planners that know nothing of the table (page_active in workflows.sql).
WITH picked AS MATERIALIZED (
    SELECT id, target_id, worker_id
    FROM perdure.outbox
    WHERE (shard, id) >= ($1::int4, $3::uuid)
      AND (shard, id) <= ($1::int4, 'ffffffff-ffff-ffff-ffff-ffffffffffff'::uuid)
    ORDER BY shard, id
    LIMIT $2::int4
    FOR UPDATE SKIP LOCKED
), entry AS MATERIALIZED (
    SELECT workflow_id, worker_id
    FROM perdure.queue_entries
    WHERE shard = $1::int4 AND workflow_id = ANY (ARRAY(SELECT picked.target_id FROM picked))
    ORDER BY workflow_id
    FOR UPDATE
), woken AS (
    DELETE FROM perdure.waits
    WHERE shard = $1::int4 AND workflow_id = ANY (ARRAY(SELECT picked.target_id FROM picked)) AND awaits_child
      AND (workflow_id IN (SELECT entry.workflow_id FROM entry)) IS NOT TRUE
    RETURNING workflow_id, queue, name, priority, partition, enqueued_at, started_at, epoch, recoveries, stalls,
              wakes, deadline, version, parent_id
), bumped AS (
    UPDATE perdure.queue_entries
    SET wakes = wakes + 1
    WHERE shard = $1::int4 AND workflow_id = ANY (ARRAY(SELECT entry.workflow_id FROM entry))
), back AS (
    INSERT INTO perdure.queue_entries
        (shard, workflow_id, queue, name, priority, partition, enqueued_at, started_at, epoch, recoveries, stalls,
         wakes, deadline, version, parent_id)
    SELECT $1::int4, woken.workflow_id, woken.queue, woken.name, woken.priority, woken.partition, woken.enqueued_at,
           woken.started_at, woken.epoch, woken.recoveries, woken.stalls, woken.wakes, woken.deadline, woken.version,
           woken.parent_id
    FROM woken
), settled AS MATERIALIZED (
    SELECT picked.id
    FROM picked
    WHERE (picked.target_id IN (SELECT entry.workflow_id FROM entry)) IS TRUE
       OR (picked.target_id IN (SELECT woken.workflow_id FROM woken)) IS TRUE
       OR (SELECT NOT awaits_child FROM perdure.waits
           WHERE shard = $1::int4 AND workflow_id = picked.target_id) IS TRUE
       OR (SELECT true FROM perdure.checkpoints
           WHERE shard = $1::int4 AND workflow_id = picked.target_id AND key = '$result') IS TRUE
       OR (SELECT true FROM perdure.workflow_rows AS row
           WHERE row.shard = $1::int4 AND row.id = picked.target_id) IS NOT TRUE
), taken AS (
    DELETE FROM perdure.outbox
    WHERE shard = $1::int4 AND id = ANY (ARRAY(SELECT settled.id FROM settled))
)
SELECT ARRAY(SELECT entry.workflow_id FROM entry
             WHERE EXISTS (SELECT 1 FROM picked
                           WHERE picked.target_id = entry.workflow_id
                             AND picked.worker_id IS DISTINCT FROM entry.worker_id)) AS running,
       ARRAY(SELECT woken.queue FROM woken) AS queues,
       (SELECT pg_catalog.count(*) FROM picked) AS found,
       (SELECT pg_catalog.count(*) FROM picked) - (SELECT pg_catalog.count(*) FROM settled) AS left,
       perdure.now() AS now;

-- :name resume_ended
-- error | cancelled -> pending: the result, the cancel, and the failures that the result came from are set aside; all
-- else stays, and is replayed. $1 shard int4 · $2 ids uuid[] · $3 token text: what tells this resume from others
-- The count of wakes goes on behind all places of messages that are or were there.
-- The lock is the result's row: of two resumes one finds it. The deadline that was is no more.
WITH ended AS MATERIALIZED (
    SELECT result.workflow_id, result.epoch, result.recoveries, result.started_at, result.payload
    FROM (SELECT unnest($2::uuid[]) AS id ORDER BY id) AS item,
         LATERAL (
             SELECT workflow_id, epoch, recoveries, started_at, payload
             FROM perdure.checkpoints
             WHERE shard = $1::int4 AND workflow_id = item.id AND key = '$result' AND status IN ('error', 'cancelled')
             OFFSET 0
             FOR UPDATE) AS result
), failed AS MATERIALIZED (
    SELECT ended.workflow_id, step.key
    FROM ended,
         LATERAL pg_catalog.json_array_elements_text(
             CASE pg_catalog.json_typeof(ended.payload -> 'steps') WHEN 'array' THEN ended.payload -> 'steps'
             ELSE '[]'::json END) AS step (key)
    UNION ALL
    SELECT park.workflow_id, pg_catalog.regexp_replace(park.key, '#[ai][0-9]+$', '')
    FROM perdure.checkpoints AS park
    WHERE park.shard = $1::int4 AND park.workflow_id = ANY (ARRAY(SELECT ended.workflow_id FROM ended))
      AND park.kind = 'park'
), aside AS (
    UPDATE perdure.checkpoints
    SET key = '$history/' || $3::text || '/' || key, kind = 'history'
    WHERE shard = $1::int4 AND workflow_id = ANY (ARRAY(SELECT ended.workflow_id FROM ended))
      AND (key = '$result' OR kind IN ('request', 'cancel')
           OR kind IN ('step', 'child') AND status <> 'success'
              AND ((workflow_id, key) IN (SELECT failed.workflow_id, failed.key FROM failed)) IS TRUE
           OR kind IN ('attempt', 'park', 'intent')
              AND (key LIKE '$result#%'
                   OR ((workflow_id, pg_catalog.regexp_replace(key, '#[ai][0-9]+$', ''))
                       IN (SELECT failed.workflow_id, failed.key FROM failed)) IS TRUE))
), forgotten AS (
    DELETE FROM perdure.deadlines
    WHERE shard = $1::int4 AND workflow_id = ANY (ARRAY(SELECT ended.workflow_id FROM ended))
), entered AS (
    INSERT INTO perdure.queue_entries
        (shard, workflow_id, queue, name, priority, partition, enqueued_at, started_at, epoch, recoveries, wakes, version,
         parent_id)
    SELECT $1::int4, ended.workflow_id, row.queue, row.name, row.priority, row.partition, perdure.now(),
           ended.started_at, ended.epoch, COALESCE(ended.recoveries, 0),
           GREATEST(0,
                    (SELECT pg_catalog.max(place) FROM perdure.message_rows
                     WHERE shard = $1::int4 AND message_rows.workflow_id = ended.workflow_id),
                    (SELECT pg_catalog.max(args_hash) FROM perdure.checkpoints AS received
                     WHERE received.shard = $1::int4 AND received.workflow_id = ended.workflow_id
                       AND received.kind = 'message')) >> 16,
           row.version, row.parent_id
    FROM ended,
         LATERAL (
             SELECT queue, name, priority, partition, version, parent_id
             FROM perdure.workflow_rows
             WHERE shard = $1::int4 AND id = ended.workflow_id
             OFFSET 0) AS row
    RETURNING workflow_id, queue
)
SELECT workflow_id, queue FROM entered;

-- :name resume_parked
-- waiting -> pending, for workflows with steps that are parked: those are tried anew. One that is running (another step
-- of it is) is told; its steps go on in memory. $1 shard int4 · $2 ids uuid[] · $3 token text, as above
WITH parked AS MATERIALIZED (
    SELECT park.workflow_id, pg_catalog.regexp_replace(park.key, '#[ai][0-9]+$', '') AS key
    FROM perdure.checkpoints AS park
    WHERE park.shard = $1::int4 AND park.workflow_id = ANY (ARRAY(SELECT unnest($2::uuid[]))) AND park.kind = 'park'
), entry AS MATERIALIZED (
    SELECT workflow_id, queue
    FROM perdure.queue_entries
    WHERE shard = $1::int4 AND workflow_id = ANY (ARRAY(SELECT parked.workflow_id FROM parked))
    ORDER BY workflow_id
    FOR UPDATE
), woken AS (
    DELETE FROM perdure.waits
    WHERE shard = $1::int4 AND workflow_id = ANY (ARRAY(SELECT parked.workflow_id FROM parked))
      AND (workflow_id IN (SELECT entry.workflow_id FROM entry)) IS NOT TRUE
    RETURNING workflow_id, queue, name, priority, partition, enqueued_at, started_at, epoch, recoveries, stalls,
              wakes, deadline, version, parent_id
), known AS MATERIALIZED (
    SELECT workflow_id, queue FROM entry
    UNION ALL
    SELECT workflow_id, queue FROM woken
), aside AS (
    UPDATE perdure.checkpoints
    SET key = '$history/' || $3::text || '/' || key, kind = 'history'
    WHERE shard = $1::int4 AND workflow_id = ANY (ARRAY(SELECT known.workflow_id FROM known))
      AND kind IN ('attempt', 'park', 'intent')
      AND ((workflow_id, pg_catalog.regexp_replace(key, '#[ai][0-9]+$', ''))
           IN (SELECT parked.workflow_id, parked.key FROM parked)) IS TRUE
), bumped AS (
    UPDATE perdure.queue_entries
    SET wakes = wakes + 1
    WHERE shard = $1::int4 AND workflow_id = ANY (ARRAY(SELECT entry.workflow_id FROM entry))
), back AS (
    INSERT INTO perdure.queue_entries
        (shard, workflow_id, queue, name, priority, partition, enqueued_at, started_at, epoch, recoveries, stalls,
         wakes, deadline, version, parent_id)
    SELECT $1::int4, woken.workflow_id, woken.queue, woken.name, woken.priority, woken.partition, woken.enqueued_at,
           woken.started_at, woken.epoch, woken.recoveries, woken.stalls, woken.wakes, woken.deadline, woken.version,
           woken.parent_id
    FROM woken
)
SELECT workflow_id, queue FROM known;

-- :name outcomes
-- The outcomes that a workflow's code has got, in order. $1 shard int4 · $2 id uuid
SELECT key, position
FROM perdure.checkpoints
WHERE shard = $1::int4 AND workflow_id = $2::uuid AND kind IN ('step', 'value', 'sleep', 'message', 'child')
ORDER BY position;

-- :name fork
-- nothing -> pending: a new workflow with a copy of the outcomes of another one, up to a place, some of them replaced.
-- $1 shard int4 · $2 source uuid · $3 id uuid of the new one · $4 the last place int4 (null: all, but the failures that
-- the source failed from) · $5 keys text[] and $6 payloads text[] of what is replaced · $7 version text
-- Its epoch is as if it had run before, so its first claim loads the copy. The count of wakes goes on behind all places
-- of messages in it. No row: there is no such source. Locks nothing.
WITH source AS MATERIALIZED (
    SELECT id, name, queue, priority, partition, attributes
    FROM perdure.workflow_rows
    WHERE shard = $1::int4 AND id = $2::uuid
), failed AS MATERIALIZED (
    SELECT step.key
    FROM perdure.checkpoints AS result,
         LATERAL pg_catalog.json_array_elements_text(
             CASE pg_catalog.json_typeof(result.payload -> 'steps') WHEN 'array' THEN result.payload -> 'steps'
             ELSE '[]'::json END) AS step (key)
    WHERE result.shard = $1::int4 AND result.workflow_id = $2::uuid AND result.key = '$result'
      AND result.status <> 'success' AND $4::int4 IS NULL
), kept AS MATERIALIZED (
    SELECT key, kind, position, status, payload, args_hash, attempts, version, started_at, created_at, worker_id
    FROM perdure.checkpoints
    WHERE shard = $1::int4 AND workflow_id = $2::uuid
      AND (key = '$input'
           OR kind IN ('step', 'value', 'sleep', 'message', 'child')
              AND ($4::int4 IS NULL OR position <= $4::int4)
              AND (status = 'success' OR (key IN (SELECT failed.key FROM failed)) IS NOT TRUE))
), begun AS MATERIALIZED (
    SELECT start.key, start.kind, start.position, start.status, start.payload, start.args_hash, start.attempts,
           start.version, start.started_at, start.created_at, start.worker_id
    FROM perdure.checkpoints AS start
    WHERE start.shard = $1::int4 AND start.workflow_id = $2::uuid AND start.kind = 'start'
      AND ((start.key IN (SELECT kept.key || '#c' FROM kept)) IS TRUE
           OR ($4::int4 IS NULL OR start.position < $4::int4)
              AND (SELECT true FROM perdure.checkpoints AS result
                   WHERE result.shard = $1::int4 AND result.workflow_id = (start.payload #>> '{}')::uuid
                     AND result.key = '$result'))
), opened AS (
    INSERT INTO perdure.workflow_rows
        (shard, id, name, queue, priority, partition, attributes, version, forked_from, created_at)
    SELECT $1::int4, $3::uuid, source.name, source.queue, source.priority, source.partition, source.attributes,
           $7::text, source.id, perdure.now()
    FROM source
    ON CONFLICT DO NOTHING
    RETURNING id, name, queue, priority, partition
), copied AS (
    INSERT INTO perdure.checkpoints
        (shard, workflow_id, key, kind, position, status, payload, args_hash, attempts, version, started_at, created_at,
         worker_id)
    SELECT $1::int4, opened.id, item.key, item.kind, item.position,
           CASE WHEN item.key = ANY ($5::text[]) THEN 'success' ELSE item.status END,
           CASE WHEN item.key = ANY ($5::text[])
                THEN (SELECT patch.payload FROM unnest($5::text[], $6::text[]) AS patch (key, payload)
                      WHERE patch.key = item.key)::json
                ELSE item.payload END,
           item.args_hash, item.attempts, item.version, item.started_at, item.created_at, item.worker_id
    FROM opened,
         (SELECT * FROM kept UNION ALL SELECT * FROM begun) AS item
), entered AS (
    INSERT INTO perdure.queue_entries
        (shard, workflow_id, queue, name, priority, partition, enqueued_at, epoch, wakes, version)
    SELECT $1::int4, opened.id, opened.queue, opened.name, opened.priority, opened.partition, perdure.now(), 1,
           COALESCE((SELECT pg_catalog.max(kept.args_hash) FROM kept WHERE kept.kind = 'message'), 0) >> 16, $7::text
    FROM opened
)
SELECT id FROM opened;

-- :name rewind
-- success | error | cancelled -> pending: what lies behind a place is set aside, with the result and what is replaced.
-- $1 shard int4 · $2 ids uuid[] · $3 token text: what tells this rewind from others · $4 the last place int4 (null: all
-- stay, but the failures that the result came from) · $5 keys text[] and $6 payloads text[] of what is replaced
-- The lock is the result's row. The deadline that was is no more. No row: it hasn't ended, or is rewound by another one.
WITH ended AS MATERIALIZED (
    SELECT result.workflow_id, result.epoch, result.recoveries, result.started_at, result.payload, result.status
    FROM (SELECT unnest($2::uuid[]) AS id ORDER BY id) AS item,
         LATERAL (
             SELECT workflow_id, epoch, recoveries, started_at, payload, status
             FROM perdure.checkpoints
             WHERE shard = $1::int4 AND workflow_id = item.id AND key = '$result'
             OFFSET 0
             FOR UPDATE) AS result
), failed AS MATERIALIZED (
    SELECT ended.workflow_id, step.key
    FROM ended,
         LATERAL pg_catalog.json_array_elements_text(
             CASE pg_catalog.json_typeof(ended.payload -> 'steps') WHEN 'array' THEN ended.payload -> 'steps'
             ELSE '[]'::json END) AS step (key)
    WHERE ended.status <> 'success' AND $4::int4 IS NULL
), kept AS MATERIALIZED (
    SELECT workflow_id, key
    FROM perdure.checkpoints
    WHERE shard = $1::int4 AND workflow_id = ANY (ARRAY(SELECT ended.workflow_id FROM ended))
      AND kind IN ('step', 'value', 'sleep', 'message', 'child')
      AND ($4::int4 IS NULL OR position <= $4::int4)
      AND (status = 'success'
           OR ((workflow_id, key) IN (SELECT failed.workflow_id, failed.key FROM failed)) IS NOT TRUE)
), aside AS (
    UPDATE perdure.checkpoints
    SET key = '$history/' || $3::text || '/' || key, kind = 'history'
    WHERE shard = $1::int4 AND workflow_id = ANY (ARRAY(SELECT ended.workflow_id FROM ended))
      AND (key = '$result'
           OR kind NOT IN ('input', 'result', 'runs', 'history')
              AND ((workflow_id, key) IN (SELECT kept.workflow_id, kept.key FROM kept)) IS NOT TRUE
              AND NOT (kind = 'start'
                       AND (($4::int4 IS NULL OR position < $4::int4)
                            OR ((workflow_id, key) IN (SELECT kept.workflow_id, kept.key || '#c' FROM kept)) IS TRUE)))
), former AS (
    INSERT INTO perdure.checkpoints
        (shard, workflow_id, key, kind, position, status, payload, args_hash, attempts, version, started_at, created_at,
         worker_id, epoch)
    SELECT $1::int4, was.workflow_id, '$history/' || $3::text || '/' || was.key, 'history', was.position, was.status,
           was.payload, was.args_hash, was.attempts, was.version, was.started_at, was.created_at, was.worker_id,
           was.epoch
    FROM perdure.checkpoints AS was
    WHERE was.shard = $1::int4 AND was.workflow_id = ANY (ARRAY(SELECT ended.workflow_id FROM ended))
      AND was.key = ANY ($5::text[])
), replaced AS (
    UPDATE perdure.checkpoints
    SET status = 'success',
        payload = (SELECT patch.payload FROM unnest($5::text[], $6::text[]) AS patch (key, payload)
                   WHERE patch.key = checkpoints.key)::json
    WHERE shard = $1::int4 AND workflow_id = ANY (ARRAY(SELECT ended.workflow_id FROM ended))
      AND key = ANY ($5::text[])
), forgotten AS (
    DELETE FROM perdure.deadlines
    WHERE shard = $1::int4 AND workflow_id = ANY (ARRAY(SELECT ended.workflow_id FROM ended))
), entered AS (
    INSERT INTO perdure.queue_entries
        (shard, workflow_id, queue, name, priority, partition, enqueued_at, started_at, epoch, recoveries, wakes, version,
         parent_id)
    SELECT $1::int4, ended.workflow_id, row.queue, row.name, row.priority, row.partition, perdure.now(),
           ended.started_at, GREATEST(ended.epoch, 1), COALESCE(ended.recoveries, 0),
           GREATEST(0,
                    (SELECT pg_catalog.max(place) FROM perdure.message_rows
                     WHERE shard = $1::int4 AND message_rows.workflow_id = ended.workflow_id),
                    (SELECT pg_catalog.max(args_hash) FROM perdure.checkpoints AS received
                     WHERE received.shard = $1::int4 AND received.workflow_id = ended.workflow_id
                       AND received.kind = 'message')) >> 16,
           row.version, row.parent_id
    FROM ended,
         LATERAL (
             SELECT queue, name, priority, partition, version, parent_id
             FROM perdure.workflow_rows
             WHERE shard = $1::int4 AND id = ended.workflow_id
             OFFSET 0) AS row
    RETURNING workflow_id, queue
)
SELECT workflow_id, queue FROM entered;

-- :name states
-- What these workflows are, for what can't be done with them. No row: there is none. status null: it is being moved.
-- $1 shard int4 · $2 ids uuid[]
SELECT item.id,
       COALESCE(
           (SELECT CASE WHEN entry.worker_id IS NULL THEN 'pending' ELSE 'running' END
            FROM perdure.queue_entries AS entry
            WHERE entry.shard = $1::int4 AND entry.workflow_id = item.id),
           (SELECT 'waiting' FROM perdure.waits WHERE shard = $1::int4 AND workflow_id = item.id),
           (SELECT status FROM perdure.checkpoints
            WHERE shard = $1::int4 AND workflow_id = item.id AND key = '$result')) AS status
FROM unnest($2::uuid[]) AS item (id)
WHERE (SELECT true FROM perdure.workflow_rows AS row WHERE row.shard = $1::int4 AND row.id = item.id);

-- :name send
-- Messages to workflows that haven't ended. Those that wait for one wake: waiting -> pending; the others are told.
-- $1 shard int4 · $2 targets uuid[] · $3 ids uuid[] of the messages · $4 target of each uuid[] · $5 its number among
-- those of its target int8[] · $6 topics text[] · $7 payloads text[] · $8 senders uuid[] (null: none)
-- $9 whether they ask for an answer bool
-- Locks the targets' entries in id order, then the waits rows. A message's place is the target's count of wakes, under
-- that lock, so places are in the order of the commits. An id that was sent before is left as it is.
-- A target that doesn't come back: see above; nothing was written for it.
WITH entry AS MATERIALIZED (
    SELECT workflow_id, queue, wakes
    FROM perdure.queue_entries
    WHERE shard = $1::int4 AND workflow_id = ANY (ARRAY(SELECT unnest($2::uuid[])))
    ORDER BY workflow_id
    FOR UPDATE
), woken AS (
    DELETE FROM perdure.waits
    WHERE shard = $1::int4 AND workflow_id = ANY (ARRAY(SELECT unnest($2::uuid[]))) AND hears
      AND (workflow_id IN (SELECT entry.workflow_id FROM entry)) IS NOT TRUE
    RETURNING workflow_id, queue, name, priority, partition, enqueued_at, started_at, epoch, recoveries, stalls,
              wakes, deadline, version, parent_id
), told AS (
    UPDATE perdure.waits
    SET wakes = wakes + 1
    WHERE shard = $1::int4 AND workflow_id = ANY (ARRAY(SELECT unnest($2::uuid[]))) AND NOT hears
      AND (workflow_id IN (SELECT entry.workflow_id FROM entry)) IS NOT TRUE
    RETURNING workflow_id, queue, wakes - 1 AS wakes
), known AS MATERIALIZED (
    SELECT workflow_id, queue, wakes + 1 AS wakes, 'entry' AS was FROM entry
    UNION ALL
    SELECT workflow_id, queue, wakes + 1, 'woken' FROM woken
    UNION ALL
    SELECT workflow_id, queue, wakes + 1, 'told' FROM told
), bumped AS (
    UPDATE perdure.queue_entries
    SET wakes = wakes + 1
    WHERE shard = $1::int4 AND workflow_id = ANY (ARRAY(SELECT entry.workflow_id FROM entry))
), back AS (
    INSERT INTO perdure.queue_entries
        (shard, workflow_id, queue, name, priority, partition, enqueued_at, started_at, epoch, recoveries, stalls,
         wakes, deadline, version, parent_id)
    SELECT $1::int4, woken.workflow_id, woken.queue, woken.name, woken.priority, woken.partition, woken.enqueued_at,
           woken.started_at, woken.epoch, woken.recoveries, woken.stalls, woken.wakes + 1, woken.deadline,
           woken.version, woken.parent_id
    FROM woken
), put AS (
    INSERT INTO perdure.message_rows (shard, workflow_id, place, id, topic, payload, sender_id, asks, created_at)
    SELECT $1::int4, known.workflow_id, (known.wakes << 16) + item.number, item.id, item.topic, item.payload::json,
           item.sender, $9::bool, perdure.now()
    FROM unnest($3::uuid[], $4::uuid[], $5::int8[], $6::text[], $7::text[], $8::uuid[])
             AS item (id, target, number, topic, payload, sender)
    JOIN known ON known.workflow_id = item.target
    ON CONFLICT DO NOTHING
)
SELECT workflow_id, queue, was FROM known;

-- :name sent
-- Whether a message is there: for a send that found its target gone. $1 shard int4 · $2 target uuid · $3 its id uuid
SELECT workflow_id FROM perdure.message_rows WHERE shard = $1::int4 AND workflow_id = $2::uuid AND id = $3::uuid;

-- :name set_event
-- A workflow announces something: one more value under that name, or none if it was set under that id before.
-- $1 shard int4 · $2 workflow_id uuid · $3 name text · $4 its id uuid · $5 payload text
-- No row back: it was set before; or another one of that name came first, and it is to be set again.
INSERT INTO perdure.event_rows (shard, workflow_id, name, number, id, payload, created_at)
SELECT $1::int4, $2::uuid, $3::text,
       COALESCE((SELECT number FROM perdure.event_rows
                 WHERE shard = $1::int4 AND workflow_id = $2::uuid AND event_rows.name = $3::text
                 ORDER BY number DESC
                 LIMIT 1), 0) + 1,
       $4::uuid, $5::json, perdure.now()
ON CONFLICT DO NOTHING
RETURNING id;

-- :name event_set
-- Whether an event was set under that id. $1 shard int4 · $2 workflow_id uuid · $3 id uuid
SELECT id FROM perdure.event_rows WHERE shard = $1::int4 AND workflow_id = $2::uuid AND id = $3::uuid;

-- :name event
-- What a workflow has announced last under a name. $1 shard int4 · $2 workflow_id uuid · $3 name text
SELECT id, payload::text AS payload
FROM perdure.event_rows
WHERE shard = $1::int4 AND workflow_id = $2::uuid AND name = $3::text
ORDER BY number DESC
LIMIT 1;

-- :name await_event
-- A workflow waits for an event of another one. In a statement before it looks whether the event is there.
-- $1 shard int4 · $2 workflow_id uuid · $3 name text · $4 waiter_id uuid
INSERT INTO perdure.event_waits (shard, workflow_id, name, waiter_id, created_at)
VALUES ($1::int4, $2::uuid, $3::text, $4::uuid, perdure.now())
ON CONFLICT DO NOTHING;

-- :name event_waiters
-- Who waits for an event. In a statement after it was set. $1 shard int4 · $2 workflow_id uuid · $3 name text
SELECT waiter_id FROM perdure.event_waits WHERE shard = $1::int4 AND workflow_id = $2::uuid AND name = $3::text;

-- :name forget_event_waiters
-- They have been told. $1 shard int4 · $2 workflow_id uuid · $3 name text · $4 waiters uuid[]
DELETE FROM perdure.event_waits
WHERE shard = $1::int4 AND workflow_id = $2::uuid AND name = $3::text
  AND waiter_id = ANY (ARRAY(SELECT unnest($4::uuid[])));

-- :name stream
-- Entries of a stream, in order. $1 shard int4 · $2 workflow_id uuid · $3 name text · $4 from number int8 · $5 limit int4
SELECT number, part, payload::text AS payload
FROM perdure.stream_rows
WHERE shard = $1::int4 AND workflow_id = $2::uuid AND name = $3::text AND number >= $4::int8
ORDER BY number
LIMIT $5::int4;

-- :name stream_parts
-- Who wrote which parts of a stream. superseded_at: where a later attempt of the same step begins. is_stale: another
-- attempt's outcome was recorded; is_settled: this one's. In a statement after the entries were read.
-- $1 shard int4 · $2 workflow_id uuid · $3 name text · $4 from part int4
SELECT part.part, part.key, part.attempt, part.first,
       CASE WHEN part.key <> '' THEN
           pg_catalog.lead(part.first) OVER (PARTITION BY part.key ORDER BY part.part)
       END AS superseded_at,
       part.is_void OR COALESCE(outcome.epoch <> part.epoch OR outcome.attempts <> part.attempt, false) AS is_stale,
       part.key = '' OR COALESCE(outcome.epoch = part.epoch AND outcome.attempts = part.attempt, false) AS is_settled
FROM perdure.stream_parts AS part
     LEFT JOIN LATERAL (
         SELECT epoch, attempts
         FROM perdure.checkpoints
         WHERE shard = $1::int4 AND workflow_id = $2::uuid AND checkpoints.key = part.key
         OFFSET 0) AS outcome ON true
WHERE part.shard = $1::int4 AND part.workflow_id = $2::uuid AND part.name = $3::text AND part.part >= $4::int4
ORDER BY part.part;

-- :name stream_end
-- The numbers of the next entry and the next part of a stream. $1 shard int4 · $2 workflow_id uuid · $3 name text
SELECT COALESCE((SELECT number FROM perdure.stream_rows
                 WHERE shard = $1::int4 AND workflow_id = $2::uuid AND name = $3::text
                 ORDER BY number DESC
                 LIMIT 1), -1) + 1 AS number,
       COALESCE((SELECT part FROM perdure.stream_parts
                 WHERE shard = $1::int4 AND workflow_id = $2::uuid AND name = $3::text
                 ORDER BY part DESC
                 LIMIT 1), -1) + 1 AS part;

-- :name set_attributes
-- Attributes of a workflow are changed from inside; others stay. $1 shard int4 · $2 id uuid · $3 text, a json object
UPDATE perdure.workflow_rows
SET attributes = (COALESCE(attributes::jsonb, '{}') || $3::jsonb)::json
WHERE shard = $1::int4 AND id = $2::uuid;

-- :name begin_anew
-- running -> pending: a workflow continues as new. Its history goes, but for the input, which is replaced, and what it is
-- asked for and hasn't been told; so do messages that it has received. What its steps have written to streams is final.
-- The worker that runs it, behind all that it had recorded. $1 shard int4 · $2 worker_id uuid · $3 id uuid
-- $4 epoch int8 · $5 input text · $6 version text · $7 whether its code was told to end bool: then what asked for that has been heard, and goes
-- Locks the entry. No row: this worker doesn't hold it any more.
WITH held AS MATERIALIZED (
    SELECT workflow_id
    FROM perdure.queue_entries
    WHERE shard = $1::int4 AND workflow_id = $3::uuid AND worker_id IS NOT DISTINCT FROM $2::uuid AND epoch = $4::int8
    FOR UPDATE
), received AS (
    DELETE FROM perdure.message_rows
    WHERE shard = $1::int4 AND workflow_id = (SELECT held.workflow_id FROM held)
      AND (place IN (SELECT taken.args_hash FROM perdure.checkpoints AS taken
                     WHERE taken.shard = $1::int4 AND taken.workflow_id = $3::uuid AND taken.kind = 'message'
                       AND taken.status = 'success')) IS TRUE
), cut AS (
    DELETE FROM perdure.checkpoints
    WHERE shard = $1::int4 AND workflow_id = (SELECT held.workflow_id FROM held)
      AND key NOT IN ('$input', '$runs') AND (kind <> 'request' OR $7::bool)
), given AS (
    UPDATE perdure.checkpoints
    SET payload = $5::json, created_at = perdure.now()
    WHERE shard = $1::int4 AND workflow_id = (SELECT held.workflow_id FROM held) AND key = '$input'
), streamed AS (
    UPDATE perdure.stream_parts AS part
    SET key = '',
        is_void = part.is_void
            OR EXISTS (
                SELECT 1 FROM perdure.stream_parts AS later
                WHERE later.shard = $1::int4 AND later.workflow_id = $3::uuid AND later.name = part.name
                  AND later.key = part.key AND later.part > part.part)
            OR (SELECT outcome.epoch <> part.epoch OR outcome.attempts <> part.attempt
                FROM perdure.checkpoints AS outcome
                WHERE outcome.shard = $1::int4 AND outcome.workflow_id = $3::uuid AND outcome.key = part.key) IS TRUE
    WHERE part.shard = $1::int4 AND part.workflow_id = (SELECT held.workflow_id FROM held)
      AND part.key <> ''
), counted AS (
    INSERT INTO perdure.checkpoints (shard, workflow_id, key, kind, position, status, payload, created_at, epoch)
    SELECT $1::int4, held.workflow_id, '$runs', 'runs', 0, 'success', '2', perdure.now(), $4::int8
    FROM held
    ON CONFLICT (shard, workflow_id, key) DO UPDATE
    SET payload = ((checkpoints.payload #>> '{}')::int8 + 1)::text::json, created_at = excluded.created_at,
        epoch = excluded.epoch
)
UPDATE perdure.queue_entries
SET worker_id = NULL, enqueued_at = perdure.now(), stalls = 0, version = $6::text
WHERE shard = $1::int4 AND workflow_id = (SELECT held.workflow_id FROM held)
RETURNING queue;

-- :name refuse_message
-- A message whose sender waits for an answer isn't for the workflow's code: it goes, and the answer comes, or neither.
-- $1 shard int4 · $2 workflow_id uuid · $3 its id uuid · $4 name of the answer text · $5 id of the answer uuid
-- $6 payload text. No row back: it was refused before.
WITH gone AS (
    DELETE FROM perdure.message_rows
    WHERE shard = $1::int4 AND workflow_id = $2::uuid AND id = $3::uuid
    RETURNING workflow_id
)
INSERT INTO perdure.event_rows (shard, workflow_id, name, number, id, payload, created_at)
SELECT $1::int4, gone.workflow_id, $4::text, 1, $5::uuid, $6::json, perdure.now()
FROM gone
ON CONFLICT DO NOTHING
RETURNING id;

-- :name messages
-- All that was sent to these workflows, received or not. $1 shard int4 · $2 ids uuid[]
SELECT workflow_id, place, topic, payload::text AS payload, CASE WHEN asks THEN id END AS question
FROM perdure.message_rows
WHERE shard = $1::int4 AND workflow_id = ANY (ARRAY(SELECT unnest($2::uuid[])))
ORDER BY workflow_id, place;

-- :name requests
-- What somebody has for workflows that this worker runs: requests, which of their steps are still parked, messages.
-- $1 shard int4 · $2 worker_id uuid · $3 ids uuid[] · $4 the place of the last message that each knows int8[]
-- An id that doesn't come back: this worker doesn't hold it any more. wakes and all else are of one snapshot.
SELECT entry.workflow_id, entry.epoch, entry.wakes, asked.key, asked.kind, asked.payload, asked.place, asked.question
FROM unnest($3::uuid[], $4::int8[]) AS item (id, after),
     LATERAL (
         SELECT workflow_id, epoch, wakes
         FROM perdure.queue_entries
         WHERE shard = $1::int4 AND workflow_id = item.id AND worker_id IS NOT DISTINCT FROM $2::uuid
         OFFSET 0) AS entry
     LEFT JOIN LATERAL (
         SELECT key, kind, payload::text AS payload, 0::int8 AS place, NULL::uuid AS question
         FROM perdure.checkpoints
         WHERE shard = $1::int4 AND workflow_id = entry.workflow_id AND kind IN ('request', 'park')
         UNION ALL
         SELECT topic, 'message', payload::text, place, CASE WHEN asks THEN id END
         FROM perdure.message_rows
         WHERE shard = $1::int4 AND workflow_id = entry.workflow_id AND place > item.after
         OFFSET 0) AS asked ON true;

-- :name due_deadlines
-- Workflows whose deadline has passed, ended or not. Locks nothing.
-- $1 shard int4 · $2 limit int4 · $3 timestamptz: none that passed before (null: all)
-- $3 is compared as a row: a planner that knows nothing of the table takes two ends of a range for a narrow one, and would
-- read all of it for each batch.
SELECT workflow_id
FROM perdure.deadlines
WHERE shard = $1::int4 AND due_at <= perdure.now()
  AND (due_at, workflow_id)
      >= (COALESCE($3::timestamptz, '-infinity'), '00000000-0000-0000-0000-000000000000'::uuid)
ORDER BY due_at
LIMIT $2::int4;

-- :name forget_deadlines
-- Deadlines that are dealt with. $1 shard int4 · $2 ids uuid[]
-- A sub-select: of how many ids they are, a planner that knows nothing of the table would conclude to read all of it.
DELETE FROM perdure.deadlines
WHERE shard = $1::int4 AND workflow_id = ANY (ARRAY(SELECT unnest($2::uuid[])));

-- :name resumed
-- Which of these a resume without an answer has reached. $1 shard int4 · $2 ids uuid[] · $3 its token text
SELECT item.id
FROM unnest($2::uuid[]) AS item (id)
WHERE (SELECT true FROM perdure.checkpoints AS aside
       WHERE aside.shard = $1::int4 AND aside.workflow_id = item.id AND aside.kind = 'history'
         AND pg_catalog.starts_with(aside.key, '$history/' || $3::text || '/')
       LIMIT 1);

-- :name delete_ended
-- success | error | cancelled -> nothing: the workflow and everything that hangs on it. $1 shard int4 · $2 ids uuid[]
-- The lock is the result's row: a resume finds it gone, or this finds it set aside. No row back: it hasn't ended; or
-- somebody has its row (a caller's open transaction takes over its key): to wait for that with other rows deleted would
-- make starts under their keys wait as well.
WITH free AS MATERIALIZED (
    SELECT id
    FROM perdure.workflow_rows
    WHERE shard = $1::int4 AND id = ANY (ARRAY(SELECT unnest($2::uuid[])))
    ORDER BY id
    FOR UPDATE SKIP LOCKED
), ended AS MATERIALIZED (
    SELECT result.workflow_id
    FROM (SELECT id FROM free ORDER BY id) AS item,
         LATERAL (
             SELECT workflow_id
             FROM perdure.checkpoints
             WHERE shard = $1::int4 AND workflow_id = item.id AND key = '$result'
             OFFSET 0
             FOR UPDATE) AS result
), messages AS (
    DELETE FROM perdure.message_rows
    WHERE shard = $1::int4 AND workflow_id = ANY (ARRAY(SELECT ended.workflow_id FROM ended))
), events AS (
    DELETE FROM perdure.event_rows
    WHERE shard = $1::int4 AND workflow_id = ANY (ARRAY(SELECT ended.workflow_id FROM ended))
), event_waits AS (
    DELETE FROM perdure.event_waits
    WHERE shard = $1::int4 AND workflow_id = ANY (ARRAY(SELECT ended.workflow_id FROM ended))
), streams AS (
    DELETE FROM perdure.stream_rows
    WHERE shard = $1::int4 AND workflow_id = ANY (ARRAY(SELECT ended.workflow_id FROM ended))
), stream_parts AS (
    DELETE FROM perdure.stream_parts
    WHERE shard = $1::int4 AND workflow_id = ANY (ARRAY(SELECT ended.workflow_id FROM ended))
), running AS (
    DELETE FROM perdure.running_steps
    WHERE shard = $1::int4 AND workflow_id = ANY (ARRAY(SELECT ended.workflow_id FROM ended))
), history AS (
    DELETE FROM perdure.checkpoints
    WHERE shard = $1::int4 AND workflow_id = ANY (ARRAY(SELECT ended.workflow_id FROM ended))
), deadline AS (
    DELETE FROM perdure.deadlines
    WHERE shard = $1::int4 AND workflow_id = ANY (ARRAY(SELECT ended.workflow_id FROM ended))
), row AS (
    DELETE FROM perdure.workflow_rows
    WHERE shard = $1::int4 AND id = ANY (ARRAY(SELECT ended.workflow_id FROM ended))
)
SELECT workflow_id FROM ended;

-- :name expired
-- The next workflows in the order of their ids, and which of them have been over for longer than they are kept.
-- $1 shard int4 · $2 after uuid · $3 limit int4 · $4 how long they are kept where nobody says, float8 in seconds
-- $5 the same for all of them, whatever anybody says, float8 in seconds (null: no) · $6 only that name text (null: all)
-- The keys are compared as rows, for planners that know nothing of the table (page_active).
-- is_recent: nothing that is as young as this, or younger, can be over for long enough.
WITH chunk AS MATERIALIZED (
    SELECT id, name, created_at
    FROM perdure.workflow_rows
    WHERE (shard, id) > ($1::int4, $2::uuid)
      AND (shard, id) <= ($1::int4, 'ffffffff-ffff-ffff-ffff-ffffffffffff'::uuid)
    ORDER BY shard, id
    LIMIT $3::int4
), shortest AS MATERIALIZED (
    SELECT COALESCE($5::float8, LEAST($4::float8, pg_catalog.min(keep_seconds))) AS seconds
    FROM perdure.retention_rows
    WHERE shard = $1::int4
)
SELECT chunk.id,
       chunk.created_at > perdure.now() - pg_catalog.make_interval(secs => (SELECT seconds FROM shortest)) AS is_recent,
       ($6::text IS NULL OR chunk.name = $6::text)
       AND COALESCE(
           (SELECT created_at FROM perdure.checkpoints
            WHERE shard = $1::int4 AND workflow_id = chunk.id AND key = '$result')
           <= perdure.now() - pg_catalog.make_interval(secs => COALESCE(
               $5::float8,
               CASE WHEN (SELECT true FROM perdure.retention_rows
                          WHERE shard = $1::int4 AND retention_rows.name = chunk.name)
                    THEN (SELECT keep_seconds FROM perdure.retention_rows
                          WHERE shard = $1::int4 AND retention_rows.name = chunk.name)
                    ELSE $4::float8 END)),
           false) AS is_expired
FROM chunk
ORDER BY chunk.id;

-- :name keep
-- For how long workflows of these names are kept. A worker, at its start.
-- $1 shard int4 · $2 names text[] · $3 seconds float8[] (null: for ever)
INSERT INTO perdure.retention_rows (shard, name, keep_seconds)
SELECT $1::int4, item.name, item.seconds
FROM unnest($2::text[], $3::float8[]) AS item (name, seconds)
ORDER BY item.name
ON CONFLICT (shard, name) DO UPDATE
SET keep_seconds = excluded.keep_seconds
WHERE retention_rows.keep_seconds IS DISTINCT FROM excluded.keep_seconds;

-- :name take_job
-- A job that is due; whoever gets the row does it, for so long. No row: somebody else does it, or it isn't due.
-- $1 shard int4 · $2 job text · $3 for how long nobody else will, float8 in seconds
UPDATE perdure.maintenance
SET next_at = perdure.now() + pg_catalog.make_interval(secs => $3::float8)
WHERE shard = $1::int4 AND job = $2::text AND next_at <= perdure.now()
RETURNING cursor;

-- :name put_job
-- How far a job has come, and when it goes on. $1 shard int4 · $2 job text · $3 cursor uuid (null: from the beginning)
-- $4 in how many seconds float8
UPDATE perdure.maintenance
SET cursor = $3::uuid, next_at = perdure.now() + pg_catalog.make_interval(secs => $4::float8)
WHERE shard = $1::int4 AND job = $2::text;

-- :name export_row
-- A workflow, without its checkpoints. $1 shard int4 · $2 id uuid
SELECT row.id, row.name, row.key, row.queue, row.priority, row.partition, row.deadline, row.version,
       row.attributes::text AS attributes, row.created_at
FROM perdure.workflow_rows AS row
WHERE row.shard = $1::int4 AND row.id = $2::uuid;

-- :name export_checkpoints
-- All that a workflow has recorded. $1 shard int4 · $2 id uuid
SELECT key, kind, position, status, payload::text AS payload, args_hash, attempts, recoveries, version, started_at,
       wake_at, created_at, epoch
FROM perdure.checkpoints
WHERE shard = $1::int4 AND workflow_id = $2::uuid
ORDER BY position, key;

-- :name export_messages
-- What was sent to a workflow. $1 shard int4 · $2 id uuid
SELECT place, id, topic, payload::text AS payload, sender_id, created_at
FROM perdure.message_rows
WHERE shard = $1::int4 AND workflow_id = $2::uuid
ORDER BY place;

-- :name export_events
-- What a workflow has announced. $1 shard int4 · $2 id uuid
SELECT name, number, id, payload::text AS payload, created_at
FROM perdure.event_rows
WHERE shard = $1::int4 AND workflow_id = $2::uuid
ORDER BY name, number;

-- :name export_entries
-- What a workflow has written to its streams. $1 shard int4 · $2 id uuid
SELECT name, number, part, payload::text AS payload, created_at
FROM perdure.stream_rows
WHERE shard = $1::int4 AND workflow_id = $2::uuid
ORDER BY name, number;

-- :name export_parts
-- Who wrote which parts of a workflow's streams. $1 shard int4 · $2 id uuid
SELECT name, part, key, epoch, attempt, first, is_void
FROM perdure.stream_parts
WHERE shard = $1::int4 AND workflow_id = $2::uuid
ORDER BY name, part;

-- :name import
-- nothing -> waiting | what it was: a workflow as it was exported. One that hadn't ended waits for an operator.
-- $1 shard int4 · $2 id uuid · $3 name text · $4 key text · $5 queue text · $6 priority int4 · $7 partition text
-- $8 version text · $9 attributes text · $10 created_at timestamptz · $11 whether it has ended bool · $12 epoch int8
-- $13 keys text[] · $14 kinds text[] · $15 positions int4[] · $16 statuses text[] · $17 payloads text[]
-- $18 hashes int8[] · $19 attempts int4[] · $20 recoveries int4[] · $21 versions text[] · $22 started_at timestamptz[]
-- $23 wake_at timestamptz[] · $24 created_at timestamptz[] · $25 epochs int8[]
-- and of its messages: $26 places int8[] · $27 ids uuid[] · $28 topics text[] · $29 payloads text[] · $30 senders uuid[]
-- $31 created_at timestamptz[]; of its events: $32 names text[] · $33 numbers int8[] · $34 ids uuid[] · $35 payloads text[]
-- $36 created_at timestamptz[]; of its streams: $37 names text[] · $38 numbers int8[] · $39 parts int4[]
-- $40 payloads text[] · $41 created_at timestamptz[]; and of their parts: $42 names text[] · $43 parts int4[]
-- $44 keys text[] · $45 epochs int8[] · $46 attempts int4[] · $47 the numbers of their first entries int8[]
-- $48 1 if void int4[]
-- No row back: it is there already, or its key is taken.
WITH opened AS (
    INSERT INTO perdure.workflow_rows
        (shard, id, name, key, queue, priority, partition, version, attributes, created_at)
    VALUES ($1::int4, $2::uuid, $3::text, $4::text, $5::text, $6::int4, $7::text, $8::text, $9::json,
            $10::timestamptz)
    ON CONFLICT DO NOTHING
    RETURNING id
), recorded AS (
    INSERT INTO perdure.checkpoints
        (shard, workflow_id, key, kind, position, status, payload, args_hash, attempts, recoveries, version, started_at,
         wake_at, created_at, epoch)
    SELECT $1::int4, $2::uuid, item.key, item.kind, item.position, item.status, item.payload::json, item.args_hash,
           item.attempts, item.recoveries, item.version, item.started_at, item.wake_at, item.created_at, item.epoch
    FROM unnest($13::text[], $14::text[], $15::int4[], $16::text[], $17::text[], $18::int8[], $19::int4[], $20::int4[],
                $21::text[], $22::timestamptz[], $23::timestamptz[], $24::timestamptz[], $25::int8[])
        AS item (key, kind, position, status, payload, args_hash, attempts, recoveries, version, started_at, wake_at,
                 created_at, epoch)
    WHERE (SELECT true FROM opened)
), sent AS (
    INSERT INTO perdure.message_rows (shard, workflow_id, place, id, topic, payload, sender_id, created_at)
    SELECT $1::int4, $2::uuid, item.place, item.id, item.topic, item.payload::json, item.sender_id, item.created_at
    FROM unnest($26::int8[], $27::uuid[], $28::text[], $29::text[], $30::uuid[], $31::timestamptz[])
        AS item (place, id, topic, payload, sender_id, created_at)
    WHERE (SELECT true FROM opened)
), announced AS (
    INSERT INTO perdure.event_rows (shard, workflow_id, name, number, id, payload, created_at)
    SELECT $1::int4, $2::uuid, item.name, item.number, item.id, item.payload::json, item.created_at
    FROM unnest($32::text[], $33::int8[], $34::uuid[], $35::text[], $36::timestamptz[])
        AS item (name, number, id, payload, created_at)
    WHERE (SELECT true FROM opened)
), streamed AS (
    INSERT INTO perdure.stream_rows (shard, workflow_id, name, number, part, payload, created_at)
    SELECT $1::int4, $2::uuid, item.name, item.number, item.part, item.payload::json, item.created_at
    FROM unnest($37::text[], $38::int8[], $39::int4[], $40::text[], $41::timestamptz[])
        AS item (name, number, part, payload, created_at)
    WHERE (SELECT true FROM opened)
), begun AS (
    INSERT INTO perdure.stream_parts (shard, workflow_id, name, part, key, epoch, attempt, first, is_void)
    SELECT $1::int4, $2::uuid, item.name, item.part, item.key, item.epoch, item.attempt, item.first, item.is_void = 1
    FROM unnest($42::text[], $43::int4[], $44::text[], $45::int8[], $46::int4[], $47::int8[], $48::int4[])
        AS item (name, part, key, epoch, attempt, first, is_void)
    WHERE (SELECT true FROM opened)
), waiting AS (
    INSERT INTO perdure.waits
        (shard, workflow_id, waiting_for, queue, name, priority, partition, enqueued_at, epoch, wakes, version,
         created_at)
    SELECT $1::int4, $2::uuid, 'operator', $5::text, $3::text, $6::int4, $7::text, perdure.now(), $12::int8,
           GREATEST(0,
                    (SELECT pg_catalog.max(item.place) FROM unnest($26::int8[]) AS item (place)),
                    (SELECT pg_catalog.max(item.args_hash) FROM unnest($14::text[], $18::int8[]) AS item (kind, args_hash)
                     WHERE item.kind = 'message')) >> 16,
           $8::text, perdure.now()
    FROM opened
    WHERE NOT $11::bool
)
SELECT id FROM opened;

-- :name resume_imported
-- waiting -> pending, for what was imported before it had ended, and waits for an operator without a parked step.
-- $1 shard int4 · $2 ids uuid[]
WITH woken AS (
    DELETE FROM perdure.waits
    WHERE shard = $1::int4 AND workflow_id = ANY (ARRAY(SELECT unnest($2::uuid[]))) AND waiting_for = 'operator'
      AND (SELECT pg_catalog.count(*) FROM perdure.checkpoints AS park
           WHERE park.shard = $1::int4 AND park.workflow_id = waits.workflow_id AND park.kind = 'park') = 0
    RETURNING workflow_id, queue, name, priority, partition, enqueued_at, started_at, epoch, recoveries, stalls,
              wakes, deadline, version, parent_id
), back AS (
    INSERT INTO perdure.queue_entries
        (shard, workflow_id, queue, name, priority, partition, enqueued_at, started_at, epoch, recoveries, stalls,
         wakes, deadline, version, parent_id)
    SELECT $1::int4, woken.workflow_id, woken.queue, woken.name, woken.priority, woken.partition, woken.enqueued_at,
           woken.started_at, woken.epoch, woken.recoveries, woken.stalls, woken.wakes, woken.deadline, woken.version,
           woken.parent_id
    FROM woken
)
SELECT workflow_id, queue FROM woken;
