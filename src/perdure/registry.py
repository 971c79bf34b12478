"""What an app knows: its workflows by name, their steps, the errors that it can raise as themselves."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any, cast

from perdure.authoring.steps import Step
from perdure.authoring.workflows import Workflow
from perdure.errors import DuplicateName, UnknownWorkflow
from perdure.failures import Catalogue
from perdure.model.versions import version_of


class Registry:
    """Collects functions: those that are declared at once, those of `include=` at first use."""

    def __init__(self, include: Iterable[Any], errors: Iterable[type[Exception]]) -> None:
        self._pending: list[Any] = [include] if isinstance(include, str | ModuleType) else list(include)
        self._workflows: dict[str, Workflow[..., Any]] = {}
        self._modules: dict[str, ModuleType] = {}
        self.catalogue = Catalogue(errors)

    def add(self, workflow: Workflow[..., Any]) -> None:
        """One more workflow.

        Raises:
            DuplicateName: Another function has its name.
        """
        other = self._workflows.setdefault(workflow.name, workflow)
        if other is not workflow:
            raise DuplicateName("workflow", workflow.name, _place(other), _place(workflow))

    @property
    def workflows(self) -> dict[str, Workflow[..., Any]]:
        """All workflows, by name.

        Raises:
            DuplicateName: Two functions of one name, workflows or steps.
        """
        while self._pending:
            self._include(self._pending[0])
            del self._pending[0]
        return self._workflows

    def workflow(self, name: str) -> Workflow[..., Any]:
        """The workflow of that name.

        Raises:
            UnknownWorkflow: There is none.
        """
        try:
            return self.workflows[name]
        except KeyError:
            raise UnknownWorkflow(name, tuple(sorted(self._workflows))) from None

    @property
    def steps(self) -> dict[str, Step[..., Any]]:
        """The steps that stand in the modules of the workflows, by name.

        Raises:
            DuplicateName: Two functions of one name.
        """
        modules = dict(self._modules)
        for workflow in self.workflows.values():
            module = sys.modules.get(workflow.fn.__module__)
            if module is not None:
                modules[module.__name__] = module
        steps: dict[str, Step[..., Any]] = {}
        for step in (step for module in modules.values() for step in _of(module, Step)):
            other = steps.setdefault(step.name, step)
            if inspect.unwrap(other.fn) is not inspect.unwrap(step.fn):
                raise DuplicateName("step", step.name, _place(other), _place(step))
        return steps

    @property
    def version(self) -> str:
        """A hash of the code of all workflows and steps."""
        functions = [workflow.fn for workflow in self.workflows.values()]
        return version_of([*functions, *(step.fn for step in self.steps.values())])

    def _include(self, what: Any) -> None:
        if isinstance(what, Workflow):
            self.add(cast("Workflow[..., Any]", what))
            return
        module = importlib.import_module(what) if isinstance(what, str) else what
        if not isinstance(module, ModuleType):
            raise TypeError(f"include= takes modules, their names, and workflows, not {type(what).__name__}")
        self._modules[module.__name__] = module
        for workflow in _of(module, Workflow):
            self.add(workflow)


def _of(module: ModuleType, kind: type[Any]) -> list[Any]:
    """The values of that type that stand in a module."""
    return [value for value in list(vars(module).values()) if isinstance(value, kind)]


def _place(function: Any) -> str:
    return f"{function.fn.__module__}.{function.fn.__qualname__}"
