"""Drop title."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("DROP TRIGGER posts_heading ON posts")
    op.execute("DROP FUNCTION posts_heading()")
    op.drop_column("posts", "title")


def downgrade() -> None:
    op.add_column("posts", sa.Column("title", sa.String(200)))
