"""An agent: a language model that calls tools, asks a human before it does harm, and streams what it says.

Each turn of the model is a step, so a crash doesn't pay for it again; its tokens go to a stream as they come. The model
is a script here, so that it costs nothing and says the same each time; put a real client in its place.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from perdure import App, Retry, StreamReset, answering, set_event, step, timeout, write_stream

app = App("agent")
MAX_TURNS = 10


@dataclass
class Turn:
    """What the model said, and what it wants done; no tool: it is done."""

    text: str
    tool: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)


class Model:
    """A script in place of a language model: what it says depends on how often a tool has answered."""

    script = (
        Turn("I look at the disk first.", "disk_usage", {"path": "/var"}),
        Turn("The logs are large. I would delete them.", "delete", {"path": "/var/log"}),
        Turn("Done."),
    )
    breaks_down = 0
    """How often it hangs up in the middle of a sentence."""

    async def stream(self, history: list[str]) -> AsyncIterator[str]:
        turn = self.script[sum(line.startswith("tool:") for line in history)]
        for number, word in enumerate(turn.text.split()):
            if self.breaks_down and number == 2:
                self.breaks_down -= 1
                raise ConnectionError("the model hung up")
            yield word
        yield json.dumps({"tool": turn.tool, "arguments": turn.arguments})


MODEL = Model()


@step(retry=Retry(max_attempts=5, initial=timedelta(milliseconds=20)), idempotent=True)
async def think(history: list[str]) -> Turn:
    """One turn. When it fails in the middle, readers of the stream are told to drop what it had said."""
    words: list[str] = []
    async for word in MODEL.stream(history):
        if word.startswith("{"):
            call = json.loads(word)
            return Turn(" ".join(words), call["tool"], call["arguments"])
        words.append(word)
        await write_stream("tokens", word)
    raise ConnectionError("the model said nothing to the end")


@step(idempotent=True)
async def disk_usage(path: str) -> str:
    return f"{path} holds 40 GB"


DELETED: list[str] = []


@step(in_doubt="park")  # nobody knows whether it was deleted: a human is to look
async def delete(path: str) -> str:
    DELETED.append(path)
    return f"{path} is deleted"


async def _use_tool(turn: Turn) -> str:
    if turn.tool == "disk_usage":
        return await disk_usage(**turn.arguments)
    if turn.tool == "delete":
        return await delete(**turn.arguments) if await _approved(turn) else "the human said no"
    return f"there is no tool {turn.tool!r}"


async def _approved(turn: Turn) -> bool:
    """Ask whoever watches; who doesn't answer within a day hasn't approved."""
    await set_event("asks", f"{turn.tool} {turn.arguments}")
    try:
        async with timeout(timedelta(days=1)), answering("approval", type=bool) as question:
            question.reply("thank you")
            return question.value
    except TimeoutError:
        return False


@app.workflow
async def agent(task: str) -> list[str]:
    history = [f"human: {task}"]
    for _ in range(MAX_TURNS):
        turn = await think(history)
        history.append(f"model: {turn.text}")
        if not turn.tool:
            return history
        history.append(f"tool: {await _use_tool(turn)}")
    return [*history, "it took too many turns"]


async def read(id: Any) -> str:
    """The text of the stream, as a client shows it: what a failed turn had said is dropped."""
    words: dict[int, str] = {}
    async for entry in app.handle(id).read_stream("tokens", type=str):
        if isinstance(entry, StreamReset):
            words = {offset: word for offset, word in words.items() if offset < entry.offset}
        else:
            words[entry.offset] = entry.value
            print(entry.value, end=" ", flush=True)
    return " ".join(words.values())


async def main() -> None:
    async with app, app.worker():
        handle = await app.start(agent("the disk is full"))
        reading = asyncio.create_task(read(handle.id))
        print("\n[the agent wants to", await handle.get_event("asks", type=str), "- approved]")
        await handle.ask("approval", True)
        await reading
        print()


if __name__ == "__main__":
    asyncio.run(main())
