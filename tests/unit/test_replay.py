"""What a replay shows: the decisions of `judge`, without an engine."""

from __future__ import annotations

import json
from uuid import UUID

import pytest

from perdure.model.records import Recorded
from perdure.model.replay import History, Replayed, Rest, Verdict, judge

ID = UUID(int=1)


def recorded(
    key: str, position: int = 1, *, kind: str = "step", status: str = "success", payload: str | None = "1"
) -> Recorded:
    return Recorded(key, kind, position, status, payload, 0, 1, None, "v1")


def failure(type: str = "builtins.ValueError", message: str = "no", *args: object) -> str:
    return json.dumps({"type": type, "message": message, "args": args})


def ended(status: str = "success", payload: str | None = "7") -> Recorded:
    return recorded("$result", 0, kind="result", status=status, payload=payload)


def judged(
    rest: Rest,
    *outcomes: Recorded,
    result: Recorded | None = None,
    left: tuple[str, ...] = (),
    new: dict[str, str] | None = None,
) -> Replayed:
    history = History(workflow_id=ID, name="flow", outcomes=outcomes, result=result)
    return judge(history, rest, {each.key: each for each in outcomes if each.key in left}, new or {})


WAITS = Rest(note="it waits: timer")
RETURNS = Rest(note="it comes to its end", status="success", payload="7")
RAISES = Rest(note="it comes to its end", status="error", payload=failure())


def test_what_waits_where_it_waited_matches() -> None:
    assert judged(WAITS, recorded("a")) == Replayed(
        workflow_id=ID, name="flow", verdict=Verdict.MATCHES, note="it waits: timer"
    )


def test_what_goes_on_with_something_new_behind_its_history_matches() -> None:
    rest = Rest(note="it goes on with step 'b'")
    said = judged(rest, recorded("a"), new={"b": "step 'b'"})
    assert (said.verdict, said.note) == (Verdict.MATCHES, "it goes on with step 'b'")


@pytest.mark.parametrize("payload", ["7", " 7 ", "7.0"])
def test_the_same_result_matches_however_it_is_written(payload: str) -> None:
    assert judged(RETURNS, result=ended(payload=payload)).verdict is Verdict.MATCHES


def test_a_result_of_none_is_the_same_as_none() -> None:
    rest = Rest(note="it comes to its end", status="success", payload="null")
    assert judged(rest, result=ended(payload=None)).verdict is Verdict.MATCHES


def test_another_result_differs() -> None:
    said = judged(RETURNS, result=ended(payload="8"))
    assert (said.verdict, said.key, said.recorded, said.asked, said.version) == (
        Verdict.DIFFERS,
        "$result",
        "the result 8",
        "the result 7",
        "v1",
    )
    assert said.note == "it comes to another end"


def test_what_had_ended_and_waits_now_differs() -> None:
    said = judged(WAITS, result=ended())
    assert (said.verdict, said.note, said.asked) == (Verdict.DIFFERS, "it doesn't end", "it waits: timer")


def test_the_first_of_what_is_not_asked_for_any_more_is_named() -> None:
    said = judged(WAITS, recorded("a"), recorded("c", 3), recorded("b", 2), left=("c", "b"))
    assert (said.verdict, said.key, said.position, said.recorded) == (Verdict.DIFFERS, "b", 2, "step 'b'")
    assert (said.note, said.asked, said.version) == ("the code doesn't ask for it any more", "", "v1")


def test_what_is_asked_for_instead_is_named() -> None:
    said = judged(WAITS, recorded("a"), left=("a",), new={"x": "step 'x'", "y": "step 'y'"})
    assert (said.verdict, said.asked) == (Verdict.DIFFERS, "step 'x'")
    assert said.note == "the code asks for something new first"


def test_a_step_of_a_task_is_called_by_its_name() -> None:
    assert judged(WAITS, recorded("task#2/a#3"), left=("task#2/a#3",)).recorded == "step 'a'"


def test_what_is_recorded_and_is_no_step_is_called_by_its_kind() -> None:
    assert judged(WAITS, recorded("sleep", kind="sleep"), left=("sleep",)).recorded == "a sleep"


