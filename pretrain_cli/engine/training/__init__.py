"""Training: takes a plan and leaves a trained checkpoint. Holds set-up, the loop, one step, the
step guard and asynchronous saves.

Read `train` first: it calls the other modules in the order of a run.
"""
