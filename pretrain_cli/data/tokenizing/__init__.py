"""A corpus in, a tokenized dataset out; a killed run continues where it stopped.

Read `tokenize` first: it finds where to start (`resume`), opens the tokenizer (`choose_tokenizer`),
runs the `pipeline` and finishes the `writer`.
"""
