"""Tokens in, logits or loss out: the decoder of Gemma 3 and Qwen 3.

Read `decoder` first. `config`, `presets`, `counting` and `parameter_map` describe a model
without building it, and import no torch.
"""
