"""One method each. A file here is found by the registry; nothing else needs to know of it."""
