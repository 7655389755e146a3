"""The command `fastseq`: info, verify, demo, report."""
