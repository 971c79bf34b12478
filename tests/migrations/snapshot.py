"""A schema as text, the same whatever it is called: what `head.txt` holds."""

from __future__ import annotations

from typing import Any

from psycopg import Connection

_QUERIES = {
    "tables": """
        SELECT c.relname || coalesce(' (' || (
                   SELECT string_agg(option, ', ' ORDER BY option) FROM unnest(c.reloptions) AS option) || ')', ''),
               (SELECT array_agg(a.attname || ' ' || format_type(a.atttypid, a.atttypmod)
                                 || CASE WHEN a.attnotnull THEN ' not null' ELSE '' END
                                 || coalesce(' default ' || pg_get_expr(d.adbin, d.adrelid), '') ORDER BY a.attnum)
                FROM pg_attribute AS a LEFT JOIN pg_attrdef AS d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
                WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped)
               || (SELECT array_agg(o.conname || ': ' || pg_get_constraintdef(o.oid) ORDER BY o.conname)
                   FROM pg_constraint AS o WHERE o.conrelid = c.oid AND o.contype <> 'n')
               || (SELECT array_agg(pg_get_indexdef(i.indexrelid) ORDER BY i.indexrelid::regclass::text)
                   FROM pg_index AS i WHERE i.indrelid = c.oid)
        FROM pg_class AS c WHERE c.relnamespace = to_regnamespace(%(schema)s) AND c.relkind IN ('r', 'p')
        ORDER BY c.relname""",
    "views": """
        SELECT c.relname,
               (SELECT array_agg(a.attname || ' ' || format_type(a.atttypid, a.atttypmod) ORDER BY a.attnum)
                FROM pg_attribute AS a WHERE a.attrelid = c.oid AND a.attnum > 0)
        FROM pg_class AS c WHERE c.relnamespace = to_regnamespace(%(schema)s) AND c.relkind IN ('v', 'm')
        ORDER BY c.relname""",
    "functions": """
        SELECT p.proname || '(' || pg_get_function_identity_arguments(p.oid) || ')',
               ARRAY['returns ' || pg_get_function_result(p.oid),
                     'volatility ' || p.provolatile::text || ', parallel ' || p.proparallel::text, p.prosrc]
        FROM pg_proc AS p WHERE p.pronamespace = to_regnamespace(%(schema)s)
        ORDER BY 1""",
    "other things": """
        SELECT c.relname || ' of kind ' || c.relkind::text, NULL::text[]
        FROM pg_class AS c
        WHERE c.relnamespace = to_regnamespace(%(schema)s) AND c.relkind NOT IN ('r', 'p', 'v', 'm', 'i', 'I')
        UNION ALL
        SELECT t.typname || ' of type ' || t.typtype::text, NULL
        FROM pg_type AS t
        WHERE t.typnamespace = to_regnamespace(%(schema)s) AND t.typtype IN ('d', 'e', 'r', 'm')
        UNION ALL
        SELECT g.tgname || ', a trigger', NULL
        FROM pg_trigger AS g JOIN pg_class AS c ON c.oid = g.tgrelid
        WHERE c.relnamespace = to_regnamespace(%(schema)s)
        ORDER BY 1""",
    "migrations": """
        SELECT version || ' ' || name || ', for code from ' || oldest_code, NULL::text[]
        FROM {schema}.migrations WHERE version > 0 ORDER BY version""",
}


def snapshot(connection: Connection[Any], schema: str) -> str:
    """Everything that stands in a schema."""
    (quoted,) = connection.execute("SELECT quote_ident(%s)", (schema,)).fetchone() or ()
    lines: list[str] = []
    for title, query in _QUERIES.items():
        lines.append(f"# {title}")
        text = query.replace("{schema}", quoted.replace("%", "%%"))
        for name, parts in connection.execute(text.encode(), {"schema": quoted}):
            lines += [name, *(f"    {part}" for part in parts or ())]
        lines.append("")
    return "\n".join(lines).replace(f"{quoted}.", "perdure.")
