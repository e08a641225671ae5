"""Where packages come from: each source turns what was asked into a folder that the store may copy."""
