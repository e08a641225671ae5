"""What a run will take: memory by part, time, and what to change where it does not fit."""
