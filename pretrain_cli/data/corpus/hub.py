"""Datasets of the Hugging Face hub: their Parquet files, read one at a time.

    hf:OWNER/NAME[@REVISION][:CONFIG][/SPLIT]

The hub converts datasets to Parquet in a branch of its own, as CONFIG/SPLIT/0000.parquet. A dataset
without that branch, or with a revision given, is read from the Parquet files that it has itself.
The commit is part of each file's name, so a dataset records which revision it was made from.
"""

import io
import os
import re
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

from pretrain_cli.data.corpus.source_files import HUB, TextFile
from pretrain_cli.errors import DataError, did_you_mean

FORM = re.compile(r"hf:([^/@:]+/([^/@:]+))(?:@([^/:]+))?(?::(.+)|/(.+))?")
CONVERTED = "refs/convert/parquet"
"""Branch of the files that the hub converted."""
SPLITS = ("train", "validation", "valid", "val", "dev", "test")
"""Names of folders and files that are splits, not configs."""
NUMBERED = re.compile(r"(.+)-\d+-of-\d+(-.*)?")
TIMEOUT = 10
"""Seconds to wait for the hub's answer."""
SHOWN = 20
"""Largest number of names in a message."""

Parts = dict[str, dict[str, list[TextFile]]]
"""Files by config and split."""


def hub_files(asked: str) -> list[TextFile]:
    """Return the files of a dataset on the hub, of one config and split. Raises DataError if it
    can't be reached or has none of these."""
    match = FORM.fullmatch(asked)
    if match is None:
        raise DataError(f"{asked}: not of the form hf:OWNER/NAME[@REVISION][:CONFIG][/SPLIT]")
    repository, _, revision, config, split = match.groups()
    with _explained(asked, repository):
        parts = _list_files(repository, revision)
        if not parts:
            raise DataError(f"{asked}: no Parquet files in it; {_by_hand(repository)}")
        files = _choose(asked, parts, config, split)
        _check_access(files[0])
    return files


def folder_name(asked: str) -> str:
    """Return the name of a dataset on the hub, without its owner; the config follows it."""
    match = FORM.fullmatch(asked)
    return "-".join(filter(None, [match[2], *(match[4] or "").split("/")])) if match else "hub"


def _list_files(repository: str, revision: str | None) -> Parts:
    api = _api()
    branch = revision or CONVERTED
    try:
        commit = api.dataset_info(repository, revision=branch, timeout=TIMEOUT).sha
    except Exception as error:
        if revision is not None or "RevisionNotFoundError" not in _kinds(error):
            raise
        branch = "main"
        commit = api.dataset_info(repository, revision=branch, timeout=TIMEOUT).sha
    parts: Parts = {}
    tree = api.list_repo_tree(repository, recursive=True, revision=commit, repo_type="dataset")
    for entry in sorted(tree, key=lambda entry: entry.path):
        if not entry.path.endswith(".parquet"):
            continue
        config, split = _place(entry.path, converted=branch == CONVERTED)
        file = TextFile(
            f"{HUB}{repository}@{commit}/{entry.path}",
            f"{repository}@{commit[:12]}/{entry.path}",
            f"{HUB}{repository}@{commit[:12]}:{config}/{split}",
            entry.size,
        )
        parts.setdefault(config, {}).setdefault(split, []).append(file)
    return parts


def _place(path: str, *, converted: bool) -> tuple[str, str]:
    """Return config and split of a file: `en/train/0000.parquet`, `en/train-00000-of-00009.parquet`
    and `en/train.parquet` are all (en, train)."""
    *folders, name = path.removesuffix(".parquet").split("/")
    folders = [folder for folder in folders if folder != "data"]
    if match := NUMBERED.fullmatch(name):
        split = match[1]
    elif name in SPLITS:
        split = name
    elif folders and (converted or folders[-1] in SPLITS):
        split = folders.pop()
    else:
        split = "train"
    return "/".join(folders) or "default", split


def _choose(asked: str, parts: Parts, config: str | None, split: str | None) -> list[TextFile]:
    """Return the files of the config and split asked for; without, of the default one, or of the
    only one."""
    if config is not None and config not in parts:
        config, _, split = config.rpartition("/") if "/" in config else (config, "", None)
    config = _choose_name(asked, "config", parts, config, "default", ":CONFIG")
    split = _choose_name(asked, "split", parts[config], split, "train", "/SPLIT")
    return parts[config][split]


def _choose_name(
    asked: str, what: str, names: Iterable[str], name: str | None, default: str, form: str
) -> str:
    names = sorted(names)
    if name is None and (default in names or len(names) == 1):
        return default if default in names else names[0]
    if name in names:
        return name
    shown = ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
    if name is None:
        raise DataError(f"{asked}: has several {what}s ({shown}); name one with {form} at its end")
    raise DataError(f"{asked}: no {what} '{name}' (it has {shown}){did_you_mean(name, names)}")


def _check_access(file: TextFile) -> None:
    """Ask for a file's metadata, which a gated dataset refuses."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    repository, commit, path = _split(file)
    url = hf_hub_url(
        repository, path, repo_type="dataset", revision=commit, endpoint=_api().endpoint
    )
    get_hf_file_metadata(url, timeout=TIMEOUT)


class HubFile(io.RawIOBase):
    """A file on the hub, read from its beginning to its end. A connection that breaks is opened
    again where it broke."""

    def __init__(self, file: TextFile) -> None:
        from huggingface_hub import HfFileSystem

        self.file, self.left = file, file.size
        self.repository, commit, path = _split(file)
        with _explained(file.location, self.repository):
            files = HfFileSystem(endpoint=_api().endpoint)
            place = f"datasets/{self.repository}@{commit}/{path}"
            self.stream: Any = files.open(place, "rb", block_size=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with _explained(self.file.location, self.repository):
            block = self.stream.read(len(buffer))
        self.left -= len(block)
        if self.left < 0 or (self.left and not block):
            raise DataError(
                f"{self.file.location}: not {self.file.size:,} bytes, as the hub says it has; run "
                "the command again"
            )
        buffer[: len(block)] = block
        return len(block)


def _split(file: TextFile) -> tuple[str, str, str]:
    """Return repository, commit and path of a file."""
    repository, _, rest = file.location.removeprefix(HUB).partition("@")
    commit, _, path = rest.partition("/")
    return repository, commit, path


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"))


def _by_hand(repository: str) -> str:
    return (
        f"get it with 'hf download --repo-type dataset {repository} --local-dir FOLDER', and give "
        "the folder"
    )


def _kinds(error: Exception) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


@contextmanager
def _explained(asked: str, repository: str) -> Generator[None]:
    """Raise DataError for a failure of the hub, the network or the HTTP library."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        kinds = _kinds(error)
        if "GatedRepoError" in kinds:
            reason = "is gated: accept its terms on the hub and run 'hf auth login'"
        elif kinds & {"RepositoryNotFoundError", "HFValidationError"}:
            reason = (
                "the hub has no such dataset: check the name, or run 'hf auth login' if it is "
                "private"
            )
        elif "RevisionNotFoundError" in kinds:
            reason = "no such revision: check what stands after the @"
        elif "OfflineModeIsEnabled" in kinds:
            reason = f"HF_HUB_OFFLINE is set: unset it; or {_by_hand(repository)}"
        else:
            what = type(error).__name__
            status = getattr(getattr(error, "response", None), "status_code", None)
            reason = (
                f"the hub can't be reached ({what}{f' {status}' if status else ''}): run the "
                f"command again when it can; or {_by_hand(repository)}"
            )
        raise DataError(f"{asked}: {reason}") from None
