"""All SQL keeps the rules by which it runs on every PostgreSQL, behind every pooler, on one server or many."""

from __future__ import annotations

import re
from importlib import resources
from itertools import pairwise

import pytest
import sql_rules as rules
from pglast import ast
from sql_rules import Rule, Sql, walk

from perdure.model.statuses import MOVES, Status
from perdure.store import migrations
from perdure.store.statements import DEFAULT_SCHEMA, statements

STATEMENTS = [Sql(name=statement.name, text=statement.text.decode()) for statement in statements()]
MIGRATIONS = [Sql(name=f"{one.version:04d}_{one.name}", text=one.text) for one in migrations.known()]
BOOTSTRAP = Sql(name="the table of migrations", text=migrations.script(DEFAULT_SCHEMA, ()))

# Statements that need not hold a rule, and why.
EXEMPT: dict[tuple[str, Rule], str] = {
    ("describe", rules.every_table_is_held_to_the_shard): "reads a public view, which holds its tables to the shard",
    ("steps", rules.every_table_is_held_to_the_shard): "reads a public view, which holds its tables to the shard",
}


@pytest.mark.parametrize("rule", rules.STATEMENTS, ids=lambda rule: rule.__name__)
def test_every_statement_keeps_the_rule(rule: Rule) -> None:
    faults = [f"{sql.name}: {fault}" for sql in STATEMENTS if (sql.name, rule) not in EXEMPT for fault in rule(sql)]

    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("rule", rules.MIGRATIONS, ids=lambda rule: rule.__name__)
def test_every_migration_keeps_the_rule(rule: Rule) -> None:
    faults = [f"{sql.name}: {fault}" for sql in MIGRATIONS for fault in rule(sql)]

    assert not faults, "\n".join(faults)


def test_the_table_of_migrations_keeps_the_rules_too() -> None:
    for rule in (rules.names_are_qualified, rules.columns_have_plain_types, rules.every_key_begins_with_the_shard):
        assert list(rule(BOOTSTRAP)) == []


def test_what_is_exempt_would_break_its_rule_and_reads_views_only() -> None:
    views = {tree.view.relname for sql in MIGRATIONS for tree in sql.trees if isinstance(tree, ast.ViewStmt)}
    by_name = {sql.name: sql for sql in STATEMENTS}

    for name, rule in EXEMPT:
        assert list(rule(by_name[name])), f"{name} needs no exemption"
        tables = {node.it.relname for node in by_name[name].nodes() if isinstance(node.it, ast.RangeVar)}
        assert tables <= views


