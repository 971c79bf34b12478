"""Payloads: what goes in comes out, or is refused with a reason."""

from __future__ import annotations

import inspect
import json
import math
import subprocess
import sys
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from functools import partial
from ipaddress import IPv4Address
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NamedTuple, Never, TypeVar
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from typing_extensions import TypedDict, Unpack

from perdure.annotations import adapter_of
from perdure.codec import ANY, Shape, result_shape, shape
from perdure.errors import InvalidArguments, SerializationError
from perdure.hashing import arguments_hash
from perdure.parameters import Parameters, dump_untyped

LIMIT = 16 * 1024 * 1024
WHERE = "the result of step 'charge'"

T = TypeVar("T")


class Colour(Enum):
    RED = "red"


class Level(IntEnum):
    LOW = 1


class Word(StrEnum):
    YES = "yes"


@dataclass
class Line:
    sku: str
    count: int = 1


@dataclass
class Order:
    lines: list[Line]
    placed: datetime
    tags: set[str] = field(default_factory=set)


@dataclass
class GiftLine(Line):
    note: str = ""


@dataclass(eq=False)
class Bare:
    count: int


@dataclass
class Blob:
    data: bytes


class Address(BaseModel):
    street: str
    height: float | None = None


class Villa(Address):
    pool: bool = True


class Loose(BaseModel):
    value: Any


class Base64Model(BaseModel):
    model_config = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")
    data: bytes


class Page(BaseModel, Generic[T]):
    items: list[T]


class Point(NamedTuple):
    x: int
    y: int = 0


class Options(TypedDict, total=False):
    express: bool
    name: str


class Opaque:
    pass


class Node(BaseModel):
    name: str
    children: list[Node] = []


def settle(annotation: Any, value: Any, limit: int = LIMIT) -> tuple[str, Any]:
    return Shape(annotation).settle(value, WHERE, limit)


def refusal(annotation: Any, value: Any, limit: int = LIMIT) -> SerializationError:
    with pytest.raises(SerializationError) as caught:
        settle(annotation, value, limit)
    assert caught.value.where == WHERE
    assert "\n" not in str(caught.value)
    return caught.value


