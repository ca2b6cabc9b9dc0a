"""``python -m qmoe_plugin``: see `qmoe_plugin.cli`."""

import sys

from qmoe_plugin.cli import main

if __name__ == "__main__":
    sys.exit(main())
