"""The run folder: run.yaml, checkpoints and their retention, metrics.jsonl and trackers.

Training writes it; sampling, evaluation, export and report read it. Read `checkpoint` first.
"""
