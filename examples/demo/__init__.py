"""The demo: a real server, agents over HTTP, and Python's own documentation as what they remember.

Knows the server only as a process and through htm-client. Needs the extra `demo`.
"""
