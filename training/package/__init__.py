"""What a run ends in: a PEFT folder that proves itself."""
