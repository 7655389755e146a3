"""fastseq inside other libraries."""
