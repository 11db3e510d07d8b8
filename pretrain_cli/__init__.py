"""Pretrain Gemma 3 and Qwen 3 models: from a folder of text to a model that transformers opens."""

__version__ = "0.1.0"
