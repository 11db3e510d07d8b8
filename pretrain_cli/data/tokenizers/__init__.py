"""Text to token ids and back: published, local, byte-level and trained tokenizers.

Read `tokenizer` first.
"""
