"""A longer way to the server: `python -m benchmarks.proxy SOCKET OTHER MILLISECONDS` listens on the other socket.

Everything arrives half of that round trip after it was sent, in both directions; what is sent meanwhile travels at the
same time, as on a real line. It ends when its stdin does.
"""

from __future__ import annotations

import asyncio
import sys
from asyncio import StreamReader, StreamWriter
from contextlib import suppress

_CHUNK = 1 << 18


async def main(socket: str, other: str, milliseconds: float) -> None:
    """Listen until nobody holds stdin open."""
    loop = asyncio.get_running_loop()

    async def accept(reader: StreamReader, writer: StreamWriter) -> None:
        there, back = await asyncio.open_unix_connection(socket)
        with suppress(OSError):
            await asyncio.gather(_carry(reader, back, milliseconds / 2000), _carry(there, writer, milliseconds / 2000))

    server = await asyncio.start_unix_server(accept, other)
    print("works", flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    server.close()


async def _carry(source: StreamReader, target: StreamWriter, seconds: float) -> None:
    """Each piece, and then the end, so long after it came."""
    loop = asyncio.get_running_loop()
    while data := await source.read(_CHUNK):
        loop.call_later(seconds, target.write, data)
    loop.call_later(seconds, target.close)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], float(sys.argv[3])))
