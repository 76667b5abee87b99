"""`python -m modelhub`: the command, where no script of it is on the PATH."""

from modelhub.cli import main

if __name__ == "__main__":
    main()
