"""What the author of a workflow imports: decorators and primitives, and nothing that does I/O."""
