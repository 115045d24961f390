"""What is different about SQLite and PostgreSQL."""
