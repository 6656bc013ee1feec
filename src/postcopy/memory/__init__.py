"""Guest memory as an engine sees it: RAM blocks, which of their pages are where, runs of pages."""
