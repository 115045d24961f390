"""The arithmetic of an attend: one signature, several implementations, one resolver."""