def test_every_file_says_what_its_statements_are_for() -> None:
    for file in resources.files("perdure.store").joinpath("sql").iterdir():
        if file.name.endswith(".sql"):
            first = file.read_text(encoding="utf-8").splitlines()[0]
            assert first.startswith("-- ")
            assert not first.startswith("-- :name"), f"{file.name} begins with a statement"


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (rules.it_says_what_it_is_for_and_names_its_parameters, "-- $1 shard int4\nSELECT $1::int4"),
        (rules.it_says_what_it_is_for_and_names_its_parameters, "-- One.\nSELECT $1::int4"),
        (rules.it_says_what_it_is_for_and_names_its_parameters, "-- Two. $1 a int4 · $2 b int4\nSELECT $1::int4"),
        (rules.it_says_what_it_is_for_and_names_its_parameters, "-- Three. $2 a int4\nSELECT $2::int4"),
        (rules.names_are_qualified, "SELECT id FROM workflow_rows"),
        (rules.names_are_qualified, "SELECT id FROM public.workflow_rows"),
        (rules.names_are_qualified, "WITH a AS (SELECT 1) SELECT id FROM b"),
        (rules.names_are_qualified, "UPDATE queue_entries SET epoch = 1"),
        (rules.names_are_qualified, "SELECT count(*) FROM perdure.workflow_rows"),
        (rules.names_are_qualified, "SELECT now()"),
        (rules.the_only_clock_is_ours, "SELECT now()"),
        (rules.the_only_clock_is_ours, "SELECT pg_catalog.now()"),
        (rules.the_only_clock_is_ours, "SELECT pg_catalog.clock_timestamp()"),
        (rules.the_only_clock_is_ours, "SELECT pg_catalog.statement_timestamp()"),
        (rules.the_only_clock_is_ours, "SELECT current_timestamp"),
        (rules.the_only_clock_is_ours, "SELECT CURRENT_DATE"),
        (rules.the_only_clock_is_ours, "SELECT 'now'::timestamptz"),
        (
            rules.the_only_clock_is_ours,
            "CREATE FUNCTION perdure.later() RETURNS timestamptz LANGUAGE sql AS 'SELECT pg_catalog.now()'",
        ),
        (rules.nothing_is_left_in_the_session, "SET lock_timeout = '1s'"),
        (rules.nothing_is_left_in_the_session, "SELECT pg_catalog.set_config('lock_timeout', '1s', false)"),
        (rules.nothing_is_left_in_the_session, "SELECT pg_catalog.pg_advisory_xact_lock(1)"),
        (rules.nothing_is_left_in_the_session, "CREATE TEMPORARY TABLE one (shard int4)"),
        (rules.no_system_columns_or_sequences_are_used, "SELECT ctid FROM perdure.queue_entries"),
        (rules.no_system_columns_or_sequences_are_used, "SELECT e.xmin FROM perdure.queue_entries AS e"),
        (rules.no_system_columns_or_sequences_are_used, "SELECT pg_catalog.nextval('one')"),
        (rules.no_system_columns_or_sequences_are_used, "CREATE SEQUENCE perdure.one"),
        (rules.columns_are_listed, "INSERT INTO perdure.queue_rows VALUES (1, 'a')"),
        (rules.columns_are_listed, "INSERT INTO perdure.queue_rows (name, shard) VALUES ('a', 1)"),
        (rules.columns_are_listed, "SELECT * FROM perdure.queue_rows"),
        (rules.columns_are_listed, "SELECT row.* FROM perdure.queue_rows AS row"),
        (rules.columns_are_listed, "DELETE FROM perdure.queue_rows RETURNING *"),
        (rules.it_is_one_plain_statement, "SELECT 1; SELECT 2"),
        (rules.it_is_one_plain_statement, "LISTEN one"),
        (rules.it_is_one_plain_statement, "SAVEPOINT one"),
        (rules.every_table_is_held_to_the_shard, "SELECT id FROM perdure.workflow_rows"),
        (rules.every_table_is_held_to_the_shard, "SELECT id FROM perdure.workflow_rows WHERE shard = 1"),
        (
            rules.every_table_is_held_to_the_shard,
            "SELECT id FROM perdure.workflow_rows WHERE (shard, id) > ($1::int4, $2::uuid)",
        ),
        (
            rules.every_table_is_held_to_the_shard,
            "SELECT id FROM perdure.workflow_rows "
            "WHERE (shard, id) > ($1::int4, $2::uuid) AND (shard, id) < (2, $3::uuid)",
        ),
        (rules.every_table_is_held_to_the_shard, "SELECT id FROM perdure.workflow_rows WHERE shard = $2::int4"),
        (
            rules.every_table_is_held_to_the_shard,
            "SELECT id FROM perdure.workflow_rows WHERE shard = $1::int4 OR id IS NULL",
        ),
        (
            rules.every_table_is_held_to_the_shard,
            "SELECT 1 FROM perdure.workflow_rows AS a JOIN perdure.waits AS b ON b.shard = a.shard"
            " WHERE a.shard = $1::int4",
        ),
        (
            rules.every_table_is_held_to_the_shard,
            "UPDATE perdure.waits SET epoch = 1 WHERE shard = $1::int4"
            " AND EXISTS (SELECT 1 FROM perdure.queue_entries AS e WHERE e.workflow_id = waits.workflow_id)",
        ),
        (rules.every_table_is_held_to_the_shard, "DELETE FROM perdure.waits WHERE workflow_id = $2::uuid"),
        (rules.every_table_is_held_to_the_shard, "INSERT INTO perdure.queue_rows (shard, name) VALUES (1, 'a')"),
        (
            rules.every_table_is_held_to_the_shard,
            "INSERT INTO perdure.queue_rows (shard, name) VALUES ($1::int4, 'a') ON CONFLICT (name) DO NOTHING",
        ),
        (rules.every_parameter_is_cast, "SELECT id FROM perdure.workflow_rows WHERE shard = $1"),
        (rules.every_parameter_is_cast, "SELECT $1::int4, $1"),
        (
            rules.a_claim_keeps_its_limit,
            "UPDATE perdure.waits SET epoch = 1 WHERE workflow_id IN"
            " (SELECT workflow_id FROM perdure.waits LIMIT 3 FOR UPDATE SKIP LOCKED)",
        ),
        (
            rules.a_claim_keeps_its_limit,
            "DELETE FROM perdure.waits USING (SELECT workflow_id FROM perdure.waits LIMIT 3) AS few"
            " WHERE few.workflow_id = waits.workflow_id",
        ),
        (
            rules.a_claim_keeps_its_limit,
            "WITH few AS (SELECT workflow_id FROM perdure.waits LIMIT 3 FOR UPDATE SKIP LOCKED)"
            " SELECT workflow_id FROM few",
        ),
        (
            rules.a_claim_keeps_its_limit,
            "SELECT workflow_id FROM (SELECT workflow_id FROM perdure.waits LIMIT 3 FOR UPDATE) AS few",
        ),
        (rules.rows_are_locked_in_order, "SELECT id FROM perdure.workflow_rows FOR UPDATE"),
        (rules.rows_are_locked_in_order, "SELECT id FROM perdure.workflow_rows ORDER BY name FOR SHARE"),
        (
            rules.rows_are_locked_in_order,
            "SELECT row.id FROM unnest($1::uuid[]) AS item (id),"
            " LATERAL (SELECT id FROM perdure.workflow_rows AS row WHERE row.id = item.id OFFSET 0 FOR SHARE) AS row",
        ),
        (rules.rows_are_locked_in_order, "SELECT id FROM perdure.workflow_rows WHERE id = ANY ($1::uuid[]) FOR SHARE"),
        (rules.lists_of_ids_have_no_length, "SELECT name FROM perdure.workflow_rows WHERE id = ANY ($1::uuid[])"),
        (
            rules.lists_of_ids_have_no_length,
            "DELETE FROM perdure.waits AS one WHERE one.workflow_id = ANY ($1::uuid[] || $2::uuid[])",
        ),
        (rules.the_schema_is_made_of_plain_parts, "CREATE TYPE perdure.status AS ENUM ('one')"),
        (rules.the_schema_is_made_of_plain_parts, "CREATE DOMAIN perdure.name AS text"),
        (rules.the_schema_is_made_of_plain_parts, "CREATE TYPE perdure.times AS RANGE (subtype = timestamptz)"),
        (
            rules.the_schema_is_made_of_plain_parts,
            "CREATE TRIGGER one AFTER INSERT ON perdure.waits EXECUTE FUNCTION perdure.one()",
        ),
        (rules.the_schema_is_made_of_plain_parts, "DO 'BEGIN END'"),
        (
            rules.the_schema_is_made_of_plain_parts,
            "CREATE FUNCTION perdure.one() RETURNS void LANGUAGE plpgsql AS 'BEGIN END'",
        ),
        (rules.columns_have_plain_types, "CREATE TABLE perdure.one (shard int4, ids uuid[])"),
        (rules.columns_have_plain_types, "CREATE TABLE perdure.one (shard int4, id bigserial)"),
        (rules.columns_have_plain_types, "CREATE TABLE perdure.one (shard int4, payload jsonb)"),
        (rules.columns_have_plain_types, "CREATE TABLE perdure.one (shard int4, at timestamp)"),
        (rules.columns_have_plain_types, "CREATE TABLE perdure.one (shard int4, during tstzrange)"),
        (rules.columns_have_plain_types, "CREATE TABLE perdure.one (id int8 GENERATED ALWAYS AS IDENTITY)"),
        (rules.columns_have_plain_types, "CREATE TABLE perdure.one (b int8 GENERATED ALWAYS AS (a + 1) STORED)"),
        (rules.columns_have_plain_types, "CREATE TABLE perdure.one (id uuid REFERENCES perdure.two)"),
        (rules.columns_have_plain_types, "CREATE TABLE perdure.one (id uuid, FOREIGN KEY (id) REFERENCES perdure.two)"),
        (rules.every_key_begins_with_the_shard, "CREATE TABLE one (id uuid, shard int4, PRIMARY KEY (shard, id))"),
        (rules.every_key_begins_with_the_shard, "CREATE TABLE one (shard int8, id uuid, PRIMARY KEY (shard, id))"),
        (rules.every_key_begins_with_the_shard, "CREATE TABLE one (shard int4, id uuid, PRIMARY KEY (id, shard))"),
        (rules.every_key_begins_with_the_shard, "CREATE TABLE perdure.one (shard int4, id uuid PRIMARY KEY)"),
        (rules.every_key_begins_with_the_shard, "CREATE TABLE perdure.one (shard int4, id uuid UNIQUE)"),
        (rules.every_key_begins_with_the_shard, "CREATE TABLE perdure.one (shard int4, id uuid)"),
        (rules.every_key_begins_with_the_shard, "CREATE UNIQUE INDEX one ON perdure.waits (workflow_id)"),
        (rules.every_key_begins_with_the_shard, "CREATE INDEX one ON perdure.waits (wake_at)"),
        (
            rules.predicates_of_indexes_are_constant,
            "CREATE INDEX one ON perdure.waits (shard) WHERE wake_at > perdure.now()",
        ),
        (
            rules.indexes_are_on_columns_that_are_not_null,
            "CREATE TABLE perdure.one (shard int4 NOT NULL, at timestamptz);"
            "CREATE INDEX one_at ON perdure.one (shard, at) WHERE shard IS NOT NULL",
        ),
        (rules.views_are_held_to_the_shard, "CREATE VIEW perdure.one AS SELECT id FROM perdure.workflow_rows"),
        (
            rules.views_are_held_to_the_shard,
            "CREATE VIEW perdure.one AS SELECT 1 FROM perdure.workflow_rows AS a, perdure.waits AS b"
            " WHERE a.shard = 1 AND b.shard = a.shard",
        ),
    ],
)  # fmt: skip
def test_a_rule_finds_what_breaks_it(rule: Rule, text: str) -> None:
    assert list(rule(Sql(name="bad", text=text)))


