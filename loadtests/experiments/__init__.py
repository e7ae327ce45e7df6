"""Experiments that start their own servers; each writes a report and its JSON twin to docs/results."""
