"""From a fault to the page in place: the pager, placement, and the time that faults cost."""
