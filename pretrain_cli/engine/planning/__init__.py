"""Settings in, a plan out: every `auto` resolved, and memory and time estimated.

Read `plan` first.
"""
