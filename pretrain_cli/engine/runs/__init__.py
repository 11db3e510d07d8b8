"""The run folder: run.yaml, checkpoints and which are kept, metrics.jsonl, trackers.

Training writes here; sampling, evaluation, export and report read. Read `checkpoint` first.
"""
