"""The schema's versions, run by Alembic; see `storage/sql/schema.py`."""
