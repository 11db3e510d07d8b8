"""A corpus in, a tokenized dataset out; a killed run continues where it stopped.

Read `tokenize` first, then `pipeline`.
"""
