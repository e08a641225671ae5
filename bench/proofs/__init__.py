"""What the engine must show, item by item: each proof starts what it needs, measures pairs side by side, and claims."""
