"""Exceptions become records whatever they are, and records become exceptions whatever they hold."""

from __future__ import annotations

import builtins
import json
import os
from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perdure import errors, failures
from perdure.errors import (
    ConfigurationError,
    DatabaseUnavailable,
    KeyConflict,
    PerdureError,
    ResultTimeout,
    StepFailed,
    StepTimeout,
    UnknownWorkflow,
    WorkflowCancelled,
    WorkflowFailed,
)
from perdure.failures import Catalogue, qualified_name, record

MOST = 72 * 1024


class CardDeclined(Exception):
    pass


class OutOfStock(CardDeclined):
    """Its constructor takes other arguments than those it hands on."""

    def __init__(self, sku: str, left: int) -> None:
        super().__init__(f"{sku}: {left} left")
        self.sku = sku
        self.left = left


class KeywordOnly(Exception):
    def __init__(self, *, code: int) -> None:
        super().__init__("code", code)
        self.code = code


class Prefixed(Exception):
    """Its constructor takes what it has handed on for what it was given."""

    def __init__(self, code: str) -> None:
        super().__init__(f"error {code}")
        self.code = code


class HoldsAnObject(Exception):
    def __init__(self, thing: object, reason: str = "") -> None:
        super().__init__(thing)
        if reason:
            self.reason = reason


class Nested:
    class Failed(Exception):
        pass


