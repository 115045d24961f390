"""Answering attends: what they see and cost, the device's thread, one batch."""
