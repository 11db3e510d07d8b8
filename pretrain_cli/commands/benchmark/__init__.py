"""`pretrain benchmark` and its subcommands: options in, tables out.

Read `command` first.
"""
