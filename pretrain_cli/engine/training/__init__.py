"""A plan in, a trained checkpoint out: set-up, the loop, one step, skipped steps, saves.

Read `train` first: it calls the rest in the order in which a run happens.
"""
