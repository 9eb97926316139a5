"""python -m headprune.cli"""

from headprune.cli import main

main()
