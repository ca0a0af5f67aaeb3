"""in-toto Statements, version 1: claims about files, which are identified by their digests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from rkif.files import parse_json, read_text, validated

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PAYLOAD_TYPE = "application/vnd.in-toto+json"  # of a Statement in an envelope

Sha256Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Content(BaseModel):
    """Base of models of external file formats: keys are in camel case, and unknown keys are ignored."""

    model_config = ConfigDict(strict=True, frozen=True, alias_generator=to_camel)


class Subject(Content):
    name: str
    digest: dict[str, str]


class Statement(Content):
    """A Statement; ``predicate_type`` determines the keys of ``predicate``."""

    type: str = Field(alias="_type")
    subject: Annotated[list[Subject], Field(min_length=1)]
    predicate_type: str
    predicate: dict[str, Any]


def resource(name: str, sha256: str, **annotations: Any) -> dict[str, Any]:
    """A ResourceDescriptor: a file that a claim is about, or that it depends on."""
    described = {"name": name, "digest": {"sha256": sha256}}
    return {**described, "annotations": annotations} if annotations else described


def make_statement(
    subject: Sequence[Mapping[str, Any]], predicate_type: str, predicate: Mapping[str, Any]
) -> dict[str, Any]:
    """A Statement, ready for JSON.

    Args:
        subject: ResourceDescriptors of the files that the predicate is about.
        predicate_type: the URI of the predicate's type.
        predicate: JSON values.
    """
    return {
        "_type": STATEMENT_TYPE,
        "subject": list(subject),
        "predicateType": predicate_type,
        "predicate": predicate,
    }


def parse_statement(text: str | bytes, predicate_type: str, where: object) -> Statement:
    """The Statement in a JSON text.

    Raises:
        ValueError: the text is not a Statement, or has another predicate; it names ``where``.
    """
    statement = validated(Statement, parse_json(text, where), where)
    if (statement.type, statement.predicate_type) != (STATEMENT_TYPE, predicate_type):
        raise ValueError(
            f"{where} holds a {statement.type!r} with a predicate {statement.predicate_type!r}, "
            f"not a {STATEMENT_TYPE!r} with a {predicate_type!r}"
        )
    return statement


def read_statement(path: Path, predicate_type: str) -> Statement:
    """:func:`parse_statement` for a file."""
    return parse_statement(read_text(path), predicate_type, path)
