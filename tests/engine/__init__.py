"""Each interleaving of the protocols, forced in one process on a real PostgreSQL."""
