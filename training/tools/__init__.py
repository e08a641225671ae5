"""Tools for finished adapters: export, import, inspect, shrink, and judging one."""
