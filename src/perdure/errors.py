"""The errors of perdure: one class for each thing that a caller would do differently.

    PerdureError
    ├── ConfigurationError        what you set doesn't work: URL, password, rights, server version (CLI: exit code 2)
    │   └── SchemaError           the schema is missing, half-migrated, or newer than this code can work on
    ├── DatabaseUnavailable       no answer for `connect_timeout`; send again, with the same key
    ├── SerializationError        a value that JSON can't carry; nothing was written
    ├── InvalidArguments          arguments that don't fit the workflow's signature
    ├── DuplicateName             two functions of one name in an app
    ├── UnknownWorkflow           a name that the app doesn't have
    ├── UnknownStep               a key that the workflow has recorded nothing under (`fork`, `rewind`)
    ├── WorkflowNotFound          no workflow of that id
    ├── KeyConflict               the key is taken (`on_conflict="raise"`)
    ├── NotInWorkflow             a primitive called where no workflow runs it
    ├── WrongPlace                a verb called where it can't work (blocking in a running loop, ...)
    ├── ReplayMismatch            the code asks for other steps than the ones that were recorded
    ├── ForeignAwait              workflow code waits for what isn't recorded (`App(strict=True)`)
    ├── WrongState                the workflow isn't where that verb could do something with it
    ├── DeadlineExceeded          the workflow hadn't ended when its `timeout=` was over
    ├── RecoveryLimitExceeded     workers kept dying while they ran this workflow
    ├── ResultTimeout             the workflow hasn't ended yet; it goes on
    ├── StepTimeout               an attempt took longer than the step's `timeout=`
    ├── Refused                   a workflow's validator refused a question
    ├── Unanswered                a workflow took a question, and gave no answer
    ├── StepInDoubt               a crash cut an attempt short, and the step says `in_doubt="park"`
    ├── StepFailed                a step failed with an error that this app doesn't know as a class
    └── WorkflowFailed            the same for a workflow
        └── WorkflowCancelled

Every class keeps what it was made with in `args`, so that it survives pickling and can be rebuilt from a record.
`RunEnded` is no error but an order: it unwinds the code of a run that this process no longer holds.
"""

from __future__ import annotations

from uuid import UUID


class PerdureError(Exception):
    """The root of all errors that perdure raises on purpose."""


class ConfigurationError(PerdureError):
    """Something that was set (a URL, a password, rights, a server) doesn't work, and trying again won't help."""


class SchemaError(ConfigurationError):
    """The schema in the database isn't one that this version of perdure can work on."""


class DatabaseUnavailable(PerdureError, ConnectionError):
    """The database gave no answer for as long as the caller was willing to wait.

    Attributes:
        outcome_unknown: A request was under way when the connection went: it may have taken effect.
    """

    def __init__(self, reason: str, outcome_unknown: bool = False) -> None:
        super().__init__(reason, outcome_unknown)
        self.reason = reason
        self.outcome_unknown = outcome_unknown

    def __str__(self) -> str:
        if self.outcome_unknown:
            advice = "it may have taken effect; send it again, with the same key, to be sure"
        else:
            advice = "nothing was written; check that PostgreSQL runs, and send it again"
        return f"the database can't be reached: {self.reason}; {advice}"


class SerializationError(PerdureError, TypeError):
    """A value that JSON can't carry there and back; it was refused before anything was written.

    Attributes:
        where: What the value was for, such as "the result of step 'charge'".
        type_name: The type of the culprit.
        reason: Why, and what to do.
    """

    def __init__(self, where: str, type_name: str, reason: str) -> None:
        super().__init__(where, type_name, reason)
        self.where = where
        self.type_name = type_name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.where} ({self.type_name}) can't be stored: {self.reason}"


