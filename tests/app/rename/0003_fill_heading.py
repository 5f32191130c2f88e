"""Fill heading, a thousand posts at a time."""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Commits what came before, and then each round: nobody waits longer than for one.
    with op.get_context().autocommit_block():
        op.execute("""
            DO $$
            BEGIN
                LOOP
                    UPDATE posts SET heading = title
                    WHERE id IN (SELECT id FROM posts WHERE heading IS NULL LIMIT 1000);
                    EXIT WHEN NOT FOUND;
                    COMMIT;
                END LOOP;
            END $$
        """)


def downgrade() -> None:
    pass
