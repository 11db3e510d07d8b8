"""Text generation from a checkpoint.

Read `sample` first: it opens the model, decodes in batches and streams the text.
"""
