"""Experiments: choices only. A public function that returns an `Experiment` is one; every file has a `tiny`."""
