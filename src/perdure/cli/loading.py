"""Find the app that `MODULE:APP` names. Whatever is wrong with it is one line; a failing import shows where, too."""

from __future__ import annotations

import importlib
import os
import sys
import traceback

import click

from perdure.app import App
from perdure.cli.endings import MISCONFIGURED, Failure
from perdure.errors import PerdureError


def load(reference: str) -> App:
    """The app of `shop:app`, or the only one in `shop`. The current folder is on the import path.

    Raises:
        Failure: There is none, or it has no workflows.
    """
    name, colon, attribute = reference.partition(":")
    _check(reference, name, attribute, colon)
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    module = _import(name)
    app = _attribute(module, name, attribute) if attribute else _only_app(module, name)
    try:
        names = app.names
        app.version  # noqa: B018 - finds steps of one name
    except PerdureError:
        raise
    except Exception as error:
        raise _import_failure(f"what app {app.name!r} includes", error) from error
    if not names:
        raise _failure(
            f"app {app.name!r} of {reference!r} has no workflows; declare them with @app.workflow, "
            "or name their modules in App(include=[...])"
        )
    return app


def _check(reference: str, name: str, attribute: str, colon: str) -> None:
    if name.endswith(".py") or os.sep in name:
        module = name.removesuffix(".py").strip("./").replace(os.sep, ".")
        raise _failure(f"{name!r} is a file; give the module, such as {module}{colon}{attribute}")
    if not all(part.isidentifier() for part in name.split(".")) or (colon and not attribute):
        raise _failure(f"{reference!r} names no app; use MODULE:APP, such as shop:app")


def _import(name: str) -> object:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # The module itself or one of its packages; a module that it imports in vain is another matter.
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            raise _failure(
                f"there is no module {error.name!r}, neither in {os.getcwd()} nor installed; "
                "start the worker where it can be imported"
            ) from None
        raise _import_failure(f"module {name!r}", error) from error
    except PerdureError:
        raise
    except Exception as error:
        raise _import_failure(f"module {name!r}", error) from error


def _attribute(module: object, name: str, attribute: str) -> App:
    found = module
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            apps = ", ".join(f"{name}:{known}" for known in _apps(module)) or "none"
            raise _failure(f"module {name!r} has no {attribute!r}; the apps that it has: {apps}") from None
    if not isinstance(found, App):
        raise _failure(f"{name}:{attribute} is no App but an object of type {type(found).__name__!r}")
    return found


def _only_app(module: object, name: str) -> App:
    apps = _apps(module)
    if not apps:
        raise _failure(f"module {name!r} has no App; make one, such as app = App('shop'), or name another module")
    if len(set(map(id, apps.values()))) > 1:
        choices = ", ".join(f"{name}:{known}" for known in apps)
        raise _failure(f"module {name!r} has more than one App; say which: {choices}")
    return next(iter(apps.values()))


def _apps(module: object) -> dict[str, App]:
    return {name: value for name, value in vars(module).items() if isinstance(value, App)}


def _import_failure(what: str, error: Exception) -> Failure:
    """Shows the traceback from the user's own code on; the line comes last."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename != __file__ and "importlib" not in frame.filename]
    if own:
        click.echo("".join(["Traceback (most recent call last):\n", *traceback.format_list(own)]), err=True, nl=False)
        click.echo("".join(traceback.format_exception_only(error)), err=True, nl=False)
    return _failure(f"{what} can't be imported: {type(error).__name__}: {error}")


def _failure(message: str) -> Failure:
    return Failure(message, MISCONFIGURED)
