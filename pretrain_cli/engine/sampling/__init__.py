"""A checkpoint and prompts in, text out.

Read `sample` first: it opens the model, decodes in batches and streams the text.
"""
