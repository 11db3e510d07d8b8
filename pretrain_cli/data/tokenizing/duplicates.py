"""Digests of documents, to recognize duplicates. Stored on disk, so that memory does not grow with
their number."""

import shutil
import sqlite3
from pathlib import Path

from pretrain_cli.data.tokenizing.request import TokenizeRequest

SEEN = "seen.sqlite"


class DuplicateIndex:
    """Index of the documents seen so far, a file in a dataset that drops duplicates."""

    def __init__(self, folder: Path, ordinal: int, request: TokenizeRequest) -> None:
        """Open the index in this folder, without the documents from this ordinal on. When
        appending, all documents of the existing dataset count as seen."""
        self.database: sqlite3.Connection | None = None
        if not request.dedup:
            return
        path, before = folder / SEEN, request.out / SEEN
        if request.append and not path.exists() and before.exists():
            shutil.copyfile(before, path)
            shift = sqlite3.connect(path)
            shift.execute("UPDATE seen SET ordinal = -1")
            shift.commit()
            shift.close()
        self.database = sqlite3.connect(path)
        self.database.execute("PRAGMA synchronous = OFF")
        self.database.execute(
            "CREATE TABLE IF NOT EXISTS seen (digest BLOB PRIMARY KEY, ordinal INTEGER)"
            " WITHOUT ROWID"
        )
        self.database.execute("DELETE FROM seen WHERE ordinal >= ?", (ordinal,))

    def has(self, digest: bytes, ordinal: int) -> bool:
        """Return whether a document whose text has this hash was seen before, and add it."""
        if self.database is None:
            return False
        added = self.database.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (digest, ordinal))
        return added.rowcount == 0

    def commit(self) -> None:
        if self.database is not None:
            self.database.commit()

    def close(self) -> None:
        if self.database is not None:
            self.database.close()
