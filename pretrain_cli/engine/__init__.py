"""Model and data to a trained run: speed, optimizer, training, checkpoints, sampling, timing."""
