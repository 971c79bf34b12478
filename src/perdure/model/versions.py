"""The version of code: a hash of what it does, not of where it stands.

Of the compiled functions, without line numbers, file names and docstrings: an edit of a comment is no new version.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from hashlib import blake2b
from types import CodeType
from typing import Any, cast


def version_of(functions: Iterable[Callable[..., Any]]) -> str:
    """Twelve hex digits for these functions, whatever their order."""
    digests = sorted(_digest(function) for function in functions)
    return blake2b(b"".join(digests), digest_size=6).hexdigest()


def _digest(function: Callable[..., Any]) -> bytes:
    code = getattr(inspect.unwrap(function), "__code__", None)
    name = getattr(function, "__qualname__", type(function).__qualname__)
    hash_ = blake2b(name.encode(), digest_size=16)
    if isinstance(code, CodeType):
        hash_.update(_essence(code, getattr(function, "__doc__", None)))
    return hash_.digest()


def _essence(code: CodeType, docstring: str | None) -> bytes:
    parts: list[bytes] = [code.co_code, repr(code.co_names).encode(), repr(code.co_varnames).encode()]
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            parts.append(_essence(constant, None))
        elif not (isinstance(constant, str) and constant == docstring):
            # A frozenset's order depends on the process.
            ordered = (
                sorted(map(repr, cast("frozenset[object]", constant))) if isinstance(constant, frozenset) else constant
            )
            parts.append(repr(ordered).encode())
    return b"\0".join(parts)
