"""Benchmarks: time each arm in fresh processes, compare the arms, and produce a table.

The timed step is training's own `train_step`, on synthetic tokens. Read `arms` first, then
`rounds`, `timing` and `results`.
"""
