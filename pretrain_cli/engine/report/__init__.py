"""Run folders in, one HTML page out, which opens without a network. No torch.

Read `history` first: it holds what a run folder says; the rest draws it.
"""