@pytest.mark.parametrize("rule", dict.fromkeys([*rules.STATEMENTS, *rules.MIGRATIONS]), ids=lambda rule: rule.__name__)
def test_a_rule_lets_good_sql_pass(rule: Rule) -> None:
    statement = """-- Locks some, and writes them down. $1 shard int4 · $2 limit int4
        WITH few AS MATERIALIZED (
            SELECT workflow_id FROM perdure.waits
            WHERE shard = $1::int4 AND wake_at <= perdure.now()
            ORDER BY workflow_id LIMIT $2::int4 FOR UPDATE
        ), gone AS (
            DELETE FROM perdure.waits
            WHERE shard = $1::int4 AND workflow_id = ANY (ARRAY(
                SELECT workflow_id FROM perdure.waits WHERE shard = $1::int4 LIMIT $2::int4 FOR UPDATE SKIP LOCKED))
            RETURNING workflow_id
        )
        INSERT INTO perdure.queue_rows (shard, name, created_at)
        SELECT $1::int4, few.workflow_id::text, perdure.now() FROM few, gone, unnest(ARRAY[1]) AS item (number)
        ON CONFLICT (shard, name) DO NOTHING"""
    migration = """
        CREATE TABLE perdure.one (shard int4 NOT NULL, id uuid NOT NULL, at timestamptz, PRIMARY KEY (shard, id));
        CREATE INDEX one_at ON perdure.one (shard, at) WHERE at IS NOT NULL;
        CREATE VIEW perdure.ones AS SELECT one.id, two.at FROM perdure.one
        JOIN perdure.one AS two ON two.shard = 1 AND two.id = one.id WHERE one.shard = 1"""

    text = statement if rule in rules.STATEMENTS else migration
    assert list(rule(Sql(name="good", text=text))) == []


