"""`python -m anchorvec`, which launchers of several processes call."""

from anchorvec.cli import main

main()
