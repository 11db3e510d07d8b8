"""What is typed, one engine call, what is shown: a file a command.

Nothing here imports torch or the engine until a command runs, so that help answers at once.
"""
