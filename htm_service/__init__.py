"""The domain of htm-service: sessions of chunked memory and HTM attention over them.

Knows tensors, devices and batching. Does not know HTTP, SQL or the environment.
"""

from htm_service.version import __version__

__all__ = ["__version__"]
