"""Properties that hold for any workflow program."""
