"""The command line: `python -m capsule_heads`."""

from .cli import main

if __name__ == "__main__":
    main()
