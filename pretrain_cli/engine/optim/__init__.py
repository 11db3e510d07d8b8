"""Update parameters from gradients: AdamW and its parameter groups, Muon, schedules.

Read `optimizer` first.
"""
