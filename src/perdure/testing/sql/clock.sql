-- What the kit of a test asks and does: see testing/clock.py.

-- :name make_clock
-- The row that `perdure.now()` reads in a test.
CREATE TABLE IF NOT EXISTS perdure.test_clock (shard int4 PRIMARY KEY, now timestamptz NOT NULL);

-- :name set_clock
-- It begins with the time as it is. $1 shard int4
INSERT INTO perdure.test_clock (shard, now) VALUES ($1::int4, perdure.now()) ON CONFLICT DO NOTHING;

-- :name stop_clock
-- From now on the time stands still.
CREATE OR REPLACE FUNCTION perdure.now() RETURNS timestamptz
    LANGUAGE sql STABLE PARALLEL SAFE
    AS 'SELECT now FROM perdure.test_clock WHERE shard = 1';

-- :name heed_beats
-- A beat that was under way while the time went on would set the lease back to where it was, and it has run out there.
CREATE OR REPLACE FUNCTION perdure.test_beat() RETURNS trigger
    LANGUAGE plpgsql
    AS 'BEGIN RETURN OLD; END';

-- :name watch_beats
CREATE OR REPLACE TRIGGER test_beat BEFORE UPDATE ON perdure.worker_rows
    FOR EACH ROW WHEN (NEW.heartbeat_at < OLD.heartbeat_at)
    EXECUTE FUNCTION perdure.test_beat();

-- :name put_forward
-- The time goes on to an instant, and with it the lease of the kit's own worker.
-- $1 shard int4 · $2 instant timestamptz · $3 worker_id uuid
WITH clock AS (
    UPDATE perdure.test_clock SET now = $2::timestamptz WHERE shard = $1::int4
)
UPDATE perdure.worker_rows
SET expires_at = expires_at + ($2::timestamptz - perdure.now()), heartbeat_at = $2::timestamptz
WHERE shard = $1::int4 AND id = $3::uuid AND status = 'live';

-- :name next_due
-- When something is due: a timer, the deadline of what hasn't ended, or the lease of another worker that holds
-- something, once the kit's own has lasted for long enough to take over. null: nothing.
-- $1 shard int4 · $2 worker_id uuid
SELECT perdure.now() AS now,
       LEAST(
           (SELECT pg_catalog.min(wake_at) FROM perdure.waits WHERE shard = $1::int4),
           (SELECT pg_catalog.min(due_at) FROM perdure.deadlines AS deadline
            WHERE shard = $1::int4
              AND NOT EXISTS (SELECT 1 FROM perdure.checkpoints AS result
                              WHERE result.shard = $1::int4 AND result.workflow_id = deadline.workflow_id
                                AND result.key = '$result')),
           (SELECT pg_catalog.min(GREATEST(other.expires_at,
                                           me.held_since + pg_catalog.make_interval(secs => me.lease_seconds)))
            FROM perdure.worker_rows AS other
            JOIN perdure.worker_rows AS me ON me.shard = other.shard AND me.id = $2::uuid
            WHERE other.shard = $1::int4 AND other.id <> me.id AND other.status = 'live'
              AND EXISTS (SELECT 1 FROM perdure.queue_entries AS entry
                          WHERE entry.shard = $1::int4 AND entry.worker_id = other.id))) AS due_at;

-- :name at_rest
-- What could move before the clock does, and how often the worker's workflows were woken.
-- $1 shard int4 · $2 worker_id uuid · $3 names text[] that the worker knows
-- orphaned: held by a worker that has ended; or whose lease has run out, while the kit's own has lasted for long enough
-- to take over.
SELECT EXISTS (
           SELECT 1 FROM perdure.queue_entries AS entry
           WHERE entry.shard = $1::int4 AND entry.worker_id IS NULL AND entry.name = ANY ($3::text[])
             AND NOT EXISTS (SELECT 1 FROM perdure.queue_rows AS queue
                             WHERE queue.shard = $1::int4 AND queue.name = entry.queue AND queue.paused)
       ) AS pending,
       EXISTS (SELECT 1 FROM perdure.waits WHERE shard = $1::int4 AND wake_at <= perdure.now())
       OR EXISTS (SELECT 1 FROM perdure.deadlines WHERE shard = $1::int4 AND due_at <= perdure.now()) AS due,
       EXISTS (
           SELECT 1 FROM perdure.queue_entries AS entry
           LEFT JOIN perdure.worker_rows AS holder ON holder.shard = entry.shard AND holder.id = entry.worker_id
           LEFT JOIN perdure.worker_rows AS me ON me.shard = entry.shard AND me.id = $2::uuid
           WHERE entry.shard = $1::int4 AND entry.worker_id IS NOT NULL AND entry.worker_id <> $2::uuid
             AND (holder.status IS DISTINCT FROM 'live'
                  OR holder.expires_at <= perdure.now()
                     AND me.held_since + pg_catalog.make_interval(secs => me.lease_seconds) <= perdure.now())
       ) AS orphaned,
       EXISTS (
           SELECT 1 FROM perdure.maintenance WHERE shard = $1::int4 AND next_at <= perdure.now()
       ) AS maintenance,
       (SELECT COALESCE(pg_catalog.sum(wakes), 0)::int8 FROM perdure.queue_entries
        WHERE shard = $1::int4 AND worker_id = $2::uuid) AS wakes;
