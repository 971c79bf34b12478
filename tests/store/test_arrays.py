"""Arrays in PostgreSQL's binary format: whatever is sent is what the server has."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from uuid import UUID

import psycopg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from psycopg import RawCursor

from perdure.embedded import Cluster
from perdure.store import arrays
from perdure.store.arrays import Array, BigInts, Floats, Ints, Texts, Times, Uuids, columns

# What PostgreSQL stores, though Python could do with less: years up to 9999, any text without NUL and lone surrogates.
_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
_ZONES = st.integers(-(24 * 60 - 1), 24 * 60 - 1).map(lambda minutes: timezone(timedelta(minutes=minutes)))
_TIMES = st.datetimes(
    min_value=datetime(1, 1, 3),  # noqa: DTZ001 - the strategy wants it so
    max_value=datetime(9999, 12, 29),  # noqa: DTZ001
    timezones=st.just(UTC) | _ZONES,
)

VALUES: dict[type[Array], st.SearchStrategy[Any]] = {
    Uuids: st.uuids(),
    Texts: _TEXT,
    Ints: st.integers(-(2**31), 2**31 - 1),
    BigInts: st.integers(-(2**63), 2**63 - 1),
    Floats: st.floats(allow_nan=False),
    Times: _TIMES,
}
TYPES = {
    Uuids: "uuid", Texts: "text", Ints: "int4", BigInts: "int8", Floats: "float8", Times: "timestamptz",
}  # fmt: skip

against_a_server = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)


@pytest.fixture(scope="module")
def connection(cluster: Cluster) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(cluster.url, autocommit=True, cursor_factory=RawCursor) as connection:
        arrays.register(connection.adapters)
        yield connection


def _there_and_back(connection: psycopg.Connection[Any], array: Array) -> list[Any]:
    """What the server reads in an array: unnested there, and sent back as text, which shares no code with it."""
    kind = TYPES[type(array)]
    cursor = connection.execute(
        f"SELECT item.value FROM unnest($1::{kind}[]) WITH ORDINALITY AS item (value, place) ORDER BY item.place",
        (array,),
    )
    return [value for (value,) in cursor]


@pytest.mark.parametrize("kind", VALUES)
@against_a_server
@given(data=st.data())
def test_values_come_back_as_they_were(
    kind: type[Array], connection: psycopg.Connection[Any], data: st.DataObject
) -> None:
    values = data.draw(st.lists(st.none() | VALUES[kind], max_size=20))

    assert _there_and_back(connection, kind(values)) == values


@pytest.mark.parametrize(
    "array",
    [
        Uuids([UUID(int=0), UUID(int=2**128 - 1), None]),
        Texts(
            [
                "",
                " ",
                "NULL",
                "{,\\",
                "ß",
                "日本語",
                "🙂",
                "e\u0301",
                "\ufeff",
                "\U0010ffff",
                None,
                "x" * 100_000,
            ]
        ),
        Ints([-(2**31), -1, 0, 1, 2**31 - 1, None]),
        BigInts([-(2**63), -1, 0, 1, 2**63 - 1, None]),
        Floats([float("-inf"), -5e-324, -0.0, 0.0, 5e-324, 1.7976931348623157e308, float("inf"), None]),
        Times(
            [
                datetime(1, 1, 2, tzinfo=UTC),
                datetime(1970, 1, 1, tzinfo=UTC),
                datetime(1999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC),
                datetime(2000, 1, 1, tzinfo=UTC),
                datetime(2000, 1, 1, microsecond=1, tzinfo=UTC),
                datetime(9999, 12, 30, 23, 59, 59, 999_999, tzinfo=UTC),
                datetime(2024, 2, 29, 12, tzinfo=timezone(timedelta(hours=14))),
                datetime(2024, 2, 29, 12, tzinfo=timezone(-timedelta(hours=12, minutes=34, seconds=56))),
                None,
            ]
        ),
    ],
    ids=lambda array: type(array).__name__,
)
def test_extreme_values_come_back_as_they_were(array: Array, connection: psycopg.Connection[Any]) -> None:
    assert _there_and_back(connection, array) == list(array)


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("values", [[], [None], [None, None]], ids=["nothing", "one null", "two nulls"])
def test_arrays_without_values_keep_their_length(
    kind: type[Array], values: list[None], connection: psycopg.Connection[Any]
) -> None:
    array = kind(values)

    (found,) = connection.execute(f"SELECT cardinality($1::{TYPES[kind]}[])", (array,)).fetchone() or ()
    assert found == len(values)
    assert _there_and_back(connection, array) == values


@against_a_server
@given(st.lists(st.tuples(*(st.none() | VALUES[kind] for kind in VALUES)), max_size=10))
@example([])
def test_rows_become_columns_that_unnest_to_the_same_rows(
    connection: psycopg.Connection[Any], rows: list[tuple[Any, ...]]
) -> None:
    arrays = columns(rows, tuple(VALUES))

    lists = ", ".join(f"${place}::{TYPES[kind]}[]" for place, kind in enumerate(VALUES, 1))
    cursor = connection.execute(f"SELECT a, b, c, d, e, f FROM unnest({lists}) AS item (a, b, c, d, e, f)", arrays)
    assert cursor.fetchall() == rows


@pytest.mark.parametrize(
    ("array", "error"),
    [
        (Ints([2**31]), psycopg.DataError),
        (BigInts([2**63]), psycopg.DataError),
        (Texts(["\ud800"]), psycopg.DataError),
        (Times([datetime(2024, 1, 1)]), TypeError),  # noqa: DTZ001 - without a zone, which is what is refused
    ],
    ids=["a large int", "a larger int", "a lone surrogate", "a time without a zone"],
)
def test_what_no_column_can_hold_is_refused_before_it_is_sent(
    array: Array, error: type[Exception], connection: psycopg.Connection[Any]
) -> None:
    with pytest.raises(error):
        _there_and_back(connection, array)

    assert connection.execute("SELECT 1").fetchone() == (1,)
