"""`python -m fastdllm_ext` is `fastdllm-ext`."""

import sys

from fastdllm_ext.cli import main

if __name__ == "__main__":
    sys.exit(main())
