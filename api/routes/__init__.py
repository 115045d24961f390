"""One module per kind of resource; each handler is: parse, one call to the engine, encode."""
