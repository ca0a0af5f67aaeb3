"""A run's model: loading it, its loss on records, its answers to questions, and the learners."""
