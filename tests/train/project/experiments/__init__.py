"""Experiments of somebody else's project, for tests."""
