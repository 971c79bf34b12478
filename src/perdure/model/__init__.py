"""The pure part: values and decisions, without I/O, clock or asyncio."""
