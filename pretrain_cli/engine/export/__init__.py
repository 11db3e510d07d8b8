"""A checkpoint in, something to publish out: a Hugging Face folder with a model card, or GGUF.

Read `export` first.
"""
