"""``python -m kvsig``: the command line."""

import sys

from kvsig.cli import main

if __name__ == "__main__":
    sys.exit(main())
