"""The version of the server, in one place; the changelog's top entry and the wheel follow it."""

__version__ = "0.1.0"