class InvalidArguments(PerdureError, TypeError):
    """The arguments don't fit the signature of the workflow.

    Attributes:
        name: The workflow.
        reason: Which argument, and why.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"invalid arguments for workflow {self.name!r}: {self.reason}"


class DuplicateName(PerdureError, ValueError):
    """Two functions of one app have the same name, so a recorded name would be ambiguous."""

    def __init__(self, kind: str, name: str, first: str, second: str) -> None:
        super().__init__(kind, name, first, second)
        self.kind, self.name, self.first, self.second = kind, name, first, second

    def __str__(self) -> str:
        return f"two {self.kind}s are named {self.name!r}: {self.first} and {self.second}; give one of them name=..."


class UnknownWorkflow(PerdureError, LookupError):
    """The app has no workflow of that name."""

    def __init__(self, name: str, known: tuple[str, ...] = ()) -> None:
        super().__init__(name, known)
        self.name = name
        self.known = known

    def __str__(self) -> str:
        known = ", ".join(self.known) if self.known else "none"
        return f"no workflow is named {self.name!r}; this app has: {known} (is a module missing in include=?)"


class UnknownStep(PerdureError, LookupError):
    """The workflow has recorded no step of that key, or none that stays."""

    def __init__(self, workflow_id: UUID, key: str, known: tuple[str, ...] = ()) -> None:
        super().__init__(workflow_id, key, known)
        self.workflow_id = workflow_id
        self.key = key
        self.known = known

    def __str__(self) -> str:
        known = ", ".join(self.known[:20]) + (", ..." if len(self.known) > 20 else "")
        return f"workflow {self.workflow_id} has no step {self.key!r} there; there are: {known or 'none'}"


class WorkflowNotFound(PerdureError, LookupError):
    """No workflow has that id (or it was deleted by retention)."""

    def __init__(self, workflow_id: UUID) -> None:
        super().__init__(workflow_id)
        self.workflow_id = workflow_id

    def __str__(self) -> str:
        return f"there is no workflow {str(self.workflow_id)!r}; check the id and the schema, or retention deleted it"


class KeyConflict(PerdureError, ValueError):
    """The key is taken: a workflow of that name was started under it before.

    Attributes:
        workflow_id: The workflow that holds the key.
    """

    def __init__(self, name: str, key: str, workflow_id: UUID) -> None:
        super().__init__(name, key, workflow_id)
        self.name = name
        self.key = key
        self.workflow_id = workflow_id

    def __str__(self) -> str:
        return (
            f"key {self.key!r} of workflow {self.name!r} is held by {self.workflow_id}; "
            "use another key, or on_conflict='attach'"
        )


class NotInWorkflow(PerdureError, RuntimeError):
    """A primitive of workflow code was called where no workflow runs it."""

    def __init__(self, what: str, advice: str = "call it inside a workflow function") -> None:
        super().__init__(what, advice)
        self.what = what
        self.advice = advice

    def __str__(self) -> str:
        return f"{self.what} was called outside a workflow; {self.advice}"


class WrongPlace(PerdureError, RuntimeError):
    """A verb was called where it can't do its work."""


class ReplayMismatch(PerdureError, RuntimeError):
    """The code asks for something else than what was recorded under that key.

    Attributes:
        key: Where in the workflow.
        recorded: What stands there.
        asked: What the code asked for.
        position: The how-manieth outcome that is; 0: it isn't known.
        recorded_version: The version of the code that recorded it.
        version: The version of the code that asks.
    """

    def __init__(
        self, key: str, recorded: str, asked: str, position: int = 0, recorded_version: str = "", version: str = ""
    ) -> None:
        super().__init__(key, recorded, asked, position, recorded_version, version)
        self.key = key
        self.recorded = recorded
        self.asked = asked
        self.position = position
        self.recorded_version = recorded_version
        self.version = version

    def __str__(self) -> str:
        where = f" (outcome {self.position})" if self.position else ""
        by = f", by version {self.recorded_version}" if self.recorded_version else ""
        now = f" (version {self.version})" if self.version else ""
        return (
            f"replay of {self.key!r}{where}: recorded was {self.recorded}{by}, but the code{now} asks for {self.asked}"
            "; restore the old call, put the new one behind patched(), give the step another name=, or match='name' "
            "if its arguments may differ; then 'perdure workflow resume'"
        )


class ForeignAwait(PerdureError, RuntimeError):
    """A workflow's own code waits for what isn't recorded, so that a replay might take another path.

    Attributes:
        name: The workflow.
        what: What it waits for.
        line: Where, as `file:line in function`.
    """

    def __init__(self, name: str, what: str, line: str) -> None:
        super().__init__(name, what, line)
        self.name = name
        self.what = what
        self.line = line

    def __str__(self) -> str:
        return (
            f"workflow {self.name!r} waits for {self.what} at {self.line}; a replay would begin that anew: "
            "do it in a step, and wait with perdure.sleep() and perdure.timeout()"
        )


