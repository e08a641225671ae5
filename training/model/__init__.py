"""The model that learns: the resident base, an adapter on it, and the batches that go through."""
