"""Where the time goes, and how it grows: the tables of docs/performance.md."""
