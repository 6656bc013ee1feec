"""Shows a migration as it happens, or a recorded one: in a terminal, and as a page in a browser.

``sampler`` asks the machines and makes one :class:`~postcopy.watch.sample.Sample` after the other; all else
takes samples and knows nothing of machines.
"""
