"""``python -m agcl``."""

from agcl.cli import main

if __name__ == "__main__":
    main()
