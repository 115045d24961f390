"""TLS as httpx sets it up: the certificates of certifi, or those that SSL_CERT_FILE or SSL_CERT_DIR name.

Does not know connections.
"""

from __future__ import annotations

import ssl

import httpx


def client_context() -> ssl.SSLContext:
    """For connections that speak HTTP/1.1."""
    context = httpx.create_ssl_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


def is_refused_certificate(error: OSError) -> bool:
    """Whether the server's certificate is why there is no connection: trying again would not change it."""
    return isinstance(error, ssl.SSLCertVerificationError)
