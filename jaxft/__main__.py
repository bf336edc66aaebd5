"""The command `jaxft`, which is also `python -m jaxft`."""


def main() -> None:
    """Runs the verb that the command line names."""
    from jaxft.large_pages import restart  # before JAX is imported, so that nothing is imported twice

    restart()
    from jaxft import verbs

    verbs.main()


if __name__ == "__main__":
    main()
