"""htm-service beside what a user would pick instead: Chroma's server, and PostgreSQL with pgvector."""
