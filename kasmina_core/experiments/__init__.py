"""Whole runs: tasks, arms, the ledger of FLOPs, records and reports."""
