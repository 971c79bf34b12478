"""The package has the names and the parameters of its contract, `tests/typing/api.pyi`."""

from __future__ import annotations

import ast
import inspect
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import perdure

CONTRACT = ast.parse((Path(__file__).parents[1] / "typing" / "api.pyi").read_text())
CLASSES = [node for node in CONTRACT.body if isinstance(node, ast.ClassDef)]

MANAGEMENT = "managing workflows comes later"
VERSIONS = "versions and patches come later"
TYPES = "a type, for checkers; its attributes are documented where it is implemented"
LATER: dict[str, str] = {
    # names
    "Json": TYPES,
    "Current": TYPES,
    "StepDecorator": TYPES,
    "WorkflowDecorator": TYPES,
    "TransactionDecorator": TYPES,
}


class Parameter(NamedTuple):
    name: str
    kind: str
    has_default: bool


Parameters = tuple[Parameter, ...]


def written(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Parameters:
    """The parameters of a function in the contract."""
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    without = len(positional) - len(arguments.defaults)
    found = [
        Parameter(each.arg, "/" if each in arguments.posonlyargs else "", number >= without)
        for number, each in enumerate(positional)
    ]
    if arguments.vararg is not None:
        found.append(Parameter(arguments.vararg.arg, "*args", False))
    found += [
        Parameter(each.arg, "*", default is not None)
        for each, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    if arguments.kwarg is not None:
        found.append(Parameter(arguments.kwarg.arg, "**kwargs", False))
    return tuple(each for each in found if each.name != "self")


def real(function: Callable[..., Any]) -> Parameters:
    """The parameters of a function in the package."""
    kinds = {
        inspect.Parameter.POSITIONAL_ONLY: "/",
        inspect.Parameter.POSITIONAL_OR_KEYWORD: "",
        inspect.Parameter.VAR_POSITIONAL: "*args",
        inspect.Parameter.KEYWORD_ONLY: "*",
        inspect.Parameter.VAR_KEYWORD: "**kwargs",
    }
    return tuple(
        Parameter(each.name, kinds[each.kind], each.default is not inspect.Parameter.empty)
        for each in inspect.signature(function).parameters.values()
        if each.name != "self"
    )


class Function(NamedTuple):
    path: str
    is_async: bool
    is_property: bool
    parameters: Parameters

    @property
    def owner(self) -> Any:
        holder, _, _ = self.path.rpartition(".")
        return getattr(perdure, holder) if holder else perdure

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]


def functions() -> Iterator[Function]:
    """The functions and methods of the contract, one for each overload."""
    for node in CONTRACT.body:
        holders = [("", node)]
        if isinstance(node, ast.ClassDef):
            holders = [(f"{node.name}.", member) for member in node.body]
        for prefix, member in holders:
            if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef):
                decorators = {getattr(each, "id", "") for each in member.decorator_list}
                yield Function(
                    prefix + member.name,
                    isinstance(member, ast.AsyncFunctionDef),
                    "property" in decorators,
                    written(member),
                )


def is_due(path: str) -> bool:
    return path not in LATER and path.partition(".")[0] not in LATER


FUNCTIONS = [each for each in functions() if is_due(each.path)]
NAMES = {each.name for each in CLASSES} | {each.path for each in FUNCTIONS if "." not in each.path}

each_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda each: f"{each.path}-{len(each.parameters)}")
each_class = pytest.mark.parametrize(
    "node", [each for each in CLASSES if is_due(each.name)], ids=lambda each: each.name
)


@pytest.mark.parametrize("name", sorted(filter(is_due, NAMES)))
def test_a_name_of_the_contract_is_exported(name: str) -> None:
    assert name in perdure.__all__
    assert hasattr(perdure, name)


@each_function
def test_a_function_has_the_parameters_of_the_contract(function: Function) -> None:
    found = inspect.getattr_static(function.owner, function.name)
    if function.is_property:
        return
    expected = [each for each in function.parameters if f"{function.path}({each.name})" not in LATER]
    overloads = [real(each) for each in typing.get_overloads(found) or [found]]
    fitting = [each for each in overloads if set(expected) <= set(each)]
    assert fitting, f"{expected} not in {overloads}"
    for each in fitting:
        assert [one for one in each if one.kind in {"/", ""}] == [one for one in expected if one.kind in {"/", ""}]
        more = set(each) - set(function.parameters)
        assert all(one.has_default for one in more), f"callers needn't give {more}"


@each_function
def test_a_function_is_async_where_the_contract_says_so(function: Function) -> None:
    found = inspect.getattr_static(function.owner, function.name)
    assert inspect.iscoroutinefunction(found) == function.is_async


@each_class
def test_a_class_has_the_attributes_of_the_contract(node: ast.ClassDef) -> None:
    found = getattr(perdure, node.name)
    targets = [each.target for each in node.body if isinstance(each, ast.AnnAssign)]
    attributes = {target.id for target in targets if isinstance(target, ast.Name)}
    source = inspect.getsource(found)
    assert {each for each in attributes if not hasattr(found, each) and f"self.{each}" not in source} == set()


def test_statuses_are_those_of_the_contract() -> None:
    (node,) = [each for each in CLASSES if each.name == "Status"]
    expected = [ast.literal_eval(each.value) for each in node.body if isinstance(each, ast.Assign)]
    assert [status.value for status in perdure.Status] == expected


@pytest.mark.parametrize("path", sorted(LATER))
def test_what_comes_later_is_not_there_yet(path: str) -> None:
    """As soon as it is there, it must be compared with the contract: take it off the list."""
    if LATER[path] == TYPES:
        assert path not in perdure.__all__
        return
    path, _, parameter = path.removesuffix(")").partition("(")
    owner: Any = perdure
    *holders, name = path.split(".")
    for holder in holders:
        owner = getattr(owner, holder)
    if not parameter:
        assert not hasattr(owner, name)
        return
    found = getattr(owner, name)
    for each in [*typing.get_overloads(found), found]:
        assert parameter not in inspect.signature(each).parameters


def test_what_is_exported_is_there_and_sorted() -> None:
    assert list(perdure.__all__) == sorted(perdure.__all__)
    assert all(hasattr(perdure, name) for name in perdure.__all__)


def test_every_exported_name_is_documented() -> None:
    assert [name for name in perdure.__all__ if not inspect.getdoc(getattr(perdure, name))] == []
