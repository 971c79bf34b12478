-- The tables of perdure. Three planes, because they age differently:
--   queue_entries   hot and narrow: a row exists only while a workflow is pending or running
--   workflow_rows   one row a workflow, inserted at start, not touched when it ends
--   checkpoints     append-only: the input, every step's outcome, the result
-- so the tables that grow take inserts only, and the one that churns stays tiny.
-- :oldest-code 1

-- The only clock in SQL; tests replace it by a function that reads a table.
CREATE FUNCTION perdure.now() RETURNS timestamptz
    LANGUAGE sql STABLE PARALLEL SAFE
    AS 'SELECT pg_catalog.statement_timestamp()';

-- An id of a note that is written then: 48 bits of milliseconds since 1970, and what else a random uuid has.
CREATE FUNCTION perdure.note_id(at timestamptz) RETURNS uuid
    LANGUAGE sql VOLATILE PARALLEL SAFE
    AS 'SELECT (pg_catalog.lpad(pg_catalog.to_hex((pg_catalog.date_part(''epoch'', at) * 1000)::int8), 12, ''0'')
                || pg_catalog.substr(pg_catalog.gen_random_uuid()::text, 14))::uuid';

CREATE TABLE perdure.installation (
    shard int4 NOT NULL,
    id uuid NOT NULL,
    created_at timestamptz NOT NULL,
    PRIMARY KEY (shard)
);
INSERT INTO perdure.installation (shard, id, created_at)
VALUES (1, pg_catalog.gen_random_uuid(), perdure.now());

CREATE TABLE perdure.workflow_rows (
    shard int4 NOT NULL,
    id uuid NOT NULL,
    name text NOT NULL,
    key text,
    queue text NOT NULL,
    priority int4 NOT NULL DEFAULT 0,
    partition text,
    parent_id uuid,
    -- Of a child: whether it goes on when its parent is cancelled.
    detached bool NOT NULL DEFAULT false,
    forked_from uuid,
    deadline timestamptz,
    version text,
    attributes json,
    created_at timestamptz NOT NULL,
    PRIMARY KEY (shard, id)
) WITH (autovacuum_vacuum_insert_scale_factor = 0.05);

CREATE UNIQUE INDEX workflow_rows_key ON perdure.workflow_rows (shard, name, key) WHERE key IS NOT NULL;
CREATE INDEX workflow_rows_parent ON perdure.workflow_rows (shard, parent_id, id) WHERE parent_id IS NOT NULL;

CREATE TABLE perdure.checkpoints (
    shard int4 NOT NULL,
    workflow_id uuid NOT NULL,
    key text NOT NULL,
    kind text NOT NULL CHECK (kind IN ('input', 'step', 'attempt', 'park', 'intent', 'value', 'timer', 'sleep',
                                       'message', 'start', 'child', 'request', 'cancel', 'result',
                                       'runs', 'history')),
    position int4 NOT NULL,
    status text NOT NULL CHECK (status IN ('success', 'error', 'cancelled')),
    payload json,
    -- Of a message that was received: its place.
    args_hash int8 NOT NULL DEFAULT 0,
    attempts int4 NOT NULL DEFAULT 1,
    recoveries int4,
    version text,
    started_at timestamptz,
    wake_at timestamptz,
    created_at timestamptz NOT NULL,
    worker_id uuid,
    epoch int8 NOT NULL DEFAULT 0,
    PRIMARY KEY (shard, workflow_id, key)
) WITH (autovacuum_vacuum_insert_scale_factor = 0.05);

CREATE INDEX checkpoints_failed ON perdure.checkpoints (shard, created_at) WHERE status = 'error';
-- What somebody asks of a workflow is looked for while it runs, among thousands of checkpoints.
CREATE INDEX checkpoints_requests ON perdure.checkpoints (shard, workflow_id) WHERE kind IN ('request', 'park');
CREATE INDEX checkpoints_failed_results ON perdure.checkpoints (shard, workflow_id)
    WHERE key = '$result' AND status = 'error';

