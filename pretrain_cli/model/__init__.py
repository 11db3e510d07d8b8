"""The decoder of Gemma 3 and Qwen 3: takes tokens, returns logits or a loss.

Read `decoder` first. `config`, `presets`, `counting` and `parameter_map` describe a model without
building it, and import no torch.
"""
