"""`python -m loramix` is `loramix`."""

from loramix.cli.main import main

main()
