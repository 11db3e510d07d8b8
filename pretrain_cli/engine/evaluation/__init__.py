"""Evaluation of a checkpoint: loss, lm-eval tasks, comparison with transformers.

Read `evaluate_checkpoint` first.
"""
