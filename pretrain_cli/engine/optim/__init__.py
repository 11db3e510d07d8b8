"""Parameters and gradients in, updated parameters out: AdamW groups, Muon, schedules.

Read `optimizer` first.
"""
