"""What a user sees of a run: progress, tables of the ledger, and the HTML report."""
