"""Random tests: damaged files, random calls, killed commands."""
