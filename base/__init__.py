"""The resident model: Qwen2.5-VL in 4 bits, its processor and the embedded pocket base. Imports nothing of ours."""
