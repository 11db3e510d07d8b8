"""Text to tokens to shards to batches. Knows nothing of models; returns numpy arrays.

`corpus` finds and reads text, `tokenizing` writes a dataset, the modules here read one.
Read `shards` first (the format on disk), then `dataset` and `batches`.
"""
