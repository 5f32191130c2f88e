"""Add heading, and keep it and title the same."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("posts", sa.Column("heading", sa.String(200)))
    op.execute("""
        CREATE FUNCTION posts_heading() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF TG_OP = 'INSERT' THEN
                NEW.heading := coalesce(NEW.heading, NEW.title);
                NEW.title := coalesce(NEW.title, NEW.heading);
            ELSIF NEW.title IS DISTINCT FROM OLD.title THEN
                NEW.heading := NEW.title;
            ELSE
                NEW.title := coalesce(NEW.heading, NEW.title);
            END IF;
            RETURN NEW;
        END $$
    """)
    op.execute("""
        CREATE TRIGGER posts_heading BEFORE INSERT OR UPDATE ON posts
        FOR EACH ROW EXECUTE FUNCTION posts_heading()
    """)


def downgrade() -> None:
    op.execute("DROP TRIGGER posts_heading ON posts")
    op.execute("DROP FUNCTION posts_heading()")
    op.drop_column("posts", "heading")
