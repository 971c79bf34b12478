"""The identity of a step: a path of tasks, its name, and which of that name in that scope.

    charge            the first `charge` of the workflow's own code
    charge#2          the second
    fetch/charge      the first one within the task `fetch`
    fetch#2/charge#3  and so on

So an edit of the code moves only what has the same name in the same task. `$` begins keys of perdure's own.
"""

from __future__ import annotations

from uuid import UUID

from perdure.errors import PerdureError

INPUT = "$input"
RESULT = "$result"
CANCEL = "$cancel"
"""Somebody asks that the workflow ends; `$deadline`: its time is over. `$cancelled`: it has been told."""
DEADLINE = "$deadline"
CANCELLED = "$cancelled"
MAX_NAME = 200


class InvalidName(PerdureError, ValueError):
    """A name that can't be a part of a key."""

    def __init__(self, kind: str, name: str, reason: str) -> None:
        super().__init__(kind, name, reason)
        self.kind, self.name, self.reason = kind, name, reason

    def __str__(self) -> str:
        return f"{self.kind} name {self.name!r} {self.reason}"


def check_name(kind: str, name: object) -> str:
    """The name, if it may be one.

    Raises:
        InvalidName: It is empty, too long, or has a character that keys are made of.
    """
    if not isinstance(name, str) or not name:
        raise InvalidName(kind, str(name), "is no name; use a text of 1 to 200 characters")
    if len(name) > MAX_NAME:
        raise InvalidName(kind, name, f"is longer than {MAX_NAME} characters; shorten it")
    if name.startswith("$") or any(character in "/#\0" or "\ud800" <= character <= "\udfff" for character in name):
        raise InvalidName(kind, name, "must not begin with '$', nor contain '/', '#' or NUL; use another character")
    return name


def segment(name: str) -> str:
    """A task's name as a segment of a path: what keys are made of is escaped, what is long is cut."""
    escaped = name.replace("%", "%25").replace("/", "%2F").replace("#", "%23").replace("\0", "%00").replace("$", "%24")
    return escaped[:MAX_NAME].encode("utf-8", "replace").decode()


def occurrence(name: str, count: int) -> str:
    """`name`, for its first occurrence; `name#2`, `name#3`, ... for the others."""
    return name if count == 1 else f"{name}#{count}"


def attempt_key(key: str, attempt: int) -> str:
    """Where a failed attempt at a step is recorded. `#` isn't followed by `a` in any other key."""
    return f"{key}#a{attempt}"


def attempted_key(key: str) -> str:
    """The key of the step that an attempt was at."""
    return key.rpartition("#a")[0]


def intent_key(key: str, attempt: int) -> str:
    """Where it is recorded that an attempt at a step is about to begin."""
    return f"{key}#i{attempt}"


def intended_key(key: str) -> str:
    """The key of the step that such an attempt is at."""
    return key.rpartition("#i")[0]


def event_topic(owner: UUID, name: str) -> str:
    """The topic of the message that tells of an event of another workflow. No topic of an author's begins with `$`."""
    return f"$event {owner} {name}"


def answer_name(question: UUID) -> str:
    """The name of the event that is the answer to a question."""
    return f"$answer {question}"


def timer_key(key: str) -> str:
    """Where it is recorded that a wait began, and when it is over; `key` is for its end."""
    return f"{key}#t"


def waited_key(key: str) -> str:
    """The key of the wait whose beginning this is."""
    return key.removesuffix("#t")


def child_key(key: str) -> str:
    """Where it is recorded which child was started; `key` is for how it ended."""
    return f"{key}#c"


def parent_key(key: str) -> str:
    """The key for how the child ended that this is the start of."""
    return key.removesuffix("#c")
