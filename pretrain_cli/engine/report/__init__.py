"""Report: reads run folders and writes one HTML page that works offline. Imports no torch.

Read `history` first: it reads a run folder; the other modules draw it.
"""
