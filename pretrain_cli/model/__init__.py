"""Tokens to logits to loss: the Gemma 3 and Qwen 3 decoders, and what is known of them on paper.

`config`, `config_json`, `presets`, `counting` and `layout` know a model without building it, and
import no torch.
"""
