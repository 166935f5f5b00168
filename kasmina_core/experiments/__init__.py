"""Experiments: tasks, the run of an arm, the ledger of FLOPs, the record of a run and its report."""
