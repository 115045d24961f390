"""Bytes at rest: the contract of a store and its implementations.

Knows sessions, blocks and payloads as bytes. Does not know tensors, attention or HTTP.
"""
