"""A decoder prepared for generating text: decoding with a cache, fast CPU products, int8.

Read `decode` first.
"""
