"""The command `jaxft`, which is also `python -m jaxft`."""

import sys


def main() -> None:
    """Runs the verb that the command line names."""
    from jaxft.large_pages import restart  # before JAX is imported, so that nothing is imported twice

    restart()
    try:
        from jaxft import verbs
    except KeyboardInterrupt:  # which `command.exits` says of all that follows
        sys.exit(130)

    verbs.main()


if __name__ == "__main__":
    main()
