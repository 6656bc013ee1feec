"""A saved guest as the source of a postcopy: it wakes elsewhere before its memory is there."""
