"""`python -m pretrain_cli`, which is what torchrun starts."""

from pretrain_cli.cli import app

app(prog_name="pretrain")
