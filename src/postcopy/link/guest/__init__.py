"""The side of the link that runs in a guest's process.

``control`` is what a monitor drives, ``engine_slot`` hands out engines, ``keeper`` answers them.
"""
