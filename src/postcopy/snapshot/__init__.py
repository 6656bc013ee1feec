"""Images of guests: what they consist of, how they are taken, checked and woken again."""
