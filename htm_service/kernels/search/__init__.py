"""The tokens that score best: what reads all sketches or all tokens of a session, and few of its contents."""
