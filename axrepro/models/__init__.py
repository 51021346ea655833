"""Assembled networks, each with factory functions for its known shapes."""
