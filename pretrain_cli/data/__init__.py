"""Text to tokens to shards to batches. Knows nothing of models; gives out numpy arrays."""
