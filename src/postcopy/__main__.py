"""``python -m postcopy``: the command line."""

from postcopy.cli import main

if __name__ == "__main__":
    main()
