"""The base class of all settings."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Unknown keys are errors: a misspelt setting must not silently leave its default in force."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
