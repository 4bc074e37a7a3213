"""`python -m kdcli` is the same program as `kdcli`."""

from kdcli.cli.app import main

if __name__ == "__main__":
    main()
