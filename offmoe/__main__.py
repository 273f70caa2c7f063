"""`python -m offmoe` is the `offmoe` command."""

from offmoe.cli.main import main

if __name__ == "__main__":
    main()
