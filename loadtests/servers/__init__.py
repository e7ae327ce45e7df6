"""Start, pause and end the servers that are measured."""
