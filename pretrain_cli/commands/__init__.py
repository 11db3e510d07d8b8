"""The commands, one file each: parse the options, call the engine once, show the result.

Modules here import torch and the engine only when a command runs, so `--help` answers at once.
"""
