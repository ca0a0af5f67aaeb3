"""A sanitizer for Triton kernels: ttsem executes what Triton's frontend emits, and every access is checked.

``.ci/run ttsem`` runs the kernel tests with the pytest plugin, ``plugin.py``. One file checks one property:
``bounds.py`` that an access is inside a tensor, ``unwritten.py`` that something has written what is read,
``ordering.py`` that programs do not race. ``speed.py`` makes ttsem faster. ``controls.py`` has kernels with
one fault each, which must be reported.
"""
