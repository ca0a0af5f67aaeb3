"""The model of a run: loading, the loss of records, answers to questions, and the learners."""
