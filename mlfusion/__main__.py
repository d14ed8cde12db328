"""`python -m mlfusion` is the same as `mlfusion`; an interrupt while it is still being loaded ends it quietly, too."""


def main() -> None:
    """Entry point of `mlfusion`."""
    try:
        from mlfusion.cli import main as command_line

        command_line()
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
