"""Whole sessions as files, out and in. Imports downward: writes, sessions, attention."""
