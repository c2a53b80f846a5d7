"""`python -m ssgen_ds COMMAND ...`, so that launchers which start modules can start every command."""

from ssgen_ds.cli import main

if __name__ == "__main__":
    main()
