"""Searches: their way on the event loop, and the device's half of it."""
