"""Posts: create, read, list, replace, delete."""

from __future__ import annotations

from typing import Annotated, TypeVar

from fastapi import APIRouter, HTTPException, Path, Query, Request, Response, status
from fastapi.exceptions import RequestValidationError
from sqlalchemy import delete, select, update

from app.database import Session
from app.models import Post, now
from app.paging import CursorError, CursorSigner
from app.problems import documented
from app.schemas import PostIn, PostOut, PostPage

router = APIRouter(prefix="/api/posts", tags=["posts"], responses=documented(422, 503))

_T = TypeVar("_T")

# What the column can hold; the database driver fails on more.
PostId = Annotated[int, Path(ge=1, le=2**63 - 1)]


@router.get("")
async def list_posts(
    request: Request,
    session: Session,
    limit: Annotated[int, Query(ge=1, le=100, description="Posts per page.")] = 20,
    cursor: Annotated[str | None, Query(max_length=64, description="`next_cursor` of the page before.")] = None,
) -> PostPage:
    """List posts, newest first.

    Paging by cursor: posts that are written meanwhile neither repeat nor hide any, and the thousandth page costs as
    much as the first.
    """
    signer: CursorSigner = request.app.state.cursor_signer
    query = select(Post).order_by(Post.id.desc()).limit(limit + 1)
    if cursor is not None:
        try:
            query = query.where(Post.id < signer.decode(cursor))
        except CursorError:
            message = "Not a cursor of this service; start again from the first page"
            raise RequestValidationError([{"loc": ("query", "cursor"), "msg": message, "type": "cursor"}]) from None
    posts = (await session.scalars(query)).all()
    # One more than asked for tells whether there is a next page.
    next_cursor = signer.encode(posts[limit - 1].id) if len(posts) > limit else None
    return PostPage(items=[PostOut.model_validate(post) for post in posts[:limit]], next_cursor=next_cursor)


@router.post("", status_code=status.HTTP_201_CREATED, response_model=PostOut)
async def create_post(request: Request, response: Response, session: Session, data: PostIn) -> Post:
    """Write a post."""
    written = now()
    post = Post(**data.model_dump(), created_at=written, updated_at=written)
    session.add(post)
    await session.flush()
    # A path: it is right whatever name and scheme the client came by.
    response.headers["Location"] = str(request.app.url_path_for("read_post", post_id=post.id))
    return post


@router.get("/{post_id}", response_model=PostOut, responses=documented(404))
async def read_post(session: Session, post_id: PostId) -> Post:
    """Read a post."""
    return _found(await session.get(Post, post_id))


@router.put("/{post_id}", response_model=PostOut, responses=documented(404))
async def replace_post(session: Session, post_id: PostId, data: PostIn) -> Post:
    """Replace a post's title and body, both of them. Repeating the request changes nothing more."""
    statement = update(Post).where(Post.id == post_id).values(**data.model_dump()).returning(Post)
    return _found(await session.scalar(statement))


@router.delete("/{post_id}", status_code=status.HTTP_204_NO_CONTENT, responses=documented(404))
async def delete_post(session: Session, post_id: PostId) -> None:
    """Delete a post."""
    _found(await session.scalar(delete(Post).where(Post.id == post_id).returning(Post.id)))


def _found(row: _T | None) -> _T:
    if row is None:
        raise HTTPException(status.HTTP_404_NOT_FOUND, "There is no such post.")
    return row
