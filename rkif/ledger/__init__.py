"""The ledger: a hash chain of records of what was done to a model."""
