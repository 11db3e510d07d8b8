"""One file a command: what is typed, one call of the engine, what is shown.

Nothing here imports torch or the engine until a command runs, so `--help` answers at once.
"""
