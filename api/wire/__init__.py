"""Bytes in, records out, and back: pure functions without HTTP."""
