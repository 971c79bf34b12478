"""How long a program takes until it can do something: the import, ten declarations, the first statement."""

from __future__ import annotations

import json
import subprocess
import sys

from benchmarks.bench import Bench
from benchmarks.figures import Figure

_PROGRAM = """
import asyncio, json, sys, time
began = time.perf_counter()
from perdure import App
app = App("benchmarks", database_url=sys.argv[1], schema=sys.argv[2])
for number in range(10):
    @app.workflow(name=f"work-{number}")
    async def work(number: int, text: str = "") -> dict[str, int]:
        return {text: number}
declared = time.perf_counter()
async def main():
    async with app:
        await app.start(work(1))
asyncio.run(main())
print(json.dumps([declared - began, time.perf_counter() - began]))
"""
_TIMES = 5


def measure(bench: Bench) -> list[Figure]:
    """In new processes, whose modules are compiled already; the schema is there after the first one."""
    schema = bench.fresh_schema()
    _times(bench, schema)
    times = [_times(bench, schema) for _ in range(bench.repeats * _TIMES)]
    return [
        Figure(name="import and ten workflows", unit="ms", values=[declared for declared, _ in times], target=150,
               better="less"),
        Figure(name="... and the first start", unit="ms", values=[started for _, started in times], target=450,
               better="less"),
    ]  # fmt: skip


def _times(bench: Bench, schema: str) -> list[float]:
    command = [sys.executable, "-c", _PROGRAM, bench.cluster.url, schema]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [seconds * 1000 for seconds in json.loads(done.stdout)]
