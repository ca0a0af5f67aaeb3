"""Records and tasks, read from files; tokens and batches made from them; the replay memory."""
