"""The first tables; service/experiments/tables.py says what they hold."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "experiments",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("definition", sa.Text, nullable=False),
        sa.Column("began", sa.Float, nullable=False),
        sa.Column("ended", sa.Float, nullable=True),
    )
    running = sa.text("ended IS NULL")
    op.create_index("one_runs", "experiments", ["name"], unique=True, sqlite_where=running, postgresql_where=running)
    op.create_table(
        "exposures",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("experiment_id", sa.Integer, nullable=False),
        sa.Column("variant", sa.String(128), nullable=False),
        sa.Column("key_hash", sa.BigInteger, nullable=True),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("route", sa.String(64), nullable=False),
        sa.Column("status", sa.SmallInteger, nullable=False),
        sa.Column("prompt_tokens", sa.Integer, nullable=False),
        sa.Column("generated_tokens", sa.Integer, nullable=False),
        sa.Column("prepare_ms", sa.Float, nullable=False),
        sa.Column("queue_ms", sa.Float, nullable=False),
        sa.Column("infer_ms", sa.Float, nullable=False),
        sa.Column("total_ms", sa.Float, nullable=False),
    )
    op.create_table(
        "outcomes",
        sa.Column("exposure_id", sa.String(32), primary_key=True),
        sa.Column("prompt_index", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("token", sa.Integer, nullable=False),
        sa.Column("log_loss", sa.Float, nullable=False),
        sa.Column("at", sa.Float, nullable=False),
    )
    op.create_table(
        "shadows",
        sa.Column("exposure_id", sa.String(32), primary_key=True),
        sa.Column("variant", sa.String(128), primary_key=True),
        sa.Column("same_top", sa.SmallInteger, nullable=False),
        sa.Column("kl", sa.Float, nullable=False),
        sa.Column("sum_abs_dp", sa.Float, nullable=False),
        sa.Column("infer_ms", sa.Float, nullable=False),
        sa.Column("at", sa.Float, nullable=False),
    )
    op.create_table(
        "key_sums",
        sa.Column("experiment_id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("measure", sa.String(32), primary_key=True),
        sa.Column("variant", sa.String(128), primary_key=True),
        sa.Column("against", sa.String(128), primary_key=True),
        sa.Column("key_hash", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("n", sa.Float, nullable=False),
        sa.Column("s", sa.Float, nullable=False),
    )
    op.create_table(
        "arm_sums",
        sa.Column("experiment_id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("measure", sa.String(32), primary_key=True),
        sa.Column("variant", sa.String(128), primary_key=True),
        sa.Column("against", sa.String(128), primary_key=True),
        sa.Column("keys", sa.BigInteger, nullable=False),
        sa.Column("n", sa.Float, nullable=False),
        sa.Column("s", sa.Float, nullable=False),
        sa.Column("ss", sa.Float, nullable=False),
        sa.Column("sn", sa.Float, nullable=False),
        sa.Column("nn", sa.Float, nullable=False),
    )


def downgrade() -> None:
    for table in ("arm_sums", "key_sums", "shadows", "outcomes", "exposures", "experiments"):
        op.drop_table(table)
