"""`python -m kdcli` and the console script: the program, which ends in order from its first moment on."""

from kdcli import interrupts

interrupts.install()


def main() -> None:
    """Run the program."""
    # Imported only now: Ctrl-C while the libraries load is an end like any other.
    from kdcli.cli.app import main as program

    try:
        program()
    finally:
        # All is said: what comes while the libraries end would kill the process without a word, with another code.
        interrupts.ignore()


if __name__ == "__main__":
    main()