CREATE TABLE perdure.queue_entries (
    shard int4 NOT NULL,
    workflow_id uuid NOT NULL,
    queue text NOT NULL,
    name text NOT NULL,
    priority int4 NOT NULL DEFAULT 0,
    partition text,
    enqueued_at timestamptz NOT NULL,
    started_at timestamptz,
    worker_id uuid,
    epoch int8 NOT NULL DEFAULT 0,
    recoveries int4 NOT NULL DEFAULT 0,
    stalls int4 NOT NULL DEFAULT 0,
    -- Counted up by whoever has something for a workflow that isn't waiting; a suspension that hasn't seen it is refused.
    wakes int8 NOT NULL DEFAULT 0,
    deadline timestamptz,
    version text,
    -- Who is to be told of its end.
    parent_id uuid,
    PRIMARY KEY (shard, workflow_id)
) WITH (
    fillfactor = 70,
    -- A drained table that VACUUM has cut down to nothing makes every cached plan a sequential scan, and the next burst
    -- meets it.
    vacuum_truncate = off,
    autovacuum_vacuum_scale_factor = 0.0,
    autovacuum_vacuum_threshold = 2000,
    autovacuum_analyze_scale_factor = 0.0,
    autovacuum_analyze_threshold = 10000,
    autovacuum_vacuum_cost_delay = 0
);

CREATE INDEX queue_entries_pending ON perdure.queue_entries
    (shard, queue, priority DESC, enqueued_at, workflow_id) WHERE worker_id IS NULL;
CREATE INDEX queue_entries_running ON perdure.queue_entries (shard, worker_id) WHERE worker_id IS NOT NULL;

-- What is neither pending nor running, and not final: it carries all that its entry will need.
CREATE TABLE perdure.waits (
    shard int4 NOT NULL,
    workflow_id uuid NOT NULL,
    waiting_for text NOT NULL CHECK (waiting_for IN ('start', 'worker', 'timer', 'retry', 'operator', 'message', 'event',
                                                     'child')),
    wake_at timestamptz,
    queue text NOT NULL,
    name text NOT NULL,
    priority int4 NOT NULL DEFAULT 0,
    partition text,
    enqueued_at timestamptz NOT NULL,
    started_at timestamptz,
    epoch int8 NOT NULL DEFAULT 0,
    recoveries int4 NOT NULL DEFAULT 0,
    stalls int4 NOT NULL DEFAULT 0,
    -- Of the entry, for the next one: places of messages are made of it, so it never goes back.
    wakes int8 NOT NULL DEFAULT 0,
    -- Whether a message wakes it.
    hears bool NOT NULL DEFAULT false,
    -- Whether the end of a child does.
    awaits_child bool NOT NULL DEFAULT false,
    deadline timestamptz,
    version text,
    parent_id uuid,
    created_at timestamptz NOT NULL,
    PRIMARY KEY (shard, workflow_id)
) WITH (vacuum_truncate = off, autovacuum_vacuum_scale_factor = 0.02);

CREATE INDEX waits_due ON perdure.waits (shard, wake_at) WHERE wake_at IS NOT NULL;
CREATE INDEX waits_for_worker ON perdure.waits (shard, name) WHERE waiting_for = 'worker';

-- Workflows of which a child has ended, and that haven't been told. Written with the end; gone within moments.
CREATE TABLE perdure.outbox (
    shard int4 NOT NULL,
    -- perdure.note_id(now): in the order of time, so that looks can leave out what is older, and may be dead.
    id uuid NOT NULL,
    target_id uuid NOT NULL,
    -- The worker that ran the child to its end; null: somebody else ended it.
    worker_id uuid,
    created_at timestamptz NOT NULL,
    PRIMARY KEY (shard, id)
) WITH (vacuum_truncate = off, autovacuum_vacuum_scale_factor = 0.0, autovacuum_vacuum_threshold = 2000);

-- What was sent to workflows. Rows are never touched: what was received is a checkpoint with the message's place.
CREATE TABLE perdure.message_rows (
    shard int4 NOT NULL,
    workflow_id uuid NOT NULL,
    place int8 NOT NULL,
    id uuid NOT NULL,
    topic text NOT NULL,
    payload json,
    sender_id uuid,
    -- Whether somebody waits for an answer: an event named after the message.
    asks bool NOT NULL DEFAULT false,
    created_at timestamptz NOT NULL,
    PRIMARY KEY (shard, workflow_id, place)
) WITH (autovacuum_vacuum_insert_scale_factor = 0.05);

