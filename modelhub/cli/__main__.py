"""`python -m modelhub.cli`: as `python -m modelhub`."""

from modelhub.cli import main

if __name__ == "__main__":
    main()