def test_a_mismatch_that_the_run_found_is_told_with_its_place() -> None:
    found = failure("perdure.errors.ReplayMismatch", "...", "a", "step 'a'", "step 'b'", 4, "v1", "v2")
    rest = Rest(note="it comes to its end", status="error", payload=found)
    said = judged(rest, recorded("a", 4), left=("a",))
    assert (said.verdict, said.key, said.position) == (Verdict.MISMATCH, "a", 4)
    assert (said.recorded, said.asked, said.version) == ("step 'a'", "step 'b'", "v1")


def test_a_mismatch_without_details_is_one_all_the_same() -> None:
    rest = Rest(note="", status="error", payload='{"type": "perdure.errors.ReplayMismatch", "args": null}')
    assert judged(rest).verdict is Verdict.MISMATCH


def test_what_had_succeeded_and_fails_now_is_a_mismatch() -> None:
    said = judged(RAISES, recorded("a"), result=ended())
    assert (said.verdict, said.recorded, said.asked) == (
        Verdict.MISMATCH,
        "the result 7",
        "builtins.ValueError: no",
    )


def test_what_was_going_on_and_fails_now_is_a_mismatch() -> None:
    said = judged(RAISES, recorded("a"))
    assert (said.verdict, said.asked) == (Verdict.MISMATCH, "builtins.ValueError: no")


def test_what_was_about_to_fail_because_of_a_step_may_fail() -> None:
    failed = recorded("a", status="error", payload=failure())
    of_it = Rest(note="", status="error", payload=json.dumps({**json.loads(failure()), "steps": ["a"]}))
    assert judged(of_it, failed).verdict is Verdict.MATCHES


def test_what_was_about_to_go_on_behind_a_failed_step_may_not_fail_of_something_else() -> None:
    failed = recorded("a", status="error", payload=failure())
    assert judged(RAISES, failed).verdict is Verdict.MISMATCH


def test_a_failed_attempt_is_no_failed_step() -> None:
    attempt = recorded("a#a1", kind="attempt", status="error", payload=failure())
    assert judged(RAISES, attempt).verdict is Verdict.MISMATCH


def test_the_same_kind_of_failure_matches_whatever_it_says() -> None:
    assert judged(RAISES, result=ended("error", failure(message="yes"))).verdict is Verdict.MATCHES


def test_another_kind_of_failure_differs() -> None:
    said = judged(RAISES, result=ended("error", failure("builtins.KeyError", "yes")))
    assert (said.verdict, said.recorded, said.asked) == (
        Verdict.DIFFERS,
        "builtins.KeyError: yes",
        "builtins.ValueError: no",
    )


def test_what_had_failed_and_succeeds_now_differs() -> None:
    assert judged(RETURNS, result=ended("error", failure())).verdict is Verdict.DIFFERS


@pytest.mark.parametrize(
    "name", ["DeadlineExceeded", "ForeignAwait", "RecoveryLimitExceeded", "ReplayMismatch", "WorkflowCancelled"]
)
@pytest.mark.parametrize("rest", [WAITS, RETURNS, RAISES], ids=["waits", "returns", "raises"])
def test_what_was_ended_from_outside_has_no_end_to_compare(name: str, rest: Rest) -> None:
    status = "cancelled" if name == "WorkflowCancelled" else "error"
    result = ended(status, failure(f"perdure.errors.{name}"))
    assert judged(rest, result=result).verdict is Verdict.MATCHES


def test_what_was_ended_from_outside_must_have_asked_for_all_that_it_had() -> None:
    result = ended("cancelled", failure("perdure.errors.WorkflowCancelled"))
    assert judged(WAITS, recorded("a"), result=result, left=("a",)).verdict is Verdict.DIFFERS


@pytest.mark.parametrize("payload", ["", "no json", "[]", "null", "3"])
def test_a_failure_that_was_edited_by_hand_is_compared_all_the_same(payload: str) -> None:
    rest = Rest(note="it comes to its end", status="error", payload=failure())
    said = judged(rest, result=ended("error", payload or "null"))
    assert (said.verdict, said.recorded) == (Verdict.DIFFERS, "error: ")
