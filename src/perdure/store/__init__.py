"""SQL and connections: everything that talks to PostgreSQL."""
