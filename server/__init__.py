"""The wire: the OpenAI-compatible HTTP surface over the engine. Does no tensor arithmetic."""
