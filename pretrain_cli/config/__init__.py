"""Settings of a run: merge YAML, `--set` and flags into one checked, frozen `RunConfig`. No torch.

Read `run_config` first.
"""
