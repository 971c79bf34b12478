"""perdure: durable workflows in Python, with PostgreSQL as the only orchestrator."""

from perdure.app import App
from perdure.authoring.asking import Question, answering
from perdure.authoring.attributes import set_attributes
from perdure.authoring.completion import as_completed
from perdure.authoring.context import current
from perdure.authoring.continuing import continue_as_new
from perdure.authoring.events import get_event, set_event
from perdure.authoring.mapping import map
from perdure.authoring.messages import recv, send
from perdure.authoring.primitives import now, patched, random, run_step, sleep, sleep_until, timeout, uuid4
from perdure.authoring.sagas import Saga, saga
from perdure.authoring.steps import Step, step
from perdure.authoring.streams import write_stream
from perdure.authoring.workflows import Invocation, Workflow, workflow
from perdure.client import Client
from perdure.codec import Codec
from perdure.errors import (
    ConfigurationError,
    DatabaseUnavailable,
    DeadlineExceeded,
    DuplicateName,
    ForeignAwait,
    InvalidArguments,
    KeyConflict,
    NotInWorkflow,
    PerdureError,
    RecoveryLimitExceeded,
    Refused,
    ReplayMismatch,
    ResultTimeout,
    SchemaError,
    SerializationError,
    StepFailed,
    StepInDoubt,
    StepTimeout,
    Unanswered,
    UnknownStep,
    UnknownWorkflow,
    WorkflowCancelled,
    WorkflowFailed,
    WorkflowNotFound,
    WrongPlace,
    WrongState,
)
from perdure.handle import Handle
from perdure.model.records import StepInfo, WorkflowInfo
from perdure.model.retry import Rerun, Retry, RetryAfter
from perdure.model.statuses import Status
from perdure.starts import Start
from perdure.streams import StreamEntry, StreamReset

__version__ = "0.1.0"

__all__ = [
    "App",
    "Client",
    "Codec",
    "ConfigurationError",
    "DatabaseUnavailable",
    "DeadlineExceeded",
    "DuplicateName",
    "ForeignAwait",
    "Handle",
    "InvalidArguments",
    "Invocation",
    "KeyConflict",
    "NotInWorkflow",
    "PerdureError",
    "Question",
    "RecoveryLimitExceeded",
    "Refused",
    "ReplayMismatch",
    "Rerun",
    "ResultTimeout",
    "Retry",
    "RetryAfter",
    "Saga",
    "SchemaError",
    "SerializationError",
    "Start",
    "Status",
    "Step",
    "StepFailed",
    "StepInDoubt",
    "StepInfo",
    "StepTimeout",
    "StreamEntry",
    "StreamReset",
    "Unanswered",
    "UnknownStep",
    "UnknownWorkflow",
    "Workflow",
    "WorkflowCancelled",
    "WorkflowFailed",
    "WorkflowInfo",
    "WorkflowNotFound",
    "WrongPlace",
    "WrongState",
    "answering",
    "as_completed",
    "continue_as_new",
    "current",
    "get_event",
    "map",
    "now",
    "patched",
    "random",
    "recv",
    "run_step",
    "saga",
    "send",
    "set_attributes",
    "set_event",
    "sleep",
    "sleep_until",
    "step",
    "timeout",
    "uuid4",
    "workflow",
    "write_stream",
]
