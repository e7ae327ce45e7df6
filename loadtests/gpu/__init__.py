"""Measurements on hosts with GPUs."""
