"""`python -m llmscale` is the console script `llmscale`: launchers that start modules need no path to it."""

from llmscale.cli.main import main

main()