class TestValuesThatCanBeStored:
    @pytest.mark.parametrize(
        ("annotation", "value", "text"),
        [
            (str, "naïve ☃ 😀", '"naïve ☃ 😀"'),
            (int, 10**30, str(10**30)),
            (bool, True, "true"),
            (None, None, "null"),
            (float, 0.1, "0.1"),
            (bytes, b"\xff\x00", '"_wA="'),
            (Blob, Blob(b"\xff"), '{"data":"_w=="}'),
            (list[Blob], [Blob(b"\xff")], '[{"data":"_w=="}]'),
            (Base64Model, Base64Model(data=b"\xff"), '{"data":"_w=="}'),
            (Decimal, Decimal("1.10"), '"1.10"'),
            (UUID, UUID(int=1), '"00000000-0000-0000-0000-000000000001"'),
            (date, date(2026, 1, 2), '"2026-01-02"'),
            (datetime, datetime(2026, 1, 2, 3, tzinfo=UTC), '"2026-01-02T03:00:00Z"'),
            (time, time(1, 2), '"01:02:00"'),
            (timedelta, timedelta(days=1), '"P1D"'),
            (Colour, Colour.RED, '"red"'),
            (Level, Level.LOW, "1"),
            (Word, Word.YES, '"yes"'),
            (Literal["a", 1], "a", '"a"'),
            (Line, Line("x"), '{"sku":"x","count":1}'),
            (Bare | None, None, "null"),
            (Address, Address(street="a"), '{"street":"a","height":null}'),
            (Page[Line], Page[Line](items=[Line("x")]), '{"items":[{"sku":"x","count":1}]}'),
            (Options, {"name": "a", "express": True}, None),
            (Point, Point(1, 2), "[1,2]"),
            (tuple[int, str], (1, "a"), '[1,"a"]'),
            (tuple[int, ...], (1, 2, 3), "[1,2,3]"),
            (set[str], {"b", "a", "c"}, None),
            (frozenset[int], frozenset({1, 2}), None),
            (dict[int, str], {1: "a"}, '{"1":"a"}'),
            (OrderedDict[str, int], OrderedDict(a=1), '{"a":1}'),
            (deque[int], deque([1]), "[1]"),
            (Sequence[int], [1], "[1]"),
            (dict[str, Any], {"a": [1, {"b": None}]}, '{"a":[1,{"b":null}]}'),
            (str | None, "a", '"a"'),
            (int | str, "1", '"1"'),
            (Line | Address, Address(street="a"), '{"street":"a","height":null}'),
            (Path, Path("/a"), '"/a"'),
            (IPv4Address, IPv4Address("1.2.3.4"), '"1.2.3.4"'),
            (Annotated[int, Field(gt=0)], 3, "3"),
            (Node, Node(name="a", children=[Node(name="b")]), None),
            (Loose, Loose(value={"a": 1}), '{"value":{"a":1}}'),
            (ANY, {"a": [1, 1.5, True, None, "x"]}, '{"a":[1,1.5,true,null,"x"]}'),
            (object, [], "[]"),
        ],
    )
    def test_they_come_back_as_they_were(self, annotation: Any, value: Any, text: str | None) -> None:
        stored, decoded = settle(annotation, value)
        assert decoded == value
        assert type(decoded) is type(value)
        assert text is None or stored == text
        assert Shape(annotation).load(stored) == value
        assert Shape(annotation).load(stored.encode()) == value
        assert Shape(annotation).dump(value, WHERE, LIMIT) == stored

    def test_a_nested_order_comes_back(self) -> None:
        order = Order([Line("x"), Line("y", 2)], datetime(2026, 1, 1, tzinfo=timezone(timedelta(hours=2))), {"b", "a"})
        assert settle(Order, order)[1] == order

    def test_an_instance_with_identity_equality_comes_back(self) -> None:
        text, decoded = settle(Bare, Bare(3))
        assert (text, decoded.count) == ('{"count":3}', 3)

    def test_the_first_run_sees_what_replay_sees(self) -> None:
        value = {"a": [1]}
        text, decoded = settle(ANY, value)
        assert decoded == value
        assert decoded is not value
        assert decoded["a"] is not value["a"]
        assert settle(str, Word.YES) == ('"yes"', "yes")
        assert type(settle(str, Word.YES)[1]) is str
        assert settle(Sequence[int], (1, 2)) == ("[1,2]", [1, 2])
        assert json.loads(text) == value

    def test_an_int_is_a_float_where_one_is_due(self) -> None:
        text, decoded = settle(float, 1)
        assert (text, type(decoded)) == ("1.0", float)
        assert refusal(float, 2**53 + 1)

    def test_a_text_that_only_looks_like_nul_or_infinity_is_kept(self) -> None:
        for value in ["\\u0000", "\\\\u0000", "Infinity", "NaN", "-Infinity"]:
            assert settle(ANY, [value])[1] == [value]
            assert settle(str, value)[1] == value

    def test_sets_of_any_order_are_equal(self) -> None:
        value = set(map(str, range(1000)))
        assert settle(set[str], value)[1] == value

    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=20,
        )
    )
    def test_any_json_survives_exactly_or_is_refused_for_nul(self, value: Any) -> None:
        try:
            text, decoded = shape(ANY).settle(value, WHERE, LIMIT)
        except SerializationError as error:
            refused: SerializationError | None = error
        else:
            refused = None
            assert repr(decoded) == repr(value)
            assert json.loads(text) == value
            assert shape(ANY).load(text) == value
        assert (refused is not None) == ("\\u0000" in json.dumps(value).replace("\\\\", ""))

    @given(
        st.builds(
            Order,
            st.lists(st.builds(Line, st.text(st.characters(exclude_characters="\0", codec="utf-8")), st.integers())),
            st.datetimes(timezones=st.just(UTC)),
            st.sets(st.text(st.characters(exclude_characters="\0", codec="utf-8"))),
        )
    )
    def test_orders_survive(self, order: Order) -> None:
        assert shape(Order).settle(order, WHERE, LIMIT)[1] == order

    @given(st.decimals(allow_nan=False, allow_infinity=False), st.binary(), st.floats(allow_nan=False))
    def test_numbers_and_bytes_survive(self, number: Decimal, data: bytes, real: float) -> None:
        assert str(shape(Decimal).settle(number, WHERE, LIMIT)[1]) == str(number)
        assert shape(bytes).settle(data, WHERE, LIMIT)[1] == data
        if math.isfinite(real):
            assert repr(shape(float).settle(real, WHERE, LIMIT)[1]) == repr(real)