# --- statuses ---------------------------------------------------------------------------------------------------------

INITIAL = set(Status) & MOVES.keys()


def _checks(table: str, column: str) -> set[str]:
    """What a CHECK constraint lets into a column."""
    (create,) = (
        tree
        for sql in MIGRATIONS
        for tree in sql.trees
        if isinstance(tree, ast.CreateStmt) and tree.relation.relname == table
    )
    (definition,) = (part for part in create.tableElts if getattr(part, "colname", None) == column)
    return {
        node.it.val.sval
        for constraint in definition.constraints
        if constraint.raw_expr is not None
        for node in walk(constraint.raw_expr)
        if isinstance(node.it, ast.A_Const) and hasattr(node.it.val, "sval")
    }


def _branches(view: str) -> list[ast.SelectStmt]:
    """The branches of a view that is a UNION ALL."""
    (found,) = (
        tree for sql in MIGRATIONS for tree in sql.trees if isinstance(tree, ast.ViewStmt) and tree.view.relname == view
    )
    branches, left = [], [found.query]
    while left:
        select = left.pop()
        if select.larg is None:
            branches.append(select)
        else:
            assert select.all, "UNION without ALL compares everything with everything"
            left += [select.rarg, select.larg]
    return branches


def test_results_are_checked_to_have_a_final_status() -> None:
    assert _checks("checkpoints", "status") == {status.value for status in Status if status.is_final}


