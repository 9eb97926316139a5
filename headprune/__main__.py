"""`python -m headprune` is `headprune`."""

from headprune.cli import main

main()
