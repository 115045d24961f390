"""How a call reaches the server: connections of the client's own, or what httpx has for everything else.

Does not know what calls mean or when to send one again.
"""
