"""Entry point of `python -m pretrain_cli`, which torchrun uses."""

from pretrain_cli.cli import app

if __name__ == "__main__":  # processes that the benchmark spawns import this file
    app(prog_name="pretrain")
