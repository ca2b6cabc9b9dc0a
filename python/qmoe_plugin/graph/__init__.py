"""Passes over models, one a file."""
