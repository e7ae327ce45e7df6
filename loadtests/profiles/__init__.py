"""Load profiles, one class a file: Locust takes every shape that a file holds."""