class WrongState(PerdureError, RuntimeError):
    """The workflow isn't where that verb could do something with it.

    Attributes:
        workflow_id: The workflow.
        status: Where it stands.
        reason: Why that is in the way, and what to do.
    """

    def __init__(self, workflow_id: UUID, status: str, reason: str) -> None:
        super().__init__(workflow_id, status, reason)
        self.workflow_id = workflow_id
        self.status = status
        self.reason = reason

    def __str__(self) -> str:
        return f"workflow {self.workflow_id} has status {self.status!r}: {self.reason}"


class DeadlineExceeded(PerdureError, TimeoutError):
    """The workflow hadn't ended when its `timeout=` was over.

    Attributes:
        deadline: When that was, in ISO format.
    """

    def __init__(self, deadline: str) -> None:
        super().__init__(deadline)
        self.deadline = deadline

    def __str__(self) -> str:
        return f"the workflow hadn't ended by its deadline, {self.deadline}; give it a longer timeout="


class RecoveryLimitExceeded(PerdureError, RuntimeError):
    """Worker after worker died while it ran this workflow, and none recorded anything new."""

    def __init__(self, recoveries: int) -> None:
        super().__init__(recoveries)
        self.recoveries = recoveries

    def __str__(self) -> str:
        return (
            f"{self.recoveries} workers in a row were lost while they ran this workflow, without any progress; "
            "look for a step that kills its process (memory, a crash in C code)"
        )


class ResultTimeout(PerdureError, TimeoutError):
    """The result wasn't there in time. The workflow goes on; ask again whenever you like."""

    def __init__(self, workflow_id: UUID) -> None:
        super().__init__(workflow_id)
        self.workflow_id = workflow_id

    def __str__(self) -> str:
        return f"workflow {self.workflow_id} hasn't ended yet; it goes on, and result() may be called again"


class StepTimeout(PerdureError, TimeoutError):
    """An attempt at a step took longer than its `timeout=`."""

    def __init__(self, name: str, seconds: float) -> None:
        super().__init__(name, seconds)
        self.name = name
        self.seconds = seconds

    def __str__(self) -> str:
        return f"step {self.name!r} took longer than its timeout of {self.seconds:g} s"


class StepInDoubt(PerdureError):
    """An attempt at a step began, and nobody knows how it ended: its worker died, or let go of it."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name

    def __str__(self) -> str:
        return (
            f"step {self.name!r} began, and nobody recorded how it ended; see whether it took effect, undo that if it "
            "did, and resume the workflow: then the step begins anew"
        )


class Refused(PerdureError):
    """A workflow's validator refused a question: raised by the validator, and at whoever asked."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class Unanswered(PerdureError):
    """The workflow left its `answering()` block without a reply."""

    def __init__(self, topic: str) -> None:
        super().__init__(topic)
        self.topic = topic

    def __str__(self) -> str:
        return f"the workflow took the question of topic {self.topic!r}, and left it without a reply"


class _Failed(PerdureError):
    """What the two kinds of recorded failure share."""

    _what = "it"

    def __init__(self, type: str, message: str, traceback: str = "", attempts: int = 1) -> None:
        super().__init__(type, message, traceback, attempts)
        self.type = type
        self.message = message
        self.traceback = traceback
        self.attempts = attempts


class StepFailed(_Failed):
    """A step failed with an error whose class this app doesn't know.

    Attributes:
        type: The qualified name of the class that was raised.
        message: Its text.
        traceback: Where it was raised, as text.
        attempts: How many attempts were made.
    """

    def __str__(self) -> str:
        return (
            f"{self.type}: {self.message} (after {self.attempts} attempt{'s' if self.attempts != 1 else ''}; "
            f"to catch it as itself, name the class in @step(raises=...) or App(errors=...))"
        )


class WorkflowFailed(_Failed):
    """A workflow failed with an error whose class this app doesn't know.

    Attributes:
        type: The qualified name of the class that was raised.
        message: Its text.
        traceback: Where it was raised, as text.
        attempts: How many attempts were made.
    """

    def __str__(self) -> str:
        return f"{self.type}: {self.message} (to catch it as itself, name the class in App(errors=...))"


class WorkflowCancelled(WorkflowFailed):
    """The workflow was cancelled before it came to an end."""

    def __init__(self, reason: str = "") -> None:
        PerdureError.__init__(self, reason)
        self.type = "perdure.WorkflowCancelled"
        self.message = reason
        self.traceback = ""
        self.attempts = 1

    def __str__(self) -> str:
        return f"the workflow was cancelled{': ' + self.message if self.message else ''}"


class RunEnded(BaseException):
    """This process no longer holds the run: its code must unwind, and nothing that it still asks for is done."""
