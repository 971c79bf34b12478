"""Whatever text stands in a payload, whatever object is to become one, whatever record an error is made from.

More of each: `PERDURE_FUZZ_EXAMPLES=10000`.
"""

from __future__ import annotations

import builtins
import dataclasses
import enum
import json
import os
import string
from collections.abc import Callable
from datetime import date, datetime, timedelta
from decimal import Decimal
from functools import partial
from typing import Any, Literal, NamedTuple
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typing_extensions import TypedDict

from perdure import failures
from perdure.codec import Shape, shape
from perdure.errors import PerdureError, SerializationError, StepFailed, WorkflowFailed
from perdure.model import keys

WHERE, LIMIT = "the result of step 'fuzzed'", 100_000


@dataclasses.dataclass
class Line:
    sku: str
    count: int = 1


@dataclasses.dataclass
class Order:
    lines: list[Line]
    at: datetime | None = None


class Colour(enum.Enum):
    RED = "red"
    BLUE = 2


class Place(NamedTuple):
    x: float
    y: float


class Options(TypedDict, total=False):
    loud: bool
    names: dict[str, int]


ANNOTATIONS = (
    Any, None, bool, int, float, str, bytes, Decimal, UUID, date, datetime, timedelta, list, dict, list[int], set[str],
    tuple[int, ...], tuple[int, str], dict[str, int], dict[int, Order], int | str | None, Literal["a", 1], Order,
    Colour, Place, Options, list[Order | Place],
)  # fmt: skip
SHAPES = tuple(shape(each) for each in ANNOTATIONS)
pytestmark = pytest.mark.timeout(900)
any_time = settings(deadline=None, max_examples=int(os.environ.get("PERDURE_FUZZ_EXAMPLES", "100")))

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers().map(lambda number: number * 10**400)
    | st.floats()
    | st.text()
    | st.sampled_from(["2026-01-01T00:00:00Z", "P1D", "red", "a", "9" * 400, "\ud800", "\0", "NaN", "-0", "1e400"])
)
names_of_fields = st.sampled_from(["lines", "sku", "count", "at", "x", "y", "names", "1", ""])
documents = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names_of_fields, inner, max_size=4),
    max_leaves=12,
)
texts = (
    documents.map(json.dumps)
    | st.text()
    | st.text('[]{}",:0123456789-+.eEtrufalsn \\u', max_size=30)
    | st.integers(1, 100_000).map(lambda depth: "[" * depth + "]" * depth)
    | st.integers(1, 20_000).map(lambda depth: '{"lines":[' * depth)
    | st.integers(1, 20_000).map("9".__mul__)
)


class Hostile:
    """Nothing that is asked of it works."""

    def _no(self, *args: Any) -> Any:
        raise RuntimeError("no")

    __eq__ = __hash__ = __repr__ = __str__ = __bool__ = __len__ = __iter__ = __reduce__ = _no  # type: ignore[assignment]


loop: list[Any] = []
loop.append(loop)
objects = st.recursive(
    scalars
    | st.binary()
    | st.datetimes()
    | st.decimals()
    | st.uuids()
    | st.complex_numbers()
    | st.sampled_from([object(), lambda: 1, int, ..., loop, Colour.RED, Place(1, 2), Order([Line("a")]), range(3)])
    | st.builds(Hostile)
    | st.builds(iter, st.lists(st.integers())),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text() | st.integers() | st.none() | st.binary(), inner, max_size=3)
        | st.tuples(inner, inner)
        | st.builds(Order, inner, inner)
        | st.frozensets(st.integers() | st.text() | st.binary())
    ),
    max_leaves=8,
)


def refusal(doing: Callable[[], object], kind: type[Exception]) -> str | None:
    """What is said where it is refused; any other error comes out."""
    try:
        doing()
    except kind as error:
        return str(error)
    return None


@any_time
@given(texts, st.sampled_from(SHAPES))
def test_any_text_is_read_or_refused_in_one_line(text: str, wanted: Shape) -> None:
    refused = refusal(lambda: wanted.load(text), ValueError)
    if refused is not None:
        assert refused
        assert "\n" not in refused
        assert len(refused) < 2000


@any_time
@given(objects, st.sampled_from(SHAPES))
def test_any_object_is_written_so_that_it_can_be_read_or_refused(value: Any, wanted: Shape) -> None:
    refused = refusal(lambda: wanted.settle(value, WHERE, LIMIT), SerializationError)
    if refused is not None:
        assert refused.startswith(WHERE)
        assert len(refused) < 3000
    else:
        text, seen = wanted.settle(value, WHERE, LIMIT)
        again = wanted.load(text)
        assert wanted.settle(again, WHERE, LIMIT)[0] == wanted.settle(seen, WHERE, LIMIT)[0]


@pytest.mark.parametrize("fallback", [StepFailed, WorkflowFailed])
@any_time
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from([*(f"builtins.{name}" for name in dir(builtins)), "KeyError", "os.system", ""])
            | documents,
            "message": documents,
            "traceback": documents,
            "args": documents,
            "state": documents,
            "attempts": documents,
        },
    )
    | documents
)
def test_any_record_of_an_error_gives_one(fallback: Any, recorded: Any) -> None:
    catalogue = failures.Catalogue()
    for given_as in (json.dumps(recorded), recorded) if isinstance(recorded, dict) else (json.dumps(recorded),):
        error = catalogue.rebuild(given_as, fallback)
        assert isinstance(error, Exception)
        assert isinstance(str(error), str)
        assert isinstance(failures.record(error), str)


names = st.text(min_size=1, max_size=20) | st.text("$/#%ait0123456789" + string.ascii_lowercase, min_size=1, max_size=8)


@any_time
@given(st.lists(st.tuples(st.lists(names, max_size=3), names, st.integers(1, 3)), max_size=20))
def test_no_two_steps_share_a_key_and_none_has_one_of_perdures_own(steps: list[tuple[list[str], str, int]]) -> None:
    made: dict[str, Any] = {}
    for tasks, name, number in steps:
        refused = refusal(partial(keys.check_name, "step", name), PerdureError)
        if refused is not None:
            assert repr(name) in refused
            continue
        path = "/".join([*(keys.segment(task) for task in tasks), keys.occurrence(name, number)])
        own = {"tasks": tasks, "name": name, "number": number}
        for key in (
            path,
            keys.attempt_key(path, 1),
            keys.intent_key(path, 1),
            keys.timer_key(path),
            keys.child_key(path),
        ):
            assert not key.startswith("$")
            assert made.setdefault(key, own) == own
        assert keys.attempted_key(keys.attempt_key(path, 12)) == path
        assert keys.intended_key(keys.intent_key(path, 12)) == path
        assert keys.waited_key(keys.timer_key(path)) == path
        assert keys.parent_key(keys.child_key(path)) == path


def test_the_annotations_are_looked_at() -> None:
    assert shape(UUID).load(f'"{UUID(int=1)}"') == UUID(int=1)
