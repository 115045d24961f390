"""What changes sessions: appends, compaction, expiry. Imports downward: reads, sessions, memory, threads."""
