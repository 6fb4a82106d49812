"""`python -m foretune` and `accelerate launch -m foretune` are the console script."""

from foretune.cli.main import main

if __name__ == "__main__":
    main()
