"""``python -m compress`` is the command ``compress``."""

import sys

from compress.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
