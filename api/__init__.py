"""HTTP: parse, one call to the engine, encode. Knows no tensors on a device and no SQL."""