CREATE UNIQUE INDEX message_rows_id ON perdure.message_rows (shard, workflow_id, id);

-- What workflows have announced. Rows are never touched: the one with the highest number is how things are.
CREATE TABLE perdure.event_rows (
    shard int4 NOT NULL,
    workflow_id uuid NOT NULL,
    name text NOT NULL,
    number int8 NOT NULL,
    id uuid NOT NULL,
    payload json,
    created_at timestamptz NOT NULL,
    PRIMARY KEY (shard, workflow_id, name, number)
) WITH (autovacuum_vacuum_insert_scale_factor = 0.05);

CREATE UNIQUE INDEX event_rows_id ON perdure.event_rows (shard, workflow_id, id);

-- Workflows that wait until another one announces something; gone when they have been told.
CREATE TABLE perdure.event_waits (
    shard int4 NOT NULL,
    workflow_id uuid NOT NULL,
    name text NOT NULL,
    waiter_id uuid NOT NULL,
    created_at timestamptz NOT NULL,
    PRIMARY KEY (shard, workflow_id, name, waiter_id)
) WITH (autovacuum_vacuum_scale_factor = 0.02);

-- What workflows and their steps write as they go. Rows are never touched; part says who wrote it.
CREATE TABLE perdure.stream_rows (
    shard int4 NOT NULL,
    workflow_id uuid NOT NULL,
    name text NOT NULL,
    number int8 NOT NULL,
    part int4 NOT NULL,
    payload json,
    created_at timestamptz NOT NULL,
    PRIMARY KEY (shard, workflow_id, name, number)
) WITH (autovacuum_vacuum_insert_scale_factor = 0.05);

-- Entries of one attempt at a step, in one run; or of a workflow's own code, which has no key.
CREATE TABLE perdure.stream_parts (
    shard int4 NOT NULL,
    workflow_id uuid NOT NULL,
    name text NOT NULL,
    part int4 NOT NULL,
    key text NOT NULL,
    epoch int8 NOT NULL,
    attempt int4 NOT NULL,
    first int8 NOT NULL,
    -- Of a run that continued as new, whose steps are forgotten: whether an earlier attempt had written it.
    is_void bool NOT NULL DEFAULT false,
    PRIMARY KEY (shard, workflow_id, name, part)
) WITH (autovacuum_vacuum_insert_scale_factor = 0.05);

-- When workflows must have ended. A row stays until it is due; then it finds its workflow ended, or ends it.
CREATE TABLE perdure.deadlines (
    shard int4 NOT NULL,
    workflow_id uuid NOT NULL,
    due_at timestamptz NOT NULL,
    PRIMARY KEY (shard, workflow_id)
) WITH (autovacuum_vacuum_scale_factor = 0.02);

CREATE INDEX deadlines_due ON perdure.deadlines (shard, due_at);

CREATE TABLE perdure.queue_rows (
    shard int4 NOT NULL,
    name text NOT NULL,
    paused bool NOT NULL DEFAULT false,
    created_at timestamptz NOT NULL,
    PRIMARY KEY (shard, name)
);

CREATE TABLE perdure.worker_rows (
    shard int4 NOT NULL,
    id uuid NOT NULL,
    status text NOT NULL CHECK (status IN ('live', 'stopped', 'dead')),
    app text NOT NULL,
    version text NOT NULL,
    host text NOT NULL,
    pid int4 NOT NULL,
    queues json,
    names json NOT NULL,
    concurrency int4 NOT NULL,
    lease_seconds float8 NOT NULL,
    only_version bool NOT NULL DEFAULT false,
    started_at timestamptz NOT NULL,
    heartbeat_at timestamptz NOT NULL,
    expires_at timestamptz NOT NULL,
    held_since timestamptz NOT NULL,
    ended_at timestamptz,
    PRIMARY KEY (shard, id)
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.0, autovacuum_vacuum_threshold = 500);

