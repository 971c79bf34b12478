"""Real processes, real signals, real restarts of the server, and connections that are cut at a chosen moment."""
