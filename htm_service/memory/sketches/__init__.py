"""Sketches: one bit per dimension of each token, around the summary key of its chunk."""
