"""The resident model: Qwen2.5-VL in 4 bits, its processor and the embedded pocket base. Imports nothing of ours."""

import logging

# bitsandbytes looks for a kernel of the hub's when it is imported, and warns when it has none: we choose another way.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
