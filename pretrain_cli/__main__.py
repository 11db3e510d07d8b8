"""`python -m pretrain_cli`, which is what torchrun starts."""

from pretrain_cli.cli import app

if __name__ == "__main__":  # the benchmark's fresh processes import this file and must not run it
    app(prog_name="pretrain")
