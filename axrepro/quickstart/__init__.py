"""A first model, from text that is at hand to a trained network and its score."""
