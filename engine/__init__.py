"""The step: continuous batching of many adapters over one resident base. Imports base and adapters."""
