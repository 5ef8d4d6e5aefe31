"""`python -m nestlearn`, the same as the command `nestlearn`."""

from nestlearn.cli import main

if __name__ == "__main__":
    main()