def test_the_view_has_one_branch_for_each_status_as_a_literal() -> None:
    branches = _branches("workflows")
    names = [target.name for target in branches[0].targetList]
    literals = [branch.targetList[names.index("status")].val.arg.val.sval for branch in branches]

    assert sorted(literals) == sorted(status.value for status in Status)


def test_no_status_is_a_dead_end_or_out_of_reach() -> None:
    reached = INITIAL | {after for moves in MOVES.values() for after in moves}

    assert reached == set(Status)
    assert all(MOVES.values())


def test_the_moves_that_statements_announce_are_those_of_the_machine() -> None:
    announced: dict[str, list[tuple[str, str]]] = {}
    for sql in STATEMENTS:
        found = re.match(r"((?:\w+(?: \| \w+)*)(?: -> \w+(?: \| \w+)*)+)[.,]", sql.header[0])
        if found:
            groups = [group.split(" | ") for group in found[1].split(" -> ")]
            announced[sql.name] = [(a, b) for before, after in pairwise(groups) for a in before for b in after]
    allowed = {(before.value, after.value) for before, moves in MOVES.items() for after in moves}
    allowed |= {("nothing", status.value) for status in INITIAL} | {(status.value, status.value) for status in INITIAL}

    of_workflows = {name: moves for name, moves in announced.items() if moves[0][0] != "live"}

    assert {"start", "claim", "record", "complete", "release", "recover", "wake_due"} <= of_workflows.keys()
    for name, moves in of_workflows.items():
        assert set(moves) <= allowed, f"{name} says {moves}"
