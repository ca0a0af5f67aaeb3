"""Fusion of checkpoints on disk, in memory that does not depend on their size.

``preflight`` makes a plan of a ``request``, without reading a weight: ``source`` opens the inputs,
``compatibility`` compares them, ``layout`` cuts the tensors into chunks. ``fuse`` executes the plan:
``loader`` reads chunks, ``scan`` computes what a method needs from all elements (such as exact thresholds),
``methods`` fuse chunks, ``output`` writes them, ``metadata`` adds card and manifest, ``workdir`` publishes.
"""
