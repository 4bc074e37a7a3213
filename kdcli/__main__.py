"""`python -m kdcli` and the console script: the program, which ends in order from its first moment on."""

from kdcli import interrupts

interrupts.install()


def main() -> None:
    """Run the program."""
    # Imported only now: Ctrl-C while the libraries load is an end like any other.
    from kdcli.cli.app import main as program

    program()


if __name__ == "__main__":
    main()
