"""The display of a run: progress, tables of the ledger, and the HTML report."""
