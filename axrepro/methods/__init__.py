"""Objectives, one file each: models, loss and updates. The trainer sees only the `Method` interface."""
