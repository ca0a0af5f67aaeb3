"""Runs over task sequences: ``rkif run`` and its commands (log, rollback, reproduce, report, tune)."""
