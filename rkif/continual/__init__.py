"""Runs over task sequences: ``rkif run`` and what goes with it (log, rollback, reproduce, report, tune)."""