class TestValuesThatAreRefused:
    @pytest.mark.parametrize(
        ("annotation", "value", "type_name"),
        [
            (int, "42", "str"),
            (int, True, "bool"),
            (int, 1.0, "float"),
            (bool, 1, "int"),
            (str, b"a", "bytes"),
            (str, None, "None"),
            (None, 1, "int"),
            (list[int], [1.0], "list"),
            (list[int], [True], "list"),
            (list[int], (1,), "tuple"),
            (tuple[int, str], [1, "a"], "list"),
            (set[int], [1], "list"),
            (UUID, str(UUID(int=1)), "str"),
            (datetime, "2026-01-01", "str"),
            (date, datetime(2026, 1, 1, 10, tzinfo=UTC), "datetime.datetime"),
            (Decimal, 1, "int"),
            (Colour, "red", "str"),
            (Literal["a"], "b", "str"),
            (Line, {"sku": "x"}, "dict"),
            (Address, {"street": "x"}, "dict"),
            (Point, (1, 2), "tuple"),
            (Annotated[int, Field(gt=0)], -1, "int"),
        ],
    )
    def test_they_are_no_instance_of_the_annotation(self, annotation: Any, value: Any, type_name: str) -> None:
        assert refusal(annotation, value).type_name == type_name

    @pytest.mark.parametrize(
        ("annotation", "value", "culprit"),
        [
            (Line, GiftLine("x"), "GiftLine"),
            (list[Line], [GiftLine("x")], "GiftLine"),
            (dict[str, Line], {"a": GiftLine("x")}, "GiftLine"),
            (Address, Villa(street="a"), "Villa"),
            (Address | None, Villa(street="a"), "Villa"),
            (Page[Address], Page[Address](items=[Villa(street="a")]), "Villa"),
            (Options, {"express": True, "gift": True}, "dict"),
            (dict[str, Any], {"a": (1, 2)}, "tuple"),
            (dict[str, Any], {"a": Decimal(1)}, "Decimal"),
            (dict[str, Any], {"a": Line("x")}, "Line"),
            (Loose, Loose(value={1}), "set"),
            (dict, {1: 2}, "dict"),
        ],
    )
    def test_the_annotation_would_drop_something(self, annotation: Any, value: Any, culprit: str) -> None:
        assert refusal(annotation, value).type_name.rpartition(".")[2] == culprit

    def test_a_validator_would_change_it(self) -> None:
        def double(value: int) -> int:
            return value * 2

        assert "validators" in refusal(Annotated[int, AfterValidator(double)], 2).reason

    @pytest.mark.parametrize("value", [(1,), {1}, b"x", Word.YES, Level.LOW, Line("x"), Decimal(1), OrderedDict(a=1)])
    def test_without_an_annotation_it_must_be_plain_json(self, value: Any) -> None:
        for given_value in (value, [value], {"a": {"b": value}}):
            error = refusal(ANY, given_value)
            assert type(value).__name__ in error.type_name
            assert "annotate" in error.reason
        assert "['a']['b']" in refusal(ANY, {"a": {"b": value}}).reason

    def test_without_an_annotation_keys_must_be_str(self) -> None:
        for key in (1, None, True, Word.YES):
            assert "key" in refusal(ANY, [{key: 1}]).reason

    @pytest.mark.parametrize(
        ("annotation", "wrap"),
        [
            (float, lambda x: x),
            (ANY, lambda x: x),
            (ANY, lambda x: [{"a": x}]),
            (float | None, lambda x: x),
            (list[float], lambda x: [1.0, x]),
            (set[float], lambda x: {x}),
            (Address, lambda x: Address(street="a", height=x)),
            (list[Address], lambda x: [Address(street="a", height=x)]),
            (Loose, lambda x: Loose(value=[x])),
            (dict[str, Any], lambda x: {"a": x}),
            (Decimal, lambda x: Decimal(x)),
        ],
    )
    @pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
    def test_inf_and_nan_are_refused_wherever_they_stand(
        self, annotation: Any, wrap: Callable[[float], Any], number: float
    ) -> None:
        reason = refusal(annotation, wrap(number)).reason
        assert "inf and nan" in reason or "finite number" in reason

    @pytest.mark.parametrize("annotation", [str, ANY, str | None, Annotated[str, Field()]])
    def test_nul_and_lone_surrogates_are_refused(self, annotation: Any) -> None:
        assert "NUL" in refusal(annotation, "a\0b").reason
        assert "NUL" in refusal(annotation, "\\\0").reason
        assert "surrogates" in refusal(annotation, "\ud800").reason
        assert "NUL" in refusal(dict[str, int], {"\0": 1}).reason

    def test_what_is_too_large_is_refused_in_bytes(self) -> None:
        assert settle(str, "é", limit=4)
        error = refusal(str, "éé", limit=5)
        assert "6 bytes" in error.reason
        assert "limit is 5" in error.reason

    def test_an_int_that_python_would_not_read_again_is_refused(self) -> None:
        for annotation in (int, ANY, list[int]):
            value = [10**5000] if annotation == list[int] else 10**5000
            refusal(annotation, value)
        assert settle(int, 10**4200)[1] == 10**4200

    @pytest.mark.parametrize("annotation", [ANY, list, list[Any]])
    def test_a_list_that_contains_itself_or_is_nested_too_deeply_is_refused(self, annotation: Any) -> None:
        cycle: list[Any] = []
        cycle.append(cycle)
        deep: list[Any] = []
        for _ in range(5000):
            deep = [deep]
        for value in (cycle, deep):
            with pytest.raises(SerializationError, match="JSON can't carry it"):
                settle(annotation, value)

    def test_what_contains_itself_is_refused(self) -> None:
        cycle: list[Any] = []
        cycle.append(cycle)
        refusal(list[Any], cycle)

    def test_values_whose_code_raises_are_refused(self) -> None:
        class Odd:
            def __eq__(self, other: object) -> bool:
                raise RuntimeError("no")

            __hash__ = None  # type: ignore[assignment]

        refusal(ANY, Odd())
        refusal(dict[str, Any], {"a": Odd()})

    @pytest.mark.parametrize("annotation", [Opaque, list[Opaque], range, "Missing", Callable[[], int], Never])
    def test_an_annotation_without_json_says_what_to_do(self, annotation: Any) -> None:
        error = refusal(annotation, Opaque())
        assert str(error)
        with pytest.raises((SerializationError, ValueError)):
            Shape(annotation).load("1")
        assert "pydantic knows" in error.reason or "JSON can't carry it" in error.reason or "should be" in error.reason


