"""An agent that learns the Ballet task: its memory is on a server, its weights here, until they are pushed there.

Knows the server only as a process and through htm-client. Needs the extras `demo` and `ballet`.
"""