-- For how long workflows of a name are kept after their end; null: for ever. Written by workers, from their code.
CREATE TABLE perdure.retention_rows (
    shard int4 NOT NULL,
    name text NOT NULL,
    keep_seconds float8,
    PRIMARY KEY (shard, name)
);

-- What is done by one worker at a time, now and then: whoever moves next_at on does it.
CREATE TABLE perdure.maintenance (
    shard int4 NOT NULL,
    job text NOT NULL,
    next_at timestamptz NOT NULL,
    cursor uuid,
    PRIMARY KEY (shard, job)
);
INSERT INTO perdure.maintenance (shard, job, next_at) VALUES (1, 'retention', perdure.now());

-- Written by the heartbeat for steps that have been running for longer than one beat.
CREATE TABLE perdure.running_steps (
    shard int4 NOT NULL,
    workflow_id uuid NOT NULL,
    key text NOT NULL,
    worker_id uuid NOT NULL,
    epoch int8 NOT NULL,
    attempt int4 NOT NULL,
    started_at timestamptz NOT NULL,
    PRIMARY KEY (shard, workflow_id, key)
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.0, autovacuum_vacuum_threshold = 500);

-- The public contract: views. The status is a literal in each branch, so a filter by status folds the others away.
-- CASE hides queue_entries_pending from a lookup by id: without statistics the planner takes it for as good as the
-- primary key, and reads the whole backlog.
CREATE VIEW perdure.workflows AS
SELECT row.id, row.name, row.key, 'pending'::text AS status, row.queue, row.priority, row.partition,
       (SELECT payload FROM perdure.checkpoints AS given
        WHERE given.shard = 1 AND given.workflow_id = row.id AND given.key = '$input')::jsonb AS input,
       NULL::jsonb AS output, NULL::jsonb AS error,
       entry.worker_id, entry.epoch, entry.recoveries, row.parent_id, row.version, row.attributes::jsonb AS attributes,
       row.created_at, entry.started_at, entry.enqueued_at AS updated_at,
       NULL::timestamptz AS wake_at, NULL::text AS waiting_for, row.deadline, NULL::timestamptz AS completed_at, row.forked_from
FROM perdure.queue_entries AS entry
JOIN perdure.workflow_rows AS row ON row.shard = entry.shard AND row.id = entry.workflow_id
WHERE entry.shard = 1 AND row.shard = 1 AND CASE WHEN entry.worker_id IS NULL THEN true ELSE false END
UNION ALL
SELECT row.id, row.name, row.key, 'running'::text, row.queue, row.priority, row.partition,
       (SELECT payload FROM perdure.checkpoints AS given
        WHERE given.shard = 1 AND given.workflow_id = row.id AND given.key = '$input')::jsonb,
       NULL::jsonb, NULL::jsonb,
       entry.worker_id, entry.epoch, entry.recoveries, row.parent_id, row.version, row.attributes::jsonb,
       row.created_at, entry.started_at, entry.started_at,
       NULL::timestamptz, NULL::text, row.deadline, NULL::timestamptz, row.forked_from
FROM perdure.queue_entries AS entry
JOIN perdure.workflow_rows AS row ON row.shard = entry.shard AND row.id = entry.workflow_id
WHERE entry.shard = 1 AND row.shard = 1 AND entry.worker_id IS NOT NULL
UNION ALL
SELECT row.id, row.name, row.key, 'waiting'::text, row.queue, row.priority, row.partition,
       (SELECT payload FROM perdure.checkpoints AS given
        WHERE given.shard = 1 AND given.workflow_id = row.id AND given.key = '$input')::jsonb,
       NULL::jsonb, NULL::jsonb,
       NULL::uuid, wait.epoch, wait.recoveries, row.parent_id, row.version, row.attributes::jsonb,
       row.created_at, wait.started_at, wait.created_at,
       wait.wake_at, wait.waiting_for, row.deadline, NULL::timestamptz, row.forked_from
