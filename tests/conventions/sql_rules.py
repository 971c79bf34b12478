"""The rules for SQL, each a function from a parsed text to what is wrong with it; `test_sql` holds them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pglast import ast, parse_sql
from pglast.enums import (
    A_Expr_Kind,
    BoolExprType,
    ConstrType,
    CTEMaterialize,
    LockWaitPolicy,
    SubLinkType,
)

SCHEMA = "perdure"
IDS = {"id", "workflow_id"}

# Only by its bare name does it take several arrays; and pg_catalog is always searched first.
BARE_FUNCTIONS = {"unnest"}
OWN_FUNCTIONS = {"now", "note_id"}
CLOCKS = {"now", "clock_timestamp", "statement_timestamp", "transaction_timestamp", "timeofday"}
CLOCK_WORDS = {"now", "today", "tomorrow", "yesterday"}
SYSTEM_COLUMNS = {"ctid", "xmin", "xmax", "cmin", "cmax", "tableoid", "oid"}
SEQUENCE_FUNCTIONS = {"nextval", "currval", "setval", "lastval"}

# float8 is for durations in seconds; jsonb stands in views only.
COLUMN_TYPES = {"int2", "int4", "int8", "text", "uuid", "bytea", "bool", "timestamptz", "json", "float8"}

# Whoever needs another kind of statement in a migration thinks of CockroachDB and DSQL first, and adds it here.
MIGRATION_STATEMENTS = (
    ast.CreateStmt,
    ast.IndexStmt,
    ast.ViewStmt,
    ast.CreateFunctionStmt,
    ast.InsertStmt,
)
CORE_STATEMENTS = (ast.SelectStmt, ast.InsertStmt, ast.UpdateStmt, ast.DeleteStmt)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sql:
    """A text of SQL, as it was written and as it was parsed."""

    name: str
    text: str

    @property
    def header(self) -> list[str]:
        """The lines of the comment that it begins with."""
        lines: list[str] = []
        for line in self.text.splitlines():
            if not line.startswith("--"):
                break
            lines.append(line.removeprefix("--").strip())
        return lines

    @property
    def trees(self) -> list[Any]:
        return [raw.stmt for raw in parse_sql(self.text)]

    def nodes(self) -> Iterator[Node]:
        for tree in self.trees:
            yield from walk(tree)


@dataclass(frozen=True, slots=True)
class Node:
    """A node of the tree, with those that it stands in, the nearest first."""

    it: Any
    parents: tuple[Any, ...]

    @property
    def parent(self) -> Any:
        return self.parents[0] if self.parents else None

    def inside(self, kind: type) -> Any:
        """The nearest node of some kind around it."""
        return next((parent for parent in self.parents if isinstance(parent, kind)), None)


Rule = Callable[[Sql], Iterator[str]]


def walk(tree: Any, parents: tuple[Any, ...] = ()) -> Iterator[Node]:
    """All nodes of a tree."""
    if isinstance(tree, tuple | list):
        for one in tree:
            yield from walk(one, parents)
    elif isinstance(tree, ast.Node):
        yield Node(tree, parents)
        for attribute in tree:
            yield from walk(getattr(tree, attribute), (tree, *parents))


# --- rules for all SQL ------------------------------------------------------------------------------------------------


def it_says_what_it_is_for_and_names_its_parameters(sql: Sql) -> Iterator[str]:
    if not any(line and not line.startswith("$") for line in sql.header):
        yield "its header has no description"
    comment = " ".join(sql.header)
    named = {int(number) for number in re.findall(r"\$(\d+)", comment)}
    for first, last in re.findall(r"\$(\d+) \.\. \$(\d+)", comment):
        named |= set(range(int(first), int(last) + 1))
    used = {node.it.number for node in sql.nodes() if isinstance(node.it, ast.ParamRef)}
    if named != used:
        yield f"its header names the parameters {sorted(named)}, it uses {sorted(used)}"
    if used and used != set(range(1, max(used) + 1)):
        yield f"its parameters are not $1 to ${max(used)}"


def names_are_qualified(sql: Sql) -> Iterator[str]:
    for node in sql.nodes():
        if isinstance(node.it, ast.RangeVar) and node.it.schemaname != SCHEMA and not _is_cte(node):
            yield f"table {node.it.relname}"
        if isinstance(node.it, ast.FuncCall):
            *schema, name = (part.sval for part in node.it.funcname)
            ours = schema == [SCHEMA] and name in OWN_FUNCTIONS
            if schema != ["pg_catalog"] and not ours and name not in BARE_FUNCTIONS:
                yield f"function {name}"


def the_only_clock_is_ours(sql: Sql) -> Iterator[str]:
    for node in sql.nodes():
        if isinstance(node.it, ast.SQLValueFunction):
            yield f"{node.it.op.name}"
        if isinstance(node.it, ast.FuncCall):
            *schema, name = (part.sval for part in node.it.funcname)
            if name in CLOCKS and [*schema, name] != [SCHEMA, "now"]:
                yield f"{name}()"
        if isinstance(node.it, ast.TypeCast) and isinstance(node.it.arg, ast.A_Const):
            word = getattr(node.it.arg.val, "sval", "")
            if word in CLOCK_WORDS and _type(node.it.typeName) in {"timestamptz", "timestamp", "date", "time"}:
                yield f"'{word}'"
        if isinstance(node.it, ast.CreateFunctionStmt) and [part.sval for part in node.it.funcname] != [SCHEMA, "now"]:
            yield from (f"in a function: {clock}" for clock in CLOCKS if f"{clock}(" in _body(node.it))


def nothing_is_left_in_the_session(sql: Sql) -> Iterator[str]:
    for node in sql.nodes():
        if isinstance(node.it, ast.VariableSetStmt):
            yield f"SET {node.it.name}"
        if isinstance(node.it, ast.FuncCall):
            name = node.it.funcname[-1].sval
            if "advisory" in name:
                yield f"{name}()"
            if name == "set_config" and not _is_true(node.it.args[-1]):
                yield "set_config() that isn't local to the transaction"
        if isinstance(node.it, ast.CreateStmt | ast.RangeVar | ast.IntoClause) and _is_temporary(node.it):
            yield "a temporary table"


def no_system_columns_or_sequences_are_used(sql: Sql) -> Iterator[str]:
    for node in sql.nodes():
        if isinstance(node.it, ast.ColumnRef):
            name = getattr(node.it.fields[-1], "sval", "")
            if name in SYSTEM_COLUMNS:
                yield f"column {name}"
        if isinstance(node.it, ast.FuncCall) and node.it.funcname[-1].sval in SEQUENCE_FUNCTIONS:
            yield f"{node.it.funcname[-1].sval}()"
        if isinstance(node.it, ast.CreateSeqStmt):
            yield "a sequence"


def columns_are_listed(sql: Sql) -> Iterator[str]:
    for node in sql.nodes():
        if isinstance(node.it, ast.InsertStmt):
            if not node.it.cols:
                yield f"INSERT INTO {node.it.relation.relname} without a list of columns"
            elif node.it.cols[0].name != "shard":
                yield f"INSERT INTO {node.it.relation.relname} doesn't begin with the shard"
        if isinstance(node.it, ast.A_Star):
            scope = node.inside(ast.SelectStmt)
            if isinstance(node.parents[1] if len(node.parents) > 1 else None, ast.ResTarget):
                statement = next(p for p in node.parents if isinstance(p, CORE_STATEMENTS))
                if not isinstance(statement, ast.SelectStmt) or _relations(scope, sql):
                    yield "a star for the columns of a table"


# --- rules for the statements -----------------------------------------------------------------------------------------


def it_is_one_plain_statement(sql: Sql) -> Iterator[str]:
    if len(sql.trees) != 1 or not isinstance(sql.trees[0], CORE_STATEMENTS):
        yield ", ".join(type(tree).__name__ for tree in sql.trees)


def every_table_is_held_to_the_shard(sql: Sql) -> Iterator[str]:
    yield from _not_held_to_the_shard(sql, lambda value: isinstance(value, ast.TypeCast) and _is_parameter(value, 1))
    for node in sql.nodes():
        if isinstance(node.it, ast.InsertStmt) and node.it.cols and node.it.cols[0].name == "shard":
            for first in _first_values(node.it.selectStmt):
                if not (isinstance(first, ast.TypeCast) and _is_parameter(first, 1)):
                    yield f"INSERT INTO {node.it.relation.relname} with another shard"
        if isinstance(node.it, ast.InferClause) and node.it.indexElems[0].name != "shard":
            yield "ON CONFLICT without the shard"


def every_parameter_is_cast(sql: Sql) -> Iterator[str]:
    for node in sql.nodes():
        if isinstance(node.it, ast.ParamRef) and not isinstance(node.parent, ast.TypeCast):
            yield f"${node.it.number}"


def a_claim_keeps_its_limit(sql: Sql) -> Iterator[str]:
    """Elsewhere the planner may run the sub-select again and again, and each time it locks others."""
    for node in sql.nodes():
        if not isinstance(node.it, ast.SelectStmt) or node.it.limitCount is None or not node.parents:
            continue
        writes = node.inside(ast.UpdateStmt) or node.inside(ast.DeleteStmt)
        if not node.it.lockingClause and not writes:
            continue
        sublink = node.parent
        in_array = isinstance(sublink, ast.SubLink) and sublink.subLinkType is SubLinkType.ARRAY_SUBLINK
        holder = node.parents[1] if len(node.parents) > 1 else None
        in_any = in_array and isinstance(holder, ast.A_Expr) and holder.kind is A_Expr_Kind.AEXPR_OP_ANY
        in_cte = (
            isinstance(sublink, ast.CommonTableExpr) and sublink.ctematerialized is CTEMaterialize.CTEMaterializeAlways
        )
        # Once for each row of what it refers to; the select around it says how many in all.
        in_lateral = isinstance(sublink, ast.RangeSubselect) and sublink.lateral and bool(node.inside(ast.SubLink))
        if not in_any and not in_cte and not in_lateral:
            yield "LIMIT in a sub-select outside of ANY (ARRAY (...)) and of a MATERIALIZED CTE"


def lists_of_ids_have_no_length(sql: Sql) -> Iterator[str]:
    """Of a long list, a planner that knows nothing of a table would conclude to read all of it."""
    for node in sql.nodes():
        if not isinstance(node.it, ast.A_Expr) or node.it.kind is not A_Expr_Kind.AEXPR_OP_ANY:
            continue
        is_id = isinstance(node.it.lexpr, ast.ColumnRef) and node.it.lexpr.fields[-1].sval in IDS
        if is_id and not any(isinstance(each.it, ast.SubLink) for each in walk(node.it.rexpr)):
            yield "a list of ids is compared with as such: ANY (ARRAY(SELECT unnest($n)))"


def rows_are_locked_in_order(sql: Sql) -> Iterator[str]:
    for node in sql.nodes():
        if not isinstance(node.it, ast.LockingClause):
            continue
        select = node.parent
        skips = node.it.waitPolicy is LockWaitPolicy.LockWaitSkip
        in_order = _begins_with_an_id(select.sortClause)
        is_one = any(
            operator == "=" and column in IDS and _is_parameter(value)
            for operator, _, column, value in _comparisons(select.whereClause)
        )
        if not (skips or in_order or is_one or _is_looked_up_in_order(node)):
            yield "rows are locked, and neither in the order of their ids nor with SKIP LOCKED"


def _is_looked_up_in_order(node: Node) -> bool:
    """A lookup for each row of a sorted sub-select beside it; LATERAL leaves no way but a loop over those rows."""
    _, lookup, around = (*node.parents, None, None)[:3]
    if not (isinstance(lookup, ast.RangeSubselect) and lookup.lateral and isinstance(around, ast.SelectStmt)):
        return False
    rows = around.fromClause[0]
    return isinstance(rows, ast.RangeSubselect) and _begins_with_an_id(rows.subquery.sortClause)


def _begins_with_an_id(order: Any) -> bool:
    first = order[0].node if order else None
    return isinstance(first, ast.ColumnRef) and first.fields[-1].sval in IDS


# --- rules for migrations ---------------------------------------------------------------------------------------------


def the_schema_is_made_of_plain_parts(sql: Sql) -> Iterator[str]:
    for tree in sql.trees:
        if not isinstance(tree, MIGRATION_STATEMENTS):
            yield f"a {type(tree).__name__}"
        if isinstance(tree, ast.CreateFunctionStmt):
            language = next(option.arg.sval for option in tree.options if option.defname == "language")
            if language != "sql":
                yield f"a function in {language}"


def columns_have_plain_types(sql: Sql) -> Iterator[str]:
    for node in sql.nodes():
        if isinstance(node.it, ast.ColumnDef):
            if node.it.typeName.arrayBounds:
                yield f"{node.it.colname} is an array"
            if _type(node.it.typeName) not in COLUMN_TYPES:
                yield f"{node.it.colname} is {_type(node.it.typeName)}"
        if isinstance(node.it, ast.Constraint):
            if node.it.contype in (ConstrType.CONSTR_IDENTITY, ConstrType.CONSTR_GENERATED):
                yield "a column that the server fills in"
            if node.it.contype is ConstrType.CONSTR_FOREIGN:
                yield "a foreign key"
            if node.it.contype is ConstrType.CONSTR_EXCLUSION:
                yield "an exclusion constraint"


def every_key_begins_with_the_shard(sql: Sql) -> Iterator[str]:
    for node in sql.nodes():
        if isinstance(node.it, ast.CreateStmt):
            first = node.it.tableElts[0]
            if first.colname != "shard" or _type(first.typeName) != "int4":
                yield f"{node.it.relation.relname} doesn't begin with shard int4"
            if not any(
                isinstance(part, ast.Constraint) and part.contype is ConstrType.CONSTR_PRIMARY
                for part in node.it.tableElts
            ):
                yield f"{node.it.relation.relname} has no primary key"
        if isinstance(node.it, ast.Constraint) and node.it.contype in (
            ConstrType.CONSTR_PRIMARY,
            ConstrType.CONSTR_UNIQUE,
        ):
            first_key = node.it.keys[0].sval if node.it.keys else None
            if first_key != "shard":
                yield "a key without the shard"
        if isinstance(node.it, ast.IndexStmt) and node.it.indexParams[0].name != "shard":
            yield f"{node.it.idxname} doesn't begin with the shard"


def predicates_of_indexes_are_constant(sql: Sql) -> Iterator[str]:
    for node in sql.nodes():
        if isinstance(node.it, ast.IndexStmt):
            for inner in walk(node.it.whereClause):
                if isinstance(inner.it, ast.FuncCall | ast.ParamRef | ast.SQLValueFunction | ast.SubLink):
                    yield f"{node.it.idxname}: {type(inner.it).__name__}"


def indexes_are_on_columns_that_are_not_null(sql: Sql) -> Iterator[str]:
    not_null = {
        (table.relation.relname, column.colname)
        for table in sql.trees
        if isinstance(table, ast.CreateStmt)
        for column in table.tableElts
        if isinstance(column, ast.ColumnDef)
        and any(constraint.contype is ConstrType.CONSTR_NOTNULL for constraint in column.constraints or ())
    }
    for index in sql.trees:
        if isinstance(index, ast.IndexStmt):
            required = {
                inner.it.arg.fields[-1].sval for inner in walk(index.whereClause) if isinstance(inner.it, ast.NullTest)
            }
            for part in index.indexParams:
                if (index.relation.relname, part.name) not in not_null and part.name not in required:
                    yield f"{index.idxname}: {part.name} may be null"


def views_are_held_to_the_shard(sql: Sql) -> Iterator[str]:
    views = [Sql(name=tree.view.relname, text="") for tree in sql.trees if isinstance(tree, ast.ViewStmt)]
    if views:
        yield from _not_held_to_the_shard(sql, lambda value: isinstance(value, ast.A_Const) and value.val.ival == 1)


EVERYWHERE: tuple[Rule, ...] = (
    names_are_qualified,
    the_only_clock_is_ours,
    nothing_is_left_in_the_session,
    no_system_columns_or_sequences_are_used,
    columns_are_listed,
)
STATEMENTS: tuple[Rule, ...] = (
    *EVERYWHERE,
    it_says_what_it_is_for_and_names_its_parameters,
    it_is_one_plain_statement,
    every_table_is_held_to_the_shard,
    every_parameter_is_cast,
    a_claim_keeps_its_limit,
    rows_are_locked_in_order,
)
MIGRATIONS: tuple[Rule, ...] = (
    *EVERYWHERE,
    the_schema_is_made_of_plain_parts,
    columns_have_plain_types,
    every_key_begins_with_the_shard,
    predicates_of_indexes_are_constant,
    indexes_are_on_columns_that_are_not_null,
    views_are_held_to_the_shard,
)


# --- what they ask of a tree ------------------------------------------------------------------------------------------


def _not_held_to_the_shard(sql: Sql, is_shard: Callable[[Any], bool]) -> Iterator[str]:
    """The tables that stand somewhere without `shard = ...` beside them, or a key between two with that shard."""
    for node in sql.nodes():
        if not isinstance(node.it, ast.SelectStmt | ast.UpdateStmt | ast.DeleteStmt):
            continue
        tables = _relations(node.it, sql)
        compared = [
            (operator[0], qualifier)
            for operator, qualifier, column, value in _comparisons(*_conditions(node.it))
            if column == "shard" and is_shard(value)
        ]
        held = {qualifier for operator, qualifier in compared if operator == "="}
        held |= {qualifier for operator, qualifier in compared if operator == "<" and (">", qualifier) in compared}
        for table in tables:
            name = table.alias.aliasname if table.alias else table.relname
            if name not in held and not (len(tables) == 1 and None in held):
                yield f"{name} without its shard"


def _relations(statement: Any, sql: Sql) -> list[Any]:
    """The tables that a statement itself reads or writes: not those of its sub-selects."""
    parts: list[Any] = []
    if isinstance(statement, ast.SelectStmt):
        parts = list(statement.fromClause or ())
    elif isinstance(statement, ast.UpdateStmt):
        parts = [statement.relation, *(statement.fromClause or ())]
    elif isinstance(statement, ast.DeleteStmt):
        parts = [statement.relation, *(statement.usingClause or ())]
    found: list[Any] = []
    while parts:
        part = parts.pop()
        if isinstance(part, ast.JoinExpr):
            parts += [part.larg, part.rarg]
        elif isinstance(part, ast.RangeVar) and part.schemaname is not None:
            found.append(part)
    return found


def _conditions(statement: Any) -> list[Any]:
    """What must be true of each row: WHERE, and ON."""
    found = [statement.whereClause]
    parts = list(getattr(statement, "fromClause", None) or getattr(statement, "usingClause", None) or ())
    while parts:
        part = parts.pop()
        if isinstance(part, ast.JoinExpr):
            found.append(part.quals)
            parts += [part.larg, part.rarg]
    return found


def _comparisons(*conditions: Any) -> Iterator[tuple[str, str | None, str, Any]]:
    """Operator, qualifier, column and value of each `column = value` that must hold.

    Of each comparison of rows, those of the first columns.
    """
    for condition in conditions:
        if isinstance(condition, ast.BoolExpr) and condition.boolop is BoolExprType.AND_EXPR:
            yield from _comparisons(*condition.args)
        elif isinstance(condition, ast.A_Expr) and condition.kind is A_Expr_Kind.AEXPR_OP:
            operator, left, right = condition.name[-1].sval, condition.lexpr, condition.rexpr
            is_row = isinstance(left, ast.RowExpr) and isinstance(right, ast.RowExpr)
            if is_row:
                left, right = left.args[0], right.args[0]
            if isinstance(left, ast.ColumnRef) and (is_row or operator == "="):
                *qualifier, column = (getattr(field, "sval", "*") for field in left.fields)
                yield operator, (qualifier[-1] if qualifier else None), column, right


def _first_values(select: Any) -> list[Any]:
    """What an INSERT puts into its first column."""
    if select.valuesLists:
        return [row[0] for row in select.valuesLists]
    return [select.targetList[0].val]


def _is_cte(node: Node) -> bool:
    """Whether a name in FROM is that of a WITH around it."""
    if node.it.schemaname is not None:
        return False
    clauses = (getattr(parent, "withClause", None) for parent in node.parents)
    return any(cte.ctename == node.it.relname for clause in clauses if clause for cte in clause.ctes)


def _is_parameter(value: Any, number: int | None = None) -> bool:
    inner = value.arg if isinstance(value, ast.TypeCast) else value
    return isinstance(inner, ast.ParamRef) and number in (None, inner.number)


def _is_true(value: Any) -> bool:
    return isinstance(value, ast.A_Const) and getattr(value.val, "boolval", False)


def _is_temporary(node: Any) -> bool:
    relation = node.relation if isinstance(node, ast.CreateStmt) else getattr(node, "rel", node)
    return getattr(relation, "relpersistence", "p") == "t"


def _type(name: Any) -> str:
    return str(name.names[-1].sval)


def _body(function: Any) -> str:
    return " ".join(part.sval for option in function.options if option.defname == "as" for part in option.arg)
