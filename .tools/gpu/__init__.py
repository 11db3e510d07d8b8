"""Slots of `.tools/gpu_check`: each checks or measures one thing on one GPU, in its own process."""