class NoText(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class ExitsWhenShown(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)


class NoArgs(Exception):
    @property
    def args(self) -> Any:  # type: ignore[override]
        raise RuntimeError("no args")


class NoDict(Exception):
    @property
    def __dict__(self) -> Any:  # type: ignore[override]
        raise RuntimeError("no dict")


CATALOGUE = Catalogue([CardDeclined, OutOfStock, KeywordOnly, Prefixed, HoldsAnObject, Nested.Failed, NoText])


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


def recorded(error: BaseException, attempts: int = 1) -> dict[str, Any]:
    text = record(error, attempts)
    assert len(text.encode()) <= MOST
    assert "\0" not in text
    assert "\\u0000" not in text
    row: dict[str, Any] = json.loads(text)
    return row


def rebuilt(error: BaseException, catalogue: Catalogue = CATALOGUE) -> Exception:
    return catalogue.rebuild(record(raised(error)), StepFailed)


class TestRecords:
    def test_it_has_everything_about_an_ordinary_error(self) -> None:
        row = recorded(raised(OutOfStock("apple", 3)), attempts=4)
        assert row.pop("traceback").startswith("Traceback (most recent call last):\n")
        assert row == {
            "type": f"{__name__}.OutOfStock",
            "message": "apple: 3 left",
            "args": ["apple: 3 left"],
            "state": {"sku": "apple", "left": 3},
            "attempts": 4,
        }

    def test_the_type_is_the_qualified_name(self) -> None:
        assert recorded(ValueError())["type"] == "builtins.ValueError"
        assert recorded(Nested.Failed())["type"] == f"{__name__}.Nested.Failed"

    @pytest.mark.parametrize(
        "argument",
        [
            object(),
            (1,),
            {1},
            b"x",
            float("nan"),
            float("inf"),
            "\0",
            "\ud800",
            {1: 2},
            [[(1,)]],
            [10**5000],
            "x" * 40_000,
        ],
    )
    def test_args_that_are_not_exactly_json_are_left_out(self, argument: object) -> None:
        row = recorded(ValueError(argument))
        assert "args" not in row
        assert "state" not in row

    def test_state_that_is_not_exactly_json_is_left_out(self) -> None:
        error = ValueError(1)
        error.detail = {"a": object()}  # type: ignore[attr-defined]
        assert "state" not in recorded(error)

    @pytest.mark.parametrize("size", [10_000_000, 8 * 1024 + 1, 8 * 1024])
    @pytest.mark.parametrize("letter", ["x", "é", "😀", "\x01", "\0", "\ud800", '"'])
    def test_a_long_message_is_cut_and_says_so(self, size: int, letter: str) -> None:
        row = recorded(raised(ValueError(letter * size)))
        if size > 8 * 1024:
            assert f"of {size} characters cut" in row["message"]
        assert len(json.dumps(row["message"], ensure_ascii=False).encode()) < 8 * 1024 + 100

    def test_a_long_traceback_keeps_its_end(self) -> None:
        trace = recorded(raised(ValueError("\n".join(map(str, range(10_000))))))["traceback"]
        assert "characters cut" in trace.splitlines()[0]
        assert trace.endswith("\n9999\n")
        assert len(trace) < 17 * 1024

    def test_what_postgres_cannot_store_is_replaced(self) -> None:
        row = recorded(raised(ValueError("a\0b\ud800c")))
        assert row["message"] == "a\ufffdb\ufffdc"

    def test_causes_and_contexts_are_in_the_traceback(self) -> None:
        try:
            try:
                {}["sku"]  # type: ignore[index]
            except KeyError as cause:
                raise CardDeclined("no") from cause
        except CardDeclined as error:
            trace = recorded(error)["traceback"]
        assert "KeyError: 'sku'" in trace
        assert "direct cause" in trace
        assert trace.rstrip().endswith("CardDeclined: no")

    def test_groups_tell_of_their_children(self) -> None:
        inner = ExceptionGroup("inner", [KeyError("deep")])
        row = recorded(raised(ExceptionGroup("outer", [raised(ValueError("one")), inner])))  # type: ignore[list-item]
        assert row["message"].startswith("outer (2 sub-exceptions): builtins.ValueError: one; ")
        assert "builtins.KeyError: 'deep'" in row["message"]
        assert "KeyError: 'deep'" in row["traceback"]
        recorded(ExceptionGroup("many", [ValueError("x" * 1000)] * 5000))
        deep: Exception = ValueError()
        for _ in range(3000):
            deep = ExceptionGroup("g", [deep])
        recorded(deep)

    def test_frames_of_perdure_itself_are_hidden(self) -> None:
        def user_code() -> None:
            raise ValueError("from user code")

        own = os.path.join(os.path.dirname(failures.__file__), "engine", "made_up.py")
        scope: dict[str, Any] = {"call": user_code}
        exec(compile("def run():\n    call()\n", own, "exec"), scope)
        try:
            try:
                scope["run"]()
            except ValueError as cause:
                raise ExceptionGroup("g", [cause]) from cause
        except ExceptionGroup as error:
            trace = recorded(error)["traceback"]
        assert "made_up.py" not in trace
        assert "user_code" in trace

    @pytest.mark.parametrize(
        "error", [NoText(), ExitsWhenShown(), NoDict("x"), NoArgs("x"), KeyboardInterrupt(), SystemExit(1)]
    )
    def test_nothing_that_an_exception_does_makes_it_raise(self, error: BaseException) -> None:
        row = recorded(raised(error))
        assert row["type"] == qualified_name(type(error))
        assert isinstance(row["message"], str)

    def test_recursion_is_recorded(self) -> None:
        def forever() -> None:
            forever()

        with pytest.raises(RecursionError) as caught:
            forever()
        assert recorded(caught.value)["type"] == "builtins.RecursionError"

    def test_an_exception_that_causes_itself_is_recorded(self) -> None:
        one, other = ValueError("one"), ValueError("other")
        one.__cause__, other.__cause__ = other, one
        assert "one" in recorded(one)["traceback"]

    @given(st.lists(st.text() | st.integers() | st.binary() | st.floats() | st.none()), st.text())
    def test_any_arguments_can_be_recorded(self, args: list[Any], note: str) -> None:
        error = CardDeclined(*args)
        error.add_note(note)
        row = recorded(error)
        if "args" in row:
            assert row["args"] == args


class TestRebuilding:
    @pytest.mark.parametrize(
        "error",
        [
            ValueError("no"),
            ValueError(),
            KeyError("sku"),
            ZeroDivisionError("division by zero"),
            TimeoutError(),
            FileNotFoundError(2, "No such file or directory", "/nowhere"),
            FileExistsError(17, "File exists", "/a", None, "/b"),
            OSError("only a text"),
            PermissionError(1, "denied"),
            UnicodeEncodeError("ascii", "é", 0, 1, "ordinal not in range(128)"),
            RuntimeError("a", 1, [None, {"b": 2.5}]),
            CardDeclined("no", {"code": 5}),
            OutOfStock("apple", 3),
            KeywordOnly(code=5),
            Prefixed("x"),
            HoldsAnObject("plain"),
            Nested.Failed("x"),
            KeyConflict("checkout", "order-42", UUID(int=7)),
            ResultTimeout(UUID(int=7)),
            UnknownWorkflow("a", ("b", "c")),
            StepTimeout("a", 1.5),
            StepFailed("a.B", "no", "Traceback ...", 3),
            WorkflowFailed("a.B", "no"),
            WorkflowCancelled("because"),
            ConfigurationError("no"),
            DatabaseUnavailable("no answer", True),
        ],
    )
    def test_it_is_the_same_again(self, error: Exception) -> None:
        again = rebuilt(error)
        assert type(again) is type(error)
        assert str(again) == str(error)
        assert again.args == error.args
        for name, value in vars(error).items():
            assert name == "__notes__" or getattr(again, name) == value

    def test_it_survives_any_number_of_rounds(self) -> None:
        again: Exception = OutOfStock("apple", 3)
        for _ in range(3):
            again = rebuilt(again)
        assert isinstance(again, OutOfStock)
        assert (str(again), again.sku, again.left) == ("apple: 3 left", "apple", 3)

    def test_it_carries_its_recorded_traceback(self) -> None:
        for error in (OutOfStock("apple", 3), ExitsWhenShown()):
            (note,) = rebuilt(error).__notes__
            assert note.startswith("recorded traceback:\nTraceback (most recent call last):")

    def test_state_alone_is_enough(self) -> None:
        again = rebuilt(HoldsAnObject(object(), "late"))
        assert isinstance(again, HoldsAnObject)
        assert again.reason == "late"
        assert isinstance(rebuilt(HoldsAnObject(object())), StepFailed)

    def test_an_unknown_class_becomes_the_fallback(self) -> None:
        text = record(raised(CardDeclined("no")), attempts=3)
        for fallback in (StepFailed, WorkflowFailed):
            error = Catalogue().rebuild(text, fallback)
            assert type(error) is fallback
            assert isinstance(error, (StepFailed, WorkflowFailed))
            assert (error.type, error.message, error.attempts) == (f"{__name__}.CardDeclined", "no", 3)
            assert "CardDeclined: no" in error.traceback
            assert isinstance(error, PerdureError)

    @pytest.mark.parametrize(
        "error",
        [
            StopIteration(1),
            StopAsyncIteration(),
            KeyboardInterrupt(),
            SystemExit(1),
            GeneratorExit(),
            ExceptionGroup("g", [ValueError()]),
            BaseExceptionGroup("g", [KeyboardInterrupt()]),
            ValueError(object()),
            errors.RunEnded(),
        ],
    )
    def test_what_cannot_be_raised_again_becomes_the_fallback(self, error: BaseException) -> None:
        again = rebuilt(error)
        assert isinstance(again, StepFailed)
        assert again.type == qualified_name(type(error))

    def test_a_subclass_of_stop_iteration_is_not_let_into_a_coroutine(self) -> None:
        class Done(StopIteration):
            pass

        assert isinstance(rebuilt(Done(1), Catalogue([Done])), StepFailed)

    @pytest.mark.parametrize(
        "name", [name for name in vars(builtins) if name.endswith(("Error", "Warning", "Exception"))]
    )
    def test_every_builtin_is_rebuilt_or_replaced(self, name: str) -> None:
        for args in ([], ["x"], [1, "x"], [None] * 5, ["x"] * 7, [[], {}]):
            error = CATALOGUE.rebuild({"type": f"builtins.{name}", "message": "m", "args": args}, StepFailed)
            assert isinstance(error, (getattr(builtins, name), StepFailed))
            str(error)
            repr(error)

    @pytest.mark.parametrize(
        "name",
        ["os.system", "builtins.eval", "builtins.object", "builtins.BaseException", "subprocess.Popen", "perdure"],
    )
    def test_no_class_is_looked_up_by_a_name_in_a_row(self, name: str) -> None:
        error = CATALOGUE.rebuild({"type": name, "message": "m", "args": ["echo"]}, StepFailed)
        assert isinstance(error, StepFailed)
        assert error.type == name

    @pytest.mark.parametrize(
        "row",
        [
            "",
            "null",
            "[]",
            "{",
            "7",
            '"x"',
            "[" * 100_000,
            "{}",
            '{"type":null}',
            '{"type":["builtins.ValueError"]}',
            '{"type":{"a":1},"message":7,"traceback":[],"attempts":"x"}',
            '{"type":"builtins.ValueError"}',
            '{"type":"builtins.ValueError","args":{"a":1}}',
            '{"type":"builtins.ValueError","args":"abc"}',
            '{"type":"builtins.UnicodeDecodeError","args":["a","b",0,1,"c"]}',
            '{"type":"builtins.ExceptionGroup","args":["a",[1]]}',
            '{"type":"perdure.errors.KeyConflict","args":[1,2,3]}',
            '{"type":"perdure.errors.KeyConflict","args":["a","b","no uuid"]}',
            '{"type":"perdure.errors.UnknownWorkflow","args":["a",7]}',
            '{"type":"perdure.errors.RunEnded","args":[]}',
            '{"type":"perdure.errors._Failed","args":["a","b"]}',
        ],
    )
    def test_malformed_rows_give_the_fallback(self, row: str) -> None:
        error = CATALOGUE.rebuild(row, WorkflowFailed)
        assert type(error) is WorkflowFailed
        assert str(error)

    @pytest.mark.parametrize("state", [7, [], "x", {"args": 1}, {"__class__": "x"}, {"__notes__": 1}, {"add_note": 1}])
    def test_malformed_state_does_no_harm(self, state: Any) -> None:
        row = {"type": f"{__name__}.OutOfStock", "message": "m", "args": ["m"], "state": state, "traceback": "t"}
        error = CATALOGUE.rebuild(row, StepFailed)
        assert isinstance(error, OutOfStock)
        assert error.__notes__ == ["recorded traceback:\nt"]

    @given(
        st.fixed_dictionaries(
            {},
            optional={
                "type": st.sampled_from(["builtins.OSError", "builtins.KeyError", f"{__name__}.OutOfStock", "x"])
                | st.integers(),
                "message": st.text() | st.none(),
                "args": st.lists(st.text() | st.integers() | st.none()) | st.dictionaries(st.text(), st.text()),
                "state": st.dictionaries(st.text(), st.text() | st.integers()) | st.lists(st.text()),
                "traceback": st.text() | st.integers(),
                "attempts": st.integers() | st.text() | st.booleans(),
            },
        )
    )
    def test_any_row_gives_an_exception(self, row: dict[str, Any]) -> None:
        for given_row in (row, json.dumps(row)):
            error = CATALOGUE.rebuild(given_row, StepFailed)
            assert isinstance(error, (OSError, KeyError, OutOfStock, StepFailed))
            assert json.loads(record(error))

    @given(st.text(), st.integers(), st.dictionaries(st.text(), st.none() | st.text() | st.lists(st.integers())))
    def test_exact_arguments_survive(self, text: str, number: int, detail: dict[str, Any]) -> None:
        error = CardDeclined(text, number, detail)
        again = rebuilt(error)
        if "args" in json.loads(record(error)):
            assert type(again) is CardDeclined
            assert again.args == error.args
        else:
            assert isinstance(again, StepFailed)


class TestCatalogues:
    def test_extending_leaves_the_first_one_as_it_was(self) -> None:
        first = Catalogue()
        second = first.extended([CardDeclined])
        assert isinstance(rebuilt(CardDeclined("x"), first), StepFailed)
        assert isinstance(rebuilt(CardDeclined("x"), second), CardDeclined)

    @pytest.mark.parametrize("what", [KeyboardInterrupt, int, "ValueError", ValueError("x"), None])
    def test_only_classes_of_exceptions_are_taken(self, what: Any) -> None:
        with pytest.raises(ConfigurationError, match="no class of exceptions"):
            Catalogue([what])

    def test_it_knows_all_of_perdure(self) -> None:
        for cls in vars(errors).values():
            if isinstance(cls, type) and issubclass(cls, PerdureError) and not cls.__name__.startswith("_"):
                assert qualified_name(cls) in Catalogue()._classes


def _syntax_error() -> SyntaxError:
    try:
        compile("leading = 007", "program.py", "exec")
    except SyntaxError as error:
        return error
    raise AssertionError


def _decode_error() -> UnicodeDecodeError:
    try:
        b"\xff".decode()
    except UnicodeDecodeError as error:
        return error
    raise AssertionError


@pytest.mark.parametrize("make", [_syntax_error, _decode_error])
def test_built_in_errors_whose_arguments_are_no_json_come_back_as_themselves(make: Callable[[], Exception]) -> None:
    error = make()
    rebuilt = Catalogue().rebuild(record(error), StepFailed)
    assert type(rebuilt) is type(error)
    assert rebuilt.args == error.args
    assert str(rebuilt) == str(error)
