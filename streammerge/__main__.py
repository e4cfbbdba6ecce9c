"""`python -m streammerge` is the command `streammerge`."""

from streammerge.cli import main

main()
