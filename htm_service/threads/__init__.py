"""Worker threads: batches, and whether the threads work."""
