-- Leases: who is alive, by the database's clock, and who takes over from whom. See engine/leases.py, engine/recovery.py.

-- :name register_worker
-- A worker is born: a new id at each process start, and after each lost lease.
-- $1 shard int4 · $2 id uuid · $3 app text · $4 version text · $5 host text · $6 pid int4 · $7 queues json (null: all)
-- $8 names json · $9 concurrency int4 · $10 lease float8 in seconds · $11 only_version bool
INSERT INTO perdure.worker_rows
    (shard, id, status, app, version, host, pid, queues, names, concurrency, lease_seconds, only_version, started_at,
     heartbeat_at, expires_at, held_since)
VALUES ($1::int4, $2::uuid, 'live', $3::text, $4::text, $5::text, $6::int4, $7::json, $8::json, $9::int4,
        $10::float8, $11::bool, perdure.now(), perdure.now(), perdure.now() + pg_catalog.make_interval(secs => $10::float8),
        perdure.now())
ON CONFLICT (shard, id) DO NOTHING;

-- :name heartbeat
-- The lease of a worker goes on. Its thread, a few times a lease. No row: the lease is lost, and nothing revives it.
-- Where the clock was set back it has been held since now: what lies in the future says nothing. The same where beats
-- were missed: what kept them from coming may have kept others' as well.
-- $1 shard int4 · $2 id uuid · $3 ids uuid[] of those that it knows of (null: all)
-- held: how many entries it holds, and how often those were woken. Where many rows are dead, they are looked up by id:
-- queue_entries_running leads over all that it ever held.
UPDATE perdure.worker_rows
SET heartbeat_at = perdure.now(),
    held_since = CASE WHEN heartbeat_at + pg_catalog.make_interval(secs => lease_seconds / 2) < perdure.now()
                      THEN perdure.now() ELSE LEAST(held_since, perdure.now()) END,
    expires_at = perdure.now() + pg_catalog.make_interval(secs => lease_seconds)
WHERE shard = $1::int4 AND id = $2::uuid AND status = 'live' AND expires_at > perdure.now()
RETURNING CASE WHEN $3::uuid[] IS NULL THEN
              (SELECT ARRAY[pg_catalog.count(*), COALESCE(pg_catalog.sum(wakes), 0)::int8]
               FROM perdure.queue_entries
               WHERE shard = $1::int4 AND worker_id = $2::uuid)
          ELSE
              (SELECT ARRAY[pg_catalog.count(*), COALESCE(pg_catalog.sum(wakes), 0)::int8]
               FROM perdure.queue_entries
               WHERE shard = $1::int4 AND workflow_id = ANY (ARRAY(SELECT unnest($3::uuid[])))
                 AND worker_id IS NOT DISTINCT FROM $2::uuid)
          END AS held,
          perdure.now() AS now;

-- :name end_worker
-- live -> stopped | dead, by the worker itself: an orderly shutdown, or a lease that it lost.
-- $1 shard int4 · $2 id uuid · $3 status text
UPDATE perdure.worker_rows
SET status = $3::text, ended_at = perdure.now()
WHERE shard = $1::int4 AND id = $2::uuid AND status = 'live';

-- :name bury
-- live -> dead, for workers whose lease ran out. Any worker whose own lease has been unbroken for one lease, and whose
-- beats come in time: after an outage nobody is declared dead for having been cut off too. An outage that is shorter than
-- the lease ends that of whoever beat first before it, and not yet that of who beat last.
-- A lease that ends later than one that begins now was written before the clock was set back. Who is alive has written a
-- new one, once the longer of the two leases has passed since then.
-- $1 shard int4 · $2 id uuid of who does it
UPDATE perdure.worker_rows
SET status = 'dead', ended_at = perdure.now()
WHERE shard = $1::int4 AND status = 'live'
  AND id = ANY (ARRAY(
      SELECT worker.id
      FROM perdure.worker_rows AS worker
      WHERE worker.shard = $1::int4 AND worker.status = 'live'
        AND (worker.expires_at <= perdure.now()
             OR worker.expires_at > perdure.now() + pg_catalog.make_interval(secs => worker.lease_seconds)
                AND EXISTS (
                    SELECT 1 FROM perdure.worker_rows AS me
                    WHERE me.shard = $1::int4 AND me.id = $2::uuid
                      AND me.held_since + pg_catalog.make_interval(secs => worker.lease_seconds) <= perdure.now()))
      ORDER BY worker.id
      FOR UPDATE SKIP LOCKED))
  AND (expires_at <= perdure.now()
       OR expires_at > perdure.now() + pg_catalog.make_interval(secs => lease_seconds))
  AND EXISTS (
      SELECT 1 FROM perdure.worker_rows AS me
      WHERE me.shard = $1::int4 AND me.id = $2::uuid AND me.status = 'live' AND me.expires_at > perdure.now()
        AND me.held_since + pg_catalog.make_interval(secs => me.lease_seconds) <= perdure.now()
        AND me.heartbeat_at + pg_catalog.make_interval(secs => me.lease_seconds / 2) >= perdure.now())
RETURNING id, host, pid;