class TestLoading:
    def test_json_is_taken_leniently(self) -> None:
        assert Shape(int).load('"42"') == 42
        assert Shape(UUID).load('"00000000-0000-0000-0000-000000000001"') == UUID(int=1)

    @pytest.mark.parametrize("text", ['"x"', "[]", "", "{", "null", "nope"])
    def test_a_text_that_does_not_fit_raises_value_error_in_one_line(self, text: str) -> None:
        with pytest.raises(ValueError) as caught:
            Shape(int).load(text)
        assert "\n" not in str(caught.value)

    def test_the_error_names_the_place(self) -> None:
        with pytest.raises(ValueError, match=r"lines\.0\.count"):
            Shape(Order).load('{"lines":[{"sku":"x","count":"y"}],"placed":"2026-01-01T00:00:00Z"}')


class TestResults:
    def test_the_annotation_is_found(self) -> None:
        async def coroutine() -> Line: ...
        def plain() -> Line: ...
        def returns_awaitable() -> Awaitable[Line]: ...
        def returns_coroutine() -> Coroutine[Any, Any, Line]: ...

        for fn in (coroutine, plain, returns_awaitable, returns_coroutine, partial(plain)):
            assert result_shape(fn).load('{"sku":"x"}') == Line("x")  # type: ignore[arg-type]

    def test_no_annotation_means_any(self) -> None:
        def bare():  # type: ignore[no-untyped-def]
            ...

        def never() -> Never: ...

        for fn in (bare, never, lambda: 1):
            with pytest.raises(SerializationError, match="annotate"):
                result_shape(fn).settle((1,), WHERE, LIMIT)

    def test_none_is_an_annotation(self) -> None:
        def fn() -> None: ...

        assert result_shape(fn).settle(None, WHERE, LIMIT) == ("null", None)
        with pytest.raises(SerializationError, match="None"):
            result_shape(fn).settle(1, WHERE, LIMIT)

    def test_annotations_are_resolved_at_first_use(self) -> None:
        def fn() -> Later: ...  # type: ignore[name-defined] # noqa: F821

        late = result_shape(fn)
        with pytest.raises(SerializationError, match="Later"):
            late.settle(1, WHERE, LIMIT)
        globals()["Later"] = int
        try:
            assert late.settle(1, WHERE, LIMIT) == ("1", 1)
        finally:
            del globals()["Later"]

    def test_methods_and_callable_objects_have_results(self) -> None:
        class Shop:
            def price(self) -> int: ...
            def __call__(self) -> int: ...

        for fn in (Shop().price, Shop.price, Shop()):
            assert result_shape(fn).load("1") == 1  # type: ignore[arg-type]

    def test_a_shape_is_shared_where_the_annotation_is(self) -> None:
        assert shape(list[int]) is shape(list[int])
        assert shape(Annotated[int, []]).settle(1, WHERE, LIMIT) == ("1", 1)


