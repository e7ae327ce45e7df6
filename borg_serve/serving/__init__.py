"""One machine: processes, signals, readiness, drain."""
