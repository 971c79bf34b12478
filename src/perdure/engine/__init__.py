"""What moves: the parts of a worker that claim, run, record, and take over."""
