"""`python -m evomerge` is the command line."""

from evomerge.cli.main import main

if __name__ == "__main__":
    main()
