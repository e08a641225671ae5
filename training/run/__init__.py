"""A run from its data to its package: the phases of `train-adapter`, and their folder."""
