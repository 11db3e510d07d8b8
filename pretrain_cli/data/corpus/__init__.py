"""Files and folders in, documents out: discovery, decompression, text, JSON lines, Parquet.

Read `source_files` first, then `readers`.
"""
