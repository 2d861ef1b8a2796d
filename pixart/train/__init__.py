"""A training run: its configuration, set-up, loop and log. Nothing that compares runs, and no command, may enter it."""
