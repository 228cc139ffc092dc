"""The way in: `llmpy`, or `python -m llmpy`."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
