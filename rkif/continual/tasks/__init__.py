"""Records and tasks from files, their conversion to tokens and batches, and the replay memory."""
