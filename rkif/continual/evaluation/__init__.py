"""Evaluation of a run: accuracy and the metrics computed from it, the gate's criteria, round statistics."""
