"""What goes over the wire."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Title = Annotated[
    str,
    # No control characters: a title is one line.
    StringConstraints(strip_whitespace=True, min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$"),
]
# PostgreSQL cannot store NUL; SQLite could, and the two should not differ.
Body = Annotated[str, StringConstraints(max_length=10_000, pattern=r"^[^\x00]*$")]


class PostIn(BaseModel):
    """A post as a client writes it. Names that do not exist are refused, so that a misspelt one is noticed."""

    model_config = ConfigDict(extra="forbid")

    title: Title
    body: Body


class PostOut(BaseModel):
    """A post as it is kept."""

    model_config = ConfigDict(from_attributes=True)

    id: int
    title: str
    body: str
    created_at: datetime
    updated_at: datetime


class PostPage(BaseModel):
    """Some posts, newest first."""

    model_config = ConfigDict(from_attributes=True)

    items: list[PostOut]
    next_cursor: str | None = Field(description="Give it as `cursor` to get the next page; null on the last page.")


class Instance(BaseModel):
    """Who answers."""

    release: str
    slot: str
    host: str
    environment: str
