"""Check that a run can start on this machine, before anything is compiled."""