FROM perdure.waits AS wait
JOIN perdure.workflow_rows AS row ON row.shard = wait.shard AND row.id = wait.workflow_id
WHERE wait.shard = 1 AND row.shard = 1
UNION ALL
SELECT row.id, row.name, row.key, 'success'::text, row.queue, row.priority, row.partition,
       (SELECT payload FROM perdure.checkpoints AS given
        WHERE given.shard = 1 AND given.workflow_id = row.id AND given.key = '$input')::jsonb,
       result.payload::jsonb, NULL::jsonb,
       result.worker_id, result.epoch, result.recoveries, row.parent_id, row.version, row.attributes::jsonb,
       row.created_at, result.started_at, result.created_at,
       NULL::timestamptz, NULL::text, row.deadline, result.created_at, row.forked_from
FROM perdure.checkpoints AS result
JOIN perdure.workflow_rows AS row ON row.shard = result.shard AND row.id = result.workflow_id
WHERE result.shard = 1 AND row.shard = 1 AND result.key = '$result' AND result.status = 'success'
UNION ALL
SELECT row.id, row.name, row.key, 'error'::text, row.queue, row.priority, row.partition,
       (SELECT payload FROM perdure.checkpoints AS given
        WHERE given.shard = 1 AND given.workflow_id = row.id AND given.key = '$input')::jsonb,
       NULL::jsonb, result.payload::jsonb,
       result.worker_id, result.epoch, result.recoveries, row.parent_id, row.version, row.attributes::jsonb,
       row.created_at, result.started_at, result.created_at,
       NULL::timestamptz, NULL::text, row.deadline, result.created_at, row.forked_from
FROM perdure.checkpoints AS result
JOIN perdure.workflow_rows AS row ON row.shard = result.shard AND row.id = result.workflow_id
WHERE result.shard = 1 AND row.shard = 1 AND result.key = '$result' AND result.status = 'error'
UNION ALL
SELECT row.id, row.name, row.key, 'cancelled'::text, row.queue, row.priority, row.partition,
       (SELECT payload FROM perdure.checkpoints AS given
        WHERE given.shard = 1 AND given.workflow_id = row.id AND given.key = '$input')::jsonb,
       NULL::jsonb, result.payload::jsonb,
       result.worker_id, result.epoch, result.recoveries, row.parent_id, row.version, row.attributes::jsonb,
       row.created_at, result.started_at, result.created_at,
       NULL::timestamptz, NULL::text, row.deadline, result.created_at, row.forked_from
FROM perdure.checkpoints AS result
JOIN perdure.workflow_rows AS row ON row.shard = result.shard AND row.id = result.workflow_id
WHERE result.shard = 1 AND row.shard = 1 AND result.key = '$result' AND result.status = 'cancelled';

-- One row per checkpoint that the code asked for, and the steps that have been running for a while.
CREATE VIEW perdure.workflow_steps AS
SELECT step.workflow_id, step.key,
       pg_catalog.regexp_replace(pg_catalog.regexp_replace(step.key, '^.*/', ''), '(#[0-9]+)?(#c)?$', '') AS name,
       step.kind, step.position, step.status,
       CASE WHEN step.status = 'success' THEN step.payload END::jsonb AS output,
       CASE WHEN step.status <> 'success' THEN step.payload END::jsonb AS error,
       step.attempts, step.started_at, step.created_at AS completed_at, step.created_at,
       step.worker_id, step.epoch, step.version, NULL::timestamptz AS wake_at
FROM perdure.checkpoints AS step
WHERE step.shard = 1 AND step.kind IN ('step', 'value', 'sleep', 'message', 'start', 'child', 'cancel')
UNION ALL
SELECT step.workflow_id, step.key,
       pg_catalog.regexp_replace(pg_catalog.regexp_replace(step.key, '^.*/', ''), '(#[0-9]+)?#a[0-9]+$', ''),
       'attempt'::text, NULL::int4, 'retrying'::text, NULL::jsonb, step.payload::jsonb, step.attempts, step.started_at,
       step.created_at, step.created_at, step.worker_id, step.epoch, step.version, step.wake_at
FROM perdure.checkpoints AS step
WHERE step.shard = 1 AND step.kind = 'attempt' AND step.key NOT LIKE '$%'
  AND NOT EXISTS (SELECT 1 FROM perdure.checkpoints AS outcome
                  WHERE outcome.shard = 1 AND outcome.workflow_id = step.workflow_id
                    AND outcome.key = pg_catalog.regexp_replace(step.key, '#a[0-9]+$', ''))
  AND NOT EXISTS (SELECT 1 FROM perdure.checkpoints AS result
                  WHERE result.shard = 1 AND result.workflow_id = step.workflow_id AND result.key = '$result')
