"""`perdure doctor`: what is wrong with the installation, or will be."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

import click

from perdure import doctor as checks
from perdure.cli.endings import without_password
from perdure.cli.options import database_options, settings
from perdure.cli.tables import as_dict, as_json, printable
from perdure.doctor import Finding, Level

_COLOURS = {Level.OK: "green", Level.NOTE: "blue", Level.WARNING: "yellow", Level.PROBLEM: "red"}
_INDENT = " " * 20


@click.command()
@click.option("--strict", is_flag=True, help="Fail for warnings, too.")
@click.option("--quiet", is_flag=True, help="Show only warnings and problems.")
@click.option("--json", "json_wanted", is_flag=True, help="For programs: one object.")
@database_options
def doctor(strict: bool, quiet: bool, json_wanted: bool) -> None:
    """Look for what is wrong with the database, the way to it, and the work in it. Changes nothing.

    It looks at the server's settings, the round trip, the clocks, poolers, hints (NOTIFY), the schema, the role's
    rights, what holds VACUUM back, dead rows, autovacuum, workers, queues, names and versions that nobody serves, and
    workflows that don't move. Where SQL mends something, it is printed, for whoever owns the schema.

    \b
    Levels:
      ok       it is as it should be
      note     it is so, and may be meant so
      warning  it works, and won't for ever, or not as well as it could
      problem  something doesn't work

    \b
    Exit codes:
      0    no problem (with --strict: no warning either)
      1    a problem

    \b
    Examples:
      perdure doctor
      perdure doctor --strict --json | jq '.findings[] | select(.level == "problem")'
      perdure doctor --json | jq -r '.findings[] | select(.check == "schema").sql[] + ";"' | psql "$URL"
    """
    findings = asyncio.run(checks.examine(settings(migrate=False, read_only=True)))
    counts = Counter(finding.level for finding in findings)
    fails = bool(counts[Level.PROBLEM] or (strict and counts[Level.WARNING]))
    if json_wanted:
        shown = [as_dict(finding) | {"text": without_password(finding.text)} for finding in findings]
        click.echo(as_json({"healthy": not fails, "findings": shown}, indent=2))
    else:
        _print([each for each in findings if not quiet or each.level in (Level.WARNING, Level.PROBLEM)])
        click.echo(_summary(counts))
    if fails:
        raise click.exceptions.Exit(1)


def _print(findings: Sequence[Finding]) -> None:
    for finding in findings:
        level = click.style(f"{finding.level.value:<8}", fg=_COLOURS[finding.level])
        click.echo(f"{level} {finding.check:<10} {printable(without_password(finding.text))}")
        if finding.advice:
            click.echo(f"{_INDENT}{printable(finding.advice)}")
        for sql in finding.sql:
            for line in f"{sql};".splitlines():
                click.echo(click.style(f"{_INDENT}  {printable(line)}", dim=True))


def _summary(counts: Counter[Level]) -> str:
    problems, warnings = counts[Level.PROBLEM], counts[Level.WARNING]
    if not problems and not warnings:
        return "nothing is wrong"
    parts = [
        f"{count} {word}{'' if count == 1 else 's'}"
        for count, word in ((problems, "problem"), (warnings, "warning"))
        if count
    ]
    return ", ".join(parts)
