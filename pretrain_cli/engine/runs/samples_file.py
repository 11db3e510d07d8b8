"""samples.jsonl: a line per text sampled from the model, truncated on resume."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from pretrain_cli.engine.runs.events import Event, Sample
from pretrain_cli.engine.runs.metrics_file import truncate_after
from pretrain_cli.files import append_line, flush


class SamplesFile:
    """Writes samples.jsonl. Each line is on the disk when `take` returns."""

    def __init__(self, path: Path, notify: Callable[[str], None], *, upto: int) -> None:
        """Drop lines after step `upto`: those steps will run again."""
        self.path, self.notify = path, notify
        self.taken = {(row["step"], row["prompt"]) for row in truncate_after(path, upto)}
        """Step and prompt of every sample of the run."""

    def take(self, event: Event) -> None:
        if not isinstance(event, Sample):
            return
        self.taken.add((event.step, event.prompt))
        try:
            with self.path.open("ab", buffering=0) as file:
                append_line(file, (json.dumps(asdict(event)) + "\n").encode())
                flush(file)
        except OSError as error:
            self.notify(f"{self.path}: {error.strerror}; the sample below is not in it")

    def flush(self) -> None:
        """Do nothing: every line is flushed when it is written."""

    def close(self) -> None:
        """Do nothing: the file is open only while a line is written."""