UNION ALL
SELECT step.workflow_id, step.key,
       pg_catalog.regexp_replace(pg_catalog.regexp_replace(step.key, '^.*/', ''), '(#[0-9]+)?#a[0-9]+$', ''),
       'attempt'::text, NULL::int4, 'parked'::text, NULL::jsonb, step.payload::jsonb, step.attempts, step.started_at,
       step.created_at, step.created_at, step.worker_id, step.epoch, step.version, step.wake_at
FROM perdure.checkpoints AS step
WHERE step.shard = 1 AND step.kind = 'park' AND step.key NOT LIKE '$%'
  AND NOT EXISTS (SELECT 1 FROM perdure.checkpoints AS outcome
                  WHERE outcome.shard = 1 AND outcome.workflow_id = step.workflow_id
                    AND outcome.key = pg_catalog.regexp_replace(step.key, '#a[0-9]+$', ''))
  AND NOT EXISTS (SELECT 1 FROM perdure.checkpoints AS result
                  WHERE result.shard = 1 AND result.workflow_id = step.workflow_id AND result.key = '$result')
UNION ALL
SELECT timer.workflow_id, pg_catalog.regexp_replace(timer.key, '#t$', ''),
       pg_catalog.regexp_replace(pg_catalog.regexp_replace(timer.key, '^.*/', ''), '(#[0-9]+)?#t$', ''),
       'sleep'::text, NULL::int4, 'waiting'::text, NULL::jsonb, NULL::jsonb, 1, timer.created_at, NULL::timestamptz,
       timer.created_at, timer.worker_id, timer.epoch, timer.version, timer.wake_at
FROM perdure.checkpoints AS timer
WHERE timer.shard = 1 AND timer.kind = 'timer' AND timer.key NOT LIKE '$%'
  AND NOT EXISTS (SELECT 1 FROM perdure.checkpoints AS outcome
                  WHERE outcome.shard = 1 AND outcome.workflow_id = timer.workflow_id
                    AND outcome.key = pg_catalog.regexp_replace(timer.key, '#t$', ''))
  AND NOT EXISTS (SELECT 1 FROM perdure.checkpoints AS result
                  WHERE result.shard = 1 AND result.workflow_id = timer.workflow_id AND result.key = '$result')
UNION ALL
SELECT running.workflow_id, running.key,
       pg_catalog.regexp_replace(pg_catalog.regexp_replace(running.key, '^.*/', ''), '#[0-9]+$', ''),
       'step'::text, NULL::int4, 'running'::text, NULL::jsonb, NULL::jsonb,
       running.attempt, running.started_at, NULL::timestamptz, running.started_at,
       running.worker_id, running.epoch, NULL::text, NULL::timestamptz
FROM perdure.running_steps AS running
JOIN perdure.queue_entries AS entry
  ON entry.shard = running.shard AND entry.workflow_id = running.workflow_id
 AND entry.worker_id = running.worker_id AND entry.epoch = running.epoch
WHERE running.shard = 1 AND entry.shard = 1
  AND NOT EXISTS (SELECT 1 FROM perdure.checkpoints AS step
                  WHERE step.shard = 1 AND step.workflow_id = running.workflow_id AND step.key = running.key);

-- What was sent to workflows, in the order in which they get it.
CREATE VIEW perdure.messages AS
SELECT message.workflow_id, message.id, message.topic, message.payload::jsonb AS payload, message.sender_id,
       message.created_at,
       (SELECT taken.created_at FROM perdure.checkpoints AS taken
        WHERE taken.shard = 1 AND taken.workflow_id = message.workflow_id AND taken.kind = 'message'
          AND taken.args_hash = message.place) AS received_at,
       message.place
FROM perdure.message_rows AS message
WHERE message.shard = 1;

-- What workflows have announced, with its history; the highest number of a name is how things are.
CREATE VIEW perdure.events AS
SELECT event.workflow_id, event.name, event.number, event.payload::jsonb AS value, event.created_at
FROM perdure.event_rows AS event
WHERE event.shard = 1 AND event.name NOT LIKE '$%';

