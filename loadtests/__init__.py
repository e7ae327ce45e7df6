"""Load profiles and benchmarks: clients of the HTTP API, like any other."""
