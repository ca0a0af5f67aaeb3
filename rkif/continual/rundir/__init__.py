"""The files of a run: folder, checkpoint, states after rounds, ledger; rollback and verification."""
