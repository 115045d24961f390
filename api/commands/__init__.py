"""Commands of `htm-service` that ask a running server."""
