"""Model file formats, read and written: Hugging Face folders (config.json, weights) and GGUF.

Read `hf_config` first, then `hf_weights`.
"""