def checkout(order_id: int, *, express: bool = False) -> str: ...
def everything(
    a: int, /, b: str = "x", *rest: float, c: list[int] | None = None, d: Any = None, **more: bool
) -> None: ...
def with_options(a: int = 1, **more: Unpack[Options]) -> None: ...
def with_default(line: Line, other: object = Opaque()) -> None: ...


CHECKOUT = Parameters(checkout, "checkout")
EVERYTHING = Parameters(everything, "everything")


class TestParameters:
    @pytest.mark.parametrize(
        ("args", "kwargs"),
        [
            ((), {}),
            ((1, 2), {}),
            ((1,), {"order_id": 1}),
            ((1,), {"gift": 1}),
            ((), {"express": True}),
            ((1, 2, 3), {"gift": 1}),
        ],
    )
    def test_a_call_that_does_not_fit_is_refused(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with pytest.raises(InvalidArguments, match="checkout"):
            CHECKOUT.check(args, kwargs)
        with pytest.raises(InvalidArguments):
            CHECKOUT.dump(args, kwargs, LIMIT)

    def test_checking_looks_at_no_types(self) -> None:
        CHECKOUT.check(("x",), {"express": object()})
        EVERYTHING.check((1, 2, 3), {"z": 1})

    def test_they_are_an_object_by_name_without_defaults(self) -> None:
        for _ in range(2):  # the second time takes the fast way
            assert CHECKOUT.dump((42,), {"express": True}, LIMIT) == '{"order_id":42,"express":true}'
            assert CHECKOUT.dump((), {"express": True, "order_id": 42}, LIMIT) == '{"order_id":42,"express":true}'
            assert CHECKOUT.dump((42,), {}, LIMIT) == '{"order_id":42}'
            assert Parameters(lambda: 0, "nothing").dump((), {}, LIMIT) == "{}"

    def test_variable_parameters_stand_under_their_own_names(self) -> None:
        text = EVERYTHING.dump((1, "b", 2.5, 3.5), {"c": [1], "d": {}, "a": True}, LIMIT)
        assert text == '{"a":1,"b":"b","rest":[2.5,3.5],"c":[1],"d":{},"more":{"a":true}}'
        assert EVERYTHING.load(text) == ((1, "b", 2.5, 3.5), {"c": [1], "d": {}, "a": True})

    def test_unpacked_typed_dicts_are_checked(self) -> None:
        parameters = Parameters(with_options, "with_options")
        assert parameters.dump((), {"express": True}, LIMIT) == '{"more":{"express":true}}'
        assert parameters.load('{"more":{"express":true}}') == ((), {"express": True})
        with pytest.raises((InvalidArguments, SerializationError)):
            parameters.dump((), {"express": "yes"}, LIMIT)

    @pytest.mark.parametrize("value", ["42", True, 4.2, None, [1]])
    def test_a_wrong_type_names_parameter_expected_and_given(self, value: Any) -> None:
        for _ in range(2):
            with pytest.raises(InvalidArguments) as caught:
                CHECKOUT.dump((value,), {}, LIMIT)
            assert "'order_id'" in caught.value.reason
            assert "int" in caught.value.reason
            assert ("None" if value is None else type(value).__name__) in caught.value.reason

    def test_what_json_cannot_carry_names_the_argument(self) -> None:
        for value, limit in [({1}, LIMIT), (math.inf, LIMIT), ("a\0", LIMIT), ("\ud800", LIMIT), ("long", 3)]:
            with pytest.raises(SerializationError) as caught:
                EVERYTHING.dump((1,), {"d": value}, limit)
            assert caught.value.where == "argument 'd' of workflow 'everything'"
        named = Parameters(lambda text: text, "text")
        for _ in range(2):
            assert named.dump(("a",), {}, LIMIT) == '{"text":"a"}'
            for value in ("a\0", "\ud800", 10**5000):
                with pytest.raises(SerializationError):
                    named.dump((value,), {}, LIMIT)
            with pytest.raises(SerializationError, match="limit"):
                named.dump(("aaaa",), {}, 10)

    def test_subclass_fields_are_not_dropped(self) -> None:
        with pytest.raises(SerializationError, match="GiftLine"):
            Parameters(with_default, "w").dump((GiftLine("x"),), {}, LIMIT)

    def test_defaults_are_not_validated(self) -> None:
        parameters = Parameters(with_default, "w")
        assert parameters.load(parameters.dump((Line("x"),), {}, LIMIT)) == ((), {"line": Line("x")})

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ('{"order_id":42,"express":true}', {"order_id": 42, "express": True}),
            ('{"order_id":"42"}', {"order_id": 42}),
            ('{"$args":[42],"express":"true"}', {"order_id": 42, "express": True}),
            ('{"$args":[],"order_id":42}', {"order_id": 42}),
            (' { "order_id" : 42.0 } ', {"order_id": 42}),
        ],
    )
    def test_they_are_read_leniently_in_both_forms(self, text: str, expected: dict[str, Any]) -> None:
        args, kwargs = CHECKOUT.load(text)
        assert (args, kwargs) == ((), expected)

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("{}", "argument 'order_id' is missing"),
            ('{"$args":[]}', "order_id"),
            ('{"order_id":1,"gift":2}', "no parameter 'gift'; it takes order_id, express"),
            ('{"order_id":"x"}', "order_id: input should be a valid integer"),
            ('{"order_id":[1]}', "order_id"),
            ('{"order_id":null}', "order_id"),
            ('{"$args":[1,2]}', "too many positional"),
            ('{"$args":[1],"order_id":2}', "multiple values"),
            ('{"$args":7}', "must be an array"),
            ('{"$args":[{"$args":1}]}', "order_id"),
            ("[1]", "JSON object"),
            ("null", "JSON object"),
            ('"$args"', "JSON object"),
            ('{"$args":', "JSON object"),
            ("", "JSON object"),
        ],
    )
    def test_what_does_not_fit_is_told_in_one_line(self, text: str, reason: str) -> None:
        with pytest.raises(InvalidArguments) as caught:
            CHECKOUT.load(text)
        assert reason in caught.value.reason
        assert "\n" not in str(caught.value)

    def test_hopeless_nesting_is_told_in_one_line(self) -> None:
        for text in ('{"order_id":' * 5000, '{"$args":' * 100_000, '{"$args":[' * 400 + "]}" * 400):
            with pytest.raises(InvalidArguments) as caught:
                CHECKOUT.load(text)
            assert "\n" not in str(caught.value)

    def test_unknown_names_go_where_the_function_takes_them(self) -> None:
        assert EVERYTHING.load('{"a":1,"foo":true}') == ((1,), {"foo": True})
        assert EVERYTHING.load('{"$args":[1,"b",2],"foo":true}') == ((1, "b", 2.0), {"foo": True})
        assert EVERYTHING.load('{"a":1,"rest":[1]}') == ((1, "x", 1.0), {})
        for text in ('{"a":1,"foo":7}', '{"a":1,"more":{"b":true}}', '{"a":1,"foo":true,"more":3}'):
            with pytest.raises(InvalidArguments):
                EVERYTHING.load(text)

    def test_self_of_a_bound_method_is_no_parameter(self) -> None:
        class Shop:
            async def checkout(self, order_id: int) -> None: ...

        assert Parameters(Shop().checkout, "checkout").dump((1,), {}, LIMIT) == '{"order_id":1}'

    def test_annotations_that_lead_nowhere_are_told(self) -> None:
        def missing(a: Missing) -> None: ...  # type: ignore[name-defined] # noqa: F821
        def opaque(a: int, b: Opaque) -> None: ...

        for fn, clue in ((missing, "Missing"), (opaque, "'b'")):
            parameters = Parameters(fn, fn.__name__)
            parameters.check((1, 2) if fn is opaque else (1,), {})
            with pytest.raises(SerializationError, match=clue):
                parameters.dump((1, Opaque()) if fn is opaque else (1,), {}, LIMIT)
            with pytest.raises(SerializationError, match=clue):
                parameters.load('{"a":1}')

    def test_an_alias_in_an_annotation_does_not_rename_a_parameter(self) -> None:
        def fn(data: Base64Model, n: Annotated[int, Field(ge=1)]) -> None: ...

        parameters = Parameters(fn, "fn")
        text = parameters.dump((Base64Model(data=b"\xff"), 1), {}, LIMIT)
        assert text == '{"data":{"data":"_w=="},"n":1}'
        assert parameters.load(text) == ((), {"data": Base64Model(data=b"\xff"), "n": 1})

    @given(st.integers(), st.booleans())
    def test_what_is_dumped_is_loaded(self, order_id: int, express: bool) -> None:
        text = CHECKOUT.dump((order_id,), {"express": express}, LIMIT)
        assert CHECKOUT.load(text) == ((), {"order_id": order_id, "express": express})

    @given(
        st.integers(),
        st.lists(st.floats(allow_nan=False, allow_infinity=False)),
        st.dictionaries(st.sampled_from(["p", "q"]), st.booleans()),
    )
    def test_variable_parameters_are_loaded(self, a: int, rest: list[float], more: dict[str, bool]) -> None:
        args, kwargs = EVERYTHING.load(EVERYTHING.dump((a, "b", *rest), more, LIMIT))
        bind = inspect.signature(everything).bind
        assert bind(*args, **kwargs) == bind(a, "b", *rest, **more)

    def test_a_caller_without_the_code_is_understood(self) -> None:
        text = dump_untyped("checkout", (42,), {"express": True}, LIMIT)
        assert text == '{"$args":[42],"express":true}'
        assert CHECKOUT.load(text) == ((), {"order_id": 42, "express": True})
        assert dump_untyped("w", (), {}, LIMIT) == "{}"
        assert dump_untyped("w", (), {"order_id": 42}, LIMIT) == '{"order_id":42}'
        assert json.loads(dump_untyped("w", ("é",), {'a"b': None}, LIMIT)) == {"$args": ["é"], 'a"b': None}

    def test_a_caller_without_the_code_sends_plain_json_only(self) -> None:
        with pytest.raises(SerializationError, match="argument 2 of workflow 'w'"):
            dump_untyped("w", (1, (1,)), {}, LIMIT)
        with pytest.raises(SerializationError, match="argument 'k'"):
            dump_untyped("w", (), {"k": {1}}, LIMIT)
        with pytest.raises(SerializationError, match="the arguments of workflow 'w'"):
            dump_untyped("w", ("aaaa", "aaaa"), {}, 10)
        with pytest.raises(InvalidArguments):
            dump_untyped("w", (), {"$args": 1}, LIMIT)


