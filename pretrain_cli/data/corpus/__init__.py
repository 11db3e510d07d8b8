"""Files and folders in, documents out: discovery, decompression, formats, records, text.

Read `source_files` first, then `readers` and `formats`.
"""
