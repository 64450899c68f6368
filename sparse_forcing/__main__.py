"""`python -m sparse_forcing` and the `sparse-forcing` command."""

from __future__ import annotations

import sys

from sparse_forcing.cli import main

if __name__ == "__main__":
    sys.exit(main())
