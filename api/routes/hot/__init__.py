"""The calls with tensors, of one session and of many."""
