"""`python -m reinforce_ada` is `reinforce-ada`."""

from __future__ import annotations

import sys

from reinforce_ada.cli import main

if __name__ == "__main__":
    sys.exit(main())
