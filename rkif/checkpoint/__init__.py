"""Fusion of checkpoints on disk, in memory that does not depend on their size.

``preflight`` turns a ``request`` into a plan, without reading a weight: ``source`` opens the inputs,
``compatibility`` compares them, ``layout`` cuts the work into chunks. ``fuse`` carries the plan out:
``loader`` reads chunks, ``scan`` finds what the method needs from all elements (mostly exact thresholds),
``methods`` compute, ``output`` writes, ``metadata`` adds the card and the manifest, ``workdir`` publishes.
"""
