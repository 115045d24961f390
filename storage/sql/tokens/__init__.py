"""The tokens of sessions in the database: where they lie, and how they come, are joined and go."""
