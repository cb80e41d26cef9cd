"""Where vLLM is installed: engines in the process of the test. `make test-vllm` runs this."""

import importlib.util
import os

if importlib.util.find_spec("vllm") is not None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
