"""Prepare process, device and model for a run: ranks, speed settings, signals, profiler, peak
FLOP/s.

Read `speed` first.
"""
