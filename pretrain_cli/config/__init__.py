"""Settings of a run: YAML, `--set` and flags in; one checked, frozen `RunConfig` out. No torch.

Read `run_config` first.
"""
