"""Comparisons with peers: `make bench` runs them all. Each program is one module, which the others never import."""
