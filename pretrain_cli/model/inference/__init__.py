"""A decoder prepared to write text: decoding with a cache, fast products on a CPU, int8.

Read `decode` first.
"""