-- :name fallen
-- Whether some worker is to be buried, how many live, and the ids of workers that stand in entries and don't: one probe a
-- distinct id (a loose index scan). By the entries, not by the list of the dead: a claim that was on its way when its
-- worker was buried is found as well.
-- writable is never anything, and locks nothing; but a server that takes no writes any more refuses it, so that an idle
-- worker leaves that server: whatever else it asks is only read.
-- $1 shard int4
WITH RECURSIVE writable AS MATERIALIZED (
    SELECT id FROM perdure.worker_rows WHERE shard = $1::int4 AND id IS NULL ORDER BY id FOR KEY SHARE
), holder AS (
    (SELECT worker_id FROM perdure.queue_entries
     WHERE shard = $1::int4 AND worker_id IS NOT NULL
     ORDER BY worker_id LIMIT 1)
    UNION ALL
    SELECT (SELECT entry.worker_id FROM perdure.queue_entries AS entry
            WHERE entry.shard = $1::int4 AND entry.worker_id IS NOT NULL AND entry.worker_id > holder.worker_id
            ORDER BY entry.worker_id LIMIT 1)
    FROM holder
    WHERE holder.worker_id IS NOT NULL
)
SELECT EXISTS (SELECT 1 FROM writable)
       OR EXISTS (SELECT 1 FROM perdure.worker_rows
                  WHERE shard = $1::int4 AND status = 'live'
                    AND (expires_at <= perdure.now()
                         OR expires_at > perdure.now() + pg_catalog.make_interval(secs => lease_seconds))) AS dying,
       (SELECT pg_catalog.count(*) FROM perdure.worker_rows WHERE shard = $1::int4 AND status = 'live') AS live,
       ARRAY(SELECT holder.worker_id
             FROM holder
             WHERE holder.worker_id IS NOT NULL
               AND NOT EXISTS (SELECT 1 FROM perdure.worker_rows AS worker
                               WHERE worker.shard = $1::int4 AND worker.id = holder.worker_id
                                 AND worker.status = 'live')) AS orphans;

-- :name ended_workers
-- Whose end isn't long ago. $1 shard int4 · $2 float8 in seconds
SELECT id FROM perdure.worker_rows
WHERE shard = $1::int4 AND status <> 'live' AND ended_at > perdure.now() - pg_catalog.make_interval(secs => $2::float8);

-- :name recover
-- running -> pending, for the entries of a worker that is dead: in batches; they keep their place. A run that recorded
-- nothing counts as stalled, so that a workflow which kills its workers comes to an end.
-- In no order: it waits for no lock, and a sort would read all that the dead held for each batch. OFFSET 0: PostgreSQL 13
-- would rather read the checkpoints of all, once, and look in there.
-- $1 shard int4 · $2 worker_id uuid of the dead · $3 limit int4
UPDATE perdure.queue_entries AS entry
SET worker_id = NULL,
    recoveries = entry.recoveries + 1,
    stalls = CASE WHEN EXISTS (SELECT 1 FROM perdure.checkpoints AS step
                               WHERE step.shard = $1::int4 AND step.workflow_id = entry.workflow_id
                                 AND step.epoch = entry.epoch AND step.worker_id = $2::uuid
                               OFFSET 0)
                  THEN 0 ELSE entry.stalls + 1 END
WHERE entry.shard = $1::int4 AND entry.worker_id IS NOT DISTINCT FROM $2::uuid
  AND entry.workflow_id = ANY (ARRAY(
      SELECT workflow_id
      FROM perdure.queue_entries
      WHERE shard = $1::int4 AND worker_id = $2::uuid
      LIMIT $3::int4
      FOR UPDATE SKIP LOCKED))
RETURNING entry.workflow_id, entry.queue;

-- :name running_steps
-- The heartbeat's list of steps that have been running for a while, and the end of those that no longer are.
-- $1 shard int4 · $2 worker_id uuid · $3 ids uuid[] · $4 keys text[] · $5 epochs int8[] · $6 attempts int4[]
-- $7 ages float8[] in seconds
WITH ended AS (
    DELETE FROM perdure.running_steps AS running
    WHERE running.shard = $1::int4 AND running.worker_id = $2::uuid
      AND NOT EXISTS (SELECT 1 FROM unnest($3::uuid[], $4::text[]) AS item (id, key)
                      WHERE item.id = running.workflow_id AND item.key = running.key)
)
INSERT INTO perdure.running_steps (shard, workflow_id, key, worker_id, epoch, attempt, started_at)
SELECT $1::int4, item.id, item.key, $2::uuid, item.epoch, item.attempt,
       perdure.now() - pg_catalog.make_interval(secs => item.age)
FROM unnest($3::uuid[], $4::text[], $5::int8[], $6::int4[], $7::float8[]) AS item (id, key, epoch, attempt, age)
ON CONFLICT (shard, workflow_id, key) DO UPDATE
SET worker_id = excluded.worker_id, epoch = excluded.epoch, attempt = excluded.attempt,
    started_at = excluded.started_at;

-- :name forget_workers
-- Rows of workers that ended long ago, and what they left in running_steps.
-- $1 shard int4 · $2 age float8 in seconds
WITH gone AS (
    DELETE FROM perdure.worker_rows
    WHERE shard = $1::int4 AND status <> 'live'
      AND ended_at < perdure.now() - pg_catalog.make_interval(secs => $2::float8)
)
DELETE FROM perdure.running_steps AS running
WHERE running.shard = $1::int4
  AND NOT EXISTS (SELECT 1 FROM perdure.worker_rows AS worker
                  WHERE worker.shard = $1::int4 AND worker.id = running.worker_id AND worker.status = 'live');
