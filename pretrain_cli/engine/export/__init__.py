"""Export of a checkpoint: a Hugging Face folder with a model card, or a GGUF file.

Read `export` first.
"""
