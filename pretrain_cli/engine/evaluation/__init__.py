"""A checkpoint in, numbers about it out: loss, lm-eval tasks, comparison with transformers.

Read `evaluate_checkpoint` first.
"""
