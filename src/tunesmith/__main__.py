"""`python -m tunesmith`."""

from __future__ import annotations

from tunesmith.cli.app import main

if __name__ == "__main__":
    main()