-- What workflows and their steps have written to streams, void or not.
CREATE VIEW perdure.stream_entries AS
SELECT entry.workflow_id, entry.name, entry.number, entry.payload::jsonb AS value, part.key AS step_key, part.attempt,
       part.is_void
       OR part.key <> ''
       AND ((SELECT true FROM perdure.stream_parts AS later
             WHERE later.shard = 1 AND later.workflow_id = entry.workflow_id AND later.name = entry.name
               AND later.key = part.key AND later.part > part.part
             LIMIT 1) IS TRUE
            OR (SELECT outcome.epoch <> part.epoch OR outcome.attempts <> part.attempt
                FROM perdure.checkpoints AS outcome
                WHERE outcome.shard = 1 AND outcome.workflow_id = entry.workflow_id AND outcome.key = part.key)
               IS TRUE) AS is_void,
       entry.created_at
FROM perdure.stream_rows AS entry
JOIN perdure.stream_parts AS part
  ON part.shard = entry.shard AND part.workflow_id = entry.workflow_id AND part.name = entry.name
 AND part.part = entry.part
WHERE entry.shard = 1 AND part.shard = 1;

-- What a worker says of itself; one whose lease ran out is dead, whether or not somebody has noticed yet.
CREATE VIEW perdure.workers AS
SELECT worker.id,
       CASE WHEN worker.status = 'live' AND worker.expires_at <= perdure.now() THEN 'dead' ELSE worker.status END
           AS status,
       worker.app, worker.version, worker.host, worker.pid, worker.queues::jsonb AS queues,
       worker.names::jsonb AS names, worker.concurrency,
       (SELECT pg_catalog.count(*) FROM perdure.queue_entries AS entry
        WHERE entry.shard = 1 AND entry.worker_id = worker.id) AS running,
       worker.started_at, worker.heartbeat_at, worker.expires_at, worker.ended_at, worker.only_version
FROM perdure.worker_rows AS worker
WHERE worker.shard = 1;

CREATE VIEW perdure.queues AS
SELECT queue.name, queue.paused,
       (SELECT pg_catalog.count(*) FROM perdure.queue_entries AS entry
        WHERE entry.shard = 1 AND entry.queue = queue.name AND entry.worker_id IS NULL) AS pending,
       (SELECT pg_catalog.count(*) FROM perdure.queue_entries AS entry
        WHERE entry.shard = 1 AND entry.queue = queue.name AND entry.worker_id IS NOT NULL) AS running,
       (SELECT pg_catalog.min(entry.enqueued_at) FROM perdure.queue_entries AS entry
        WHERE entry.shard = 1 AND entry.queue = queue.name AND entry.worker_id IS NULL) AS oldest_pending_at,
       queue.created_at
FROM perdure.queue_rows AS queue
WHERE queue.shard = 1;

-- What isn't finished, by the version that it belongs to, and how many live workers run that version. A version without
-- workers matters to whoever pins it (`--only-version`); any other worker takes workflows of all versions.
CREATE VIEW perdure.versions AS
SELECT unfinished.version,
       pg_catalog.count(*) FILTER (WHERE unfinished.status = 'pending') AS pending,
       pg_catalog.count(*) FILTER (WHERE unfinished.status = 'running') AS running,
       pg_catalog.count(*) FILTER (WHERE unfinished.status = 'waiting') AS waiting,
       (SELECT pg_catalog.count(*) FROM perdure.worker_rows AS worker
        WHERE worker.shard = 1 AND worker.status = 'live' AND worker.expires_at > perdure.now()
          AND (worker.version = unfinished.version OR NOT worker.only_version)) AS workers
FROM (SELECT entry.version, CASE WHEN entry.worker_id IS NULL THEN 'pending' ELSE 'running' END AS status
      FROM perdure.queue_entries AS entry
      WHERE entry.shard = 1
      UNION ALL
      SELECT wait.version, 'waiting' FROM perdure.waits AS wait WHERE wait.shard = 1) AS unfinished
GROUP BY unfinished.version;
