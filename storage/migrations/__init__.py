"""The schema's versions, run by Alembic; see `storage/schema.py`."""