class Reference:
    """Has itself as an attribute, and no order, equality or text that is the same in two processes."""


@dataclass
class Client:
    url: str
    session: Reference = field(default_factory=Reference)


HASH_PROGRAM = """
from perdure.hashing import arguments_hash
print(arguments_hash(("a", "b"), ({"x", "y", "zz", "q"}, {"k": frozenset({"m", "n"}), "l": [1, 2.5, None, True]}), {}))
"""


class TestArgumentHashes:
    def test_position_and_name_make_no_difference(self) -> None:
        names = ("a", "b", "c")
        reference = arguments_hash(names, (1, "x"), {})
        assert arguments_hash(names, (1,), {"b": "x"}) == reference
        assert arguments_hash(names, (), {"b": "x", "a": 1}) == reference
        assert arguments_hash(names, (1, "x"), {"z": 2}) != reference

    def test_it_is_the_same_for_ever(self) -> None:
        assert arguments_hash(("to",), ("a@example.org",), {}) == 2115207476163348804

    def test_it_is_the_same_in_every_process(self) -> None:
        found = {
            subprocess.run(
                [sys.executable, "-c", HASH_PROGRAM],
                env={"PYTHONHASHSEED": seed},
                check=True,
                capture_output=True,
                text=True,
            ).stdout
            for seed in ("1", "2", "3")
        }
        assert len(found) == 1

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            (1, 2),
            (1, "1"),
            (1, True),
            (None, "null"),
            ("a", "b"),
            ([1], [1, 1]),
            ({"a": 1}, {"a": 2}),
            ({1: "a"}, {"1": "a"}),
            ({1, 2}, {1, 3}),
            (b"a", b"b"),
            (Decimal("1.0"), Decimal("1.00")),
            (UUID(int=1), UUID(int=2)),
            (date(2026, 1, 1), date(2026, 1, 2)),
            (timedelta(1), timedelta(2)),
            (Line("a"), Line("b")),
            (Address(street="a"), Address(street="b")),
            (Point(1), Point(2)),
            (Path("/a"), Path("/b")),
            (Client("a"), Client("b")),
            (Reference(), Opaque()),
            ([10**5000], [10**5000 + 1]),
        ],
    )
    def test_other_arguments_have_another_hash(self, one: Any, other: Any) -> None:
        for wrap in (lambda x: x, lambda x: [x], lambda x: {"k": x}):
            assert arguments_hash(("a",), (wrap(one),), {}) != arguments_hash(("a",), (wrap(other),), {})

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
            ({"a", "b", "c"}, {"c", "b", "a"}),
            (Reference(), Reference()),
            (Client("a"), Client("a")),
            ([Reference()], [Reference()]),
            (lambda: 1, lambda: 2),
            (["x" * 70_000], ["x" * 70_000 + "y"]),
            (["x" * 100] * 1000, [*["x" * 100] * 1000, "y"]),
            (Word.YES, "yes"),
        ],
    )
    def test_equal_arguments_have_the_same_hash(self, one: Any, other: Any) -> None:
        assert arguments_hash(("a",), (one,), {}) == arguments_hash(("a",), (other,), {})

    def test_names_that_are_used_twice_all_count(self) -> None:
        assert arguments_hash(("a",), (1,), {"a": 2}) != arguments_hash(("a",), (1,), {"a": 3})
        assert arguments_hash(("a",), (1, 2), {}) != arguments_hash(("a",), (1, 3), {})
        assert arguments_hash((), (), {}) == arguments_hash(("a",), (), {})

    def test_a_generator_is_not_consumed(self) -> None:
        generator = (number for number in range(3))
        arguments_hash(("a",), ([generator],), {})
        assert list(generator) == [0, 1, 2]

    def test_it_never_raises(self) -> None:
        class Hostile(str):
            def __getitem__(self, key: Any) -> str:
                raise RuntimeError

        @dataclass
        class Broken:
            a: int

            def __getattribute__(self, name: str) -> Any:
                raise RuntimeError

        cycle: list[Any] = []
        cycle += [cycle, cycle, cycle]
        looping: dict[str, Any] = {}
        looping["self"] = looping
        deep: Any = 1
        for _ in range(5000):
            deep = [deep]
        nested: Any = 1
        for _ in range(5000):
            nested = frozenset({nested})
        for value in (Hostile("a"), Broken(1), cycle, looping, deep, nested, "\ud800", math.nan, type, Line, ...):
            number = arguments_hash(("a",), (value,), {"k": value})
            assert number == arguments_hash(("a",), (value,), {"k": value})

    @given(st.text(), st.integers(), st.lists(st.sets(st.text())))
    def test_it_fits_in_an_int8(self, a: str, b: int, c: list[set[str]]) -> None:
        number = arguments_hash(("a", "b", "c"), (a, b, c), {})
        assert -(2**63) <= number < 2**63
        assert number == arguments_hash(("a", "b", "c"), (), {"c": c, "b": b, "a": a})


def test_importing_the_codec_does_not_import_pydantic() -> None:
    program = "import sys, perdure.codec, perdure.parameters; print('pydantic' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"


def test_no_two_payloads_are_the_same_to_pydantic() -> None:
    # It knows an alias by its name and its address, and takes one at the address of a collected one for that: then a
    # recursive model is refused as circular.
    assert repr(adapter_of(Node)) != repr(adapter_of(Node))
