"""``postcopy bench``: what a link can do, and what migrations over it would take.

:mod:`postcopy.bench.wire` is the protocol, :mod:`postcopy.bench.server` the end that listens,
:mod:`postcopy.bench.measure` the end that measures, and :mod:`postcopy.bench.forecast` what follows for a
guest.
"""
