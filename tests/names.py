"""Names of sessions in tests: most are in the namespace of servers without keys."""

from storage.base import DEFAULT_NAMESPACE, SessionKey


def named(session_id: str) -> SessionKey:
    """The session of this id there."""
    return SessionKey(DEFAULT_NAMESPACE, session_id)
