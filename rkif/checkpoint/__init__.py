"""Fusing checkpoints on disk, in memory that does not depend on their size.

``preflight`` compares the inputs and plans the output without reading a weight; ``fuse`` goes over them chunk
by chunk, first for what a method has to know of all of them (exact thresholds, mostly), then for the fusion;
``manifest`` tells later whether a byte has changed.
"""
