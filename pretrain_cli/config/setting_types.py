"""Types of single settings: numbers with bounds, paths, 3h55m, 5GB, 200M.

Each type accepts the same text in YAML, in `--set` and in flags. The manual's tables of settings
show the JSON schema of a type; see `reference`.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    PlainSerializer,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

from pretrain_cli.units import in_number

Auto = Literal["auto"]


@dataclass(frozen=True, kw_only=True)
class SpeedSetting:
    """Effects of a speed setting besides the speed of a step; metadata of its field in
    SpeedConfig."""

    is_process_wide: bool = False
    """True if it applies to the whole process rather than to the model."""
    decides_micro_batch: bool = False
    """True if it can change which micro-batch size is the fastest."""
    is_announced: bool = False
    """True if the value that `auto` took is printed when a run starts."""
    not_in_a_step: str = ""
    """Reason why it has no effect on a timed step; empty if it has one."""
    on_any_gpu: Any = None
    """Value of `auto` on every GPU that memory can be planned for without having it; False also for
    a setting without effect there; None without `auto`, or if the memory estimate doesn't read
    it."""


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
PositiveInt = Annotated[int, Field(gt=0, strict=True)]  # strict: `true` is not 1
Count = Annotated[int, Field(ge=0, strict=True)]
Seed = Annotated[int, Field(ge=0, lt=2**63, strict=True)]


def _one_or_several(value: Any) -> Any:
    """Return a path or a list of paths as a tuple of strings."""
    several = value if isinstance(value, list | tuple) else [value]
    if not several or not all(isinstance(path, str | Path) for path in several):
        raise PydanticCustomError("paths", "Input should be a path or a list of paths")
    return tuple(map(str, several))


def _as_given(paths: tuple[str, ...]) -> str | list[str]:
    return paths[0] if len(paths) == 1 else list(paths)


Paths = Annotated[
    tuple[str, ...],
    BeforeValidator(_one_or_several),
    PlainSerializer(_as_given, when_used="json"),
    WithJsonSchema({"title": "path or list of paths"}),
]


def _text_or_several(value: Any) -> Any:
    """Return a text or a list of texts as a tuple."""
    several = value if isinstance(value, list | tuple) else [value]
    if not several or not all(isinstance(text, str) for text in several):
        raise PydanticCustomError("texts", "Input should be a text or a list of texts")
    return tuple(several)


Texts = Annotated[
    tuple[str, ...],
    BeforeValidator(_text_or_several),
    WithJsonSchema({"title": "text or list of texts"}),
]


SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def seconds_of(duration: str) -> int:
    """Return the seconds in a duration such as 90s, 15m, 3h55m or 1d."""
    return sum(int(count) * SECONDS[unit] for count, unit in re.findall(r"(\d+)([dhms])", duration))


def _is_duration(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"(\d+d)?(\d+h)?(\d+m)?(\d+s)?", value):
        raise PydanticCustomError("duration", "Input should be a time such as 90s, 15m, 3h55m, 1d")
    if not seconds_of(value):
        raise PydanticCustomError("duration", "Input should be more than no time")
    return value


Duration = Annotated[
    str, BeforeValidator(_is_duration), WithJsonSchema({"title": "duration, such as 3h55m"})
]


def in_bytes(size: str) -> int:
    """Return the bytes in a size with a unit, such as 5GB, 1.5 GB or 800MB.

    Raises ValueError for anything else, and for less than a byte.
    """
    if not re.search(r"[a-zA-Z]\s*$", size):
        raise ValueError(f"'{size}' has no unit")
    try:
        count = TypeAdapter(ByteSize).validate_python(size)
    except ValidationError:
        raise ValueError(f"'{size}' is no size") from None
    if count < 1:
        raise ValueError(f"'{size}' is less than a byte")
    return int(count)


def _is_size(value: Any) -> str:
    try:
        in_bytes(value)
    except (ValueError, TypeError):
        raise PydanticCustomError("size", "Input should be a size such as 5GB, 500MB") from None
    return value


Size = Annotated[str, BeforeValidator(_is_size), WithJsonSchema({"title": "size, such as 5GB"})]


def _as_number(value: Any) -> Any:
    try:
        return in_number(value) if isinstance(value, str) else value
    except ValueError:
        raise PydanticCustomError("amount", "Input should be a number such as 5B, 200M") from None


Amount = Annotated[
    PositiveInt, BeforeValidator(_as_number), WithJsonSchema({"title": "number, such as 5B"})
]


class StageSettings(BaseModel):
    """One entry of data.stages."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    after: Amount
    """Tokens of the run before it."""
    path: Paths | None = None
    seq_len: PositiveInt | None = None


def _as_stages(value: Any) -> Any:
    """Return a list of stages, in order. An error names the first one that is wrong."""
    several = value if isinstance(value, list | tuple) else [value]
    stages: list[StageSettings] = []
    for each in several:
        try:
            stage = StageSettings.model_validate(each)
        except ValidationError as failure:
            fault = failure.errors()[0]
            name = str(fault["loc"][0]) if fault["loc"] else ""
            why = {"missing": "is missing", "extra_forbidden": "is no key of a stage"}
            wrong = f"; {name} {why.get(fault['type'], 'is wrong')}" if name else ""
            raise PydanticCustomError(
                "stages",
                "Input should be a list of stages with after, path and seq_len{wrong}",
                {"wrong": wrong},
            ) from None
        if stage.path is None and stage.seq_len is None:
            raise PydanticCustomError(
                "stages", "Input should be stages with a path or a seq_len each"
            )
        if stages and stage.after <= stages[-1].after:
            raise PydanticCustomError(
                "stages", "Input should be stages in the order of their after"
            )
        stages.append(stage)
    return tuple(stages)


Stages = Annotated[
    tuple[StageSettings, ...],
    BeforeValidator(_as_stages),
    WithJsonSchema({"title": "list of stages"}),
]


def _named(value: Any) -> Any:
    """Return `a,b` or a list of names as a tuple without repeats."""
    several = value.split(",") if isinstance(value, str) else value
    if not isinstance(several, list | tuple):
        raise PydanticCustomError("names", "Input should be names with commas between")
    return tuple(dict.fromkeys(str(name).strip() for name in several))


Trackers = Annotated[
    tuple[Literal["tensorboard", "wandb"], ...],
    BeforeValidator(_named),
    WithJsonSchema({"title": "`tensorboard`, `wandb` or both"}),
]
