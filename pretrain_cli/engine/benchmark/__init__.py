"""Arms in, a table out: each arm is timed in fresh processes, then compared.

The timed step is training's own `train_step`, on synthetic tokens. Read `arms` first, then
`rounds`, `timing` and `results`.
"""
