"""`python -m vlmport` is the command `vlmport`."""

from __future__ import annotations

from vlmport.cli.main import main

if __name__ == "__main__":
    main()
