"""The machine under a run: ranks, device, speed settings, signals, profiler, peak FLOP/s.

Settings in, a prepared process and model out. Read `speed` first.
"""
