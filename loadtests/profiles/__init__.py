"""Load profiles, one a file: Locust takes every shape that a file holds."""
