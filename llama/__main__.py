"""`python -m llama`, and the command `llama`. Ctrl-C ends it with status 130, also while it is still being imported."""

try:
    from .system.program import as_a_program
except KeyboardInterrupt:
    raise SystemExit(130) from None


def main() -> None:
    """Run the command line of this process."""
    with as_a_program():
        from .commands.cli import main

    main()


if __name__ == "__main__":
    main()
