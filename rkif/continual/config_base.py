"""The base class of all settings."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic_core import PydanticKnownError


class Settings(BaseModel):
    """Base class of settings. Unknown keys are errors, so that a misspelt setting is not ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _not_a_truth_value(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false for numbers, because pydantic would convert them to 1 and 0."""
        if isinstance(value, bool) and info.field_name is not None:
            kinds = classes(cls.model_fields[info.field_name].annotation)
            if bool not in kinds and any(issubclass(kind, int | float) for kind in kinds):
                raise PydanticKnownError("float_type")
        return value


def classes(annotation: Any) -> list[type]:
    """The classes in an annotation such as ``list[Settings] | None``."""
    if arguments := get_args(annotation):
        return [one for argument in arguments for one in classes(argument)]
    return [annotation] if isinstance(annotation, type) else []
